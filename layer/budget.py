"""What a layer is made of, in bytes, package by package: the table and picture of notebook 05."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

VISIBLE = 50_000  # bytes: 0.1 MB when rounded
UNZIPPED_LIMIT = 262_144_000  # bytes; function code and all layers together, after unzipping
# https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html


def table(budget: dict) -> str:
    """One line a package: megabytes (10^6 bytes) in place, compressed, pruned; share of the limit.

    Packages that would show zeros only are added up in the last line but one.
    """
    rows, small = {}, dict.fromkeys(("kept", "compressed", "pruned", "share"), 0)
    for name, row in budget["packages"].items():
        if max(row.values()) >= VISIBLE:
            rows[name] = row
        else:
            small = {key: small[key] + row[key] for key in small}
    lines = [f"{'package':24}{'in place':>10}{'compressed':>12}{'pruned':>10}{'share':>8}"]
    for name, row in (rows | {"others": small}).items():
        lines.append(
            f"{name:24}{mega(row['kept']):>10}{mega(row['compressed']):>12}{mega(row['pruned']):>10}"
            f"{row['share']:>8.1%}"
        )
    lines.append(
        f"{'total':24}{budget['unzipped'] / 1e6:>10.1f} MB unzipped of {budget['limit'] / 1e6:.1f} "
        f"({budget['unzipped'] / budget['limit']:.1%}),\n"
        f"{budget['zipped'] / 1e6:.1f} MB zipped, "
        f"{budget['extracted'] / 1e6:.1f} MB unpacked at the cold start"
    )
    return "\n".join(lines)


def mega(size: int) -> str:
    return f"{size / 1e6:.1f}" if size else "-"


def plot(budget: dict) -> Figure:
    """Bars a package: in place and compressed on the left axis of megabytes, pruned in grey."""
    rows = sorted(
        budget["packages"].items(), key=lambda item: -(item[1]["kept"] + item[1]["compressed"])
    )
    shown = rows[:9]
    rest = {k: sum(row[k] for _, row in rows[9:]) for k in ("kept", "compressed", "pruned")}
    shown = [*shown, ("the others", rest)] if len(rows) > 9 else shown
    names = [name for name, _ in shown]
    figure = plt.figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(shown)
    for key, colour, label in (
        ("kept", "#0072B2", "used in place"),
        ("compressed", "#E69F00", "compressed (as stored)"),
        ("pruned", "#BBBBBB", "pruned or stripped"),
    ):
        widths = [row[key] / 1e6 for _, row in shown]
        axes.barh(names, widths, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.axvline(budget["limit"] / 1e6, color="#D55E00", linestyle="--", linewidth=1)
    axes.annotate(
        "Lambda's limit",
        (budget["limit"] / 1e6, len(shown) / 2),
        color="#D55E00",
        xytext=(4, 0),
        textcoords="offset points",
    )
    axes.set_xlabel("MB (10⁶ bytes)")
    axes.set_title(
        f"{budget['unzipped'] / 1e6:.0f} of {budget['limit'] / 1e6:.0f} MB: "
        f"a layer for {budget['target']}"
    )
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
