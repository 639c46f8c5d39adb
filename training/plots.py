"""The pictures of the training notebook: each function returns a matplotlib Figure, which
`plt.show()` shows.

Colours are from the palette of Okabe and Ito, which people with colour-blindness can tell apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from training.evaluate import Predictions, reliability
from training.fit import best_epoch

BLUE, ORANGE = "#0072B2", "#D55E00"


def samples(folder: Path, columns: int = 10, rows: int = 3) -> Figure:
    """The first `rows` images of each class in `folder`, one column a class, `columns` at most."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())[:columns]
    figure = plt.figure(figsize=(0.9 * len(classes), 0.95 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, len(classes), squeeze=False)
    for column, name in enumerate(classes):
        images = sorted(path for path in name.iterdir() if path.is_file())
        for row in range(rows):
            _show(axes[row, column], images[row] if row < len(images) else None)
        axes[0, column].set_title(name.name, fontsize=9)
    return figure


def curves(history: Sequence[dict]) -> Figure:
    """Loss and accuracy on the training and validation splits, epoch by epoch."""
    epochs = [entry["epoch"] for entry in history]
    figure = plt.figure(figsize=(8, 3), layout="constrained")
    for axes, quantity, label in zip(
        figure.subplots(1, 2),
        ("loss", "accuracy"),
        ("cross-entropy (nats)", "accuracy (share of right answers)"),
        strict=True,
    ):
        for split, colour, marker in (("train", BLUE, "o"), ("val", ORANGE, "s")):
            values = [entry[f"{split}_{quantity}"] for entry in history]
            axes.plot(epochs, values, color=colour, marker=marker, markersize=4, label=split)
        axes.axvline(best_epoch(history), color="0.6", linestyle=":", label="best epoch")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    return figure


def live_curves() -> Callable[[list[dict]], None]:
    """For `on_epoch`: one picture in the cell's output, drawn anew after each epoch."""
    # Empty at first: a picture that came later would cut the progress bar in two.
    handle = display({"text/plain": ""}, raw=True, display_id=True)

    def update(history: Sequence[dict]) -> None:
        figure = curves(history)
        if handle:  # None outside a notebook
            handle.update(figure)
        plt.close(figure)  # or Jupyter would show it once more

    return update


def calibration(predictions: Predictions) -> Figure:
    """Share of right answers against mean confidence, in bins, with and without the temperature.

    On the diagonal, confidence says how often the model is right. The dots grow with their images.
    """
    figure = plt.figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    for temperature, colour, marker in (
        (1.0, ORANGE, "s"),
        (predictions.temperature, BLUE, "o"),
    ):
        at = replace(predictions, temperature=temperature)
        confidence, share, count = zip(*reliability(at.confidence, at.right), strict=True)
        size = 12 + 120 * np.array(count) / max(count)
        label = f"temperature {temperature:.2f}"
        axes.scatter(confidence, share, size, colour, marker, alpha=0.75, label=label)
    axes.set(xlabel="mean confidence", ylabel="share of right answers")
    axes.set(xlim=(0, 1.03), ylim=(-0.03, 1.03))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return figure


def confusion_matrix(predictions: Predictions, limit: int = 20) -> Figure:
    """How often each true class (row) was taken for each class (column).

    Of more than `limit` classes those with the most mistakes are shown.
    """
    count = len(predictions.classes)
    matrix = np.zeros((count, count), dtype=int)
    np.add.at(matrix, (predictions.labels, predictions.predicted), 1)
    mistakes = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    shown = np.sort(np.argsort(-mistakes, kind="stable")[:limit])
    matrix = matrix[np.ix_(shown, shown)]
    names = [predictions.classes[i] for i in shown]
    side = 1.6 + 0.38 * len(shown)
    figure = plt.figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix, cmap="Blues")
    for (row, column), number in np.ndenumerate(matrix):
        if number:
            colour = "white" if number > matrix.max() / 2 else "black"
            axes.text(column, row, number, ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(
        xlabel="predicted",
        ylabel="true",
        title=f"{predictions.accuracy:.1%} of {len(predictions.labels)} right",
    )
    return figure


def mistakes(predictions: Predictions, limit: int = 12) -> Figure:
    """The wrongly classified images, those first of which the model was surest."""
    wrong = np.flatnonzero(predictions.labels != predictions.predicted)
    wrong = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:limit]
    columns = min(6, max(1, len(wrong)))
    rows = max(1, -(-len(wrong) // columns))
    figure = plt.figure(figsize=(max(3, 1.35 * columns), 1.75 * rows), layout="constrained")
    if not len(wrong):
        axes = figure.subplots()  # a figure without axes is not shown
        axes.axis("off")
        axes.text(0.5, 0.5, "no mistakes", ha="center", va="center")
        return figure
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid:
        axes.axis("off")
    for axes, i in zip(figure.axes, wrong, strict=False):
        _show(axes, predictions.paths[i])
        true, predicted = (
            predictions.classes[n[i]] for n in (predictions.labels, predictions.predicted)
        )
        axes.set_title(f"{true}\n→ {predicted} {predictions.confidence[i]:.0%}", fontsize=9)
    return figure


def answers(images: Sequence[Path], answers: Sequence[dict]) -> Figure:
    """Images with what the endpoint answered: class and confidence.

    Where an image's folder has the name of a class that was answered for some image, that is taken
    for the true class, and a different answer is shown as a mistake.
    """
    known = {answer["class"] for answer in answers}
    columns = min(5, len(images))
    rows = -(-len(images) // columns)
    figure = plt.figure(figsize=(1.6 * columns, 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid:
        axes.axis("off")
    for axes, path, answer in zip(figure.axes, images, answers, strict=False):
        _show(axes, path)
        true, name = path.parent.name, answer["class"]
        wrong = true in known and true != name
        title = f"{true}\n→ {name}" if wrong else name
        axes.set_title(
            f"{title} {answer['confidence']:.0%}", fontsize=9, color=ORANGE if wrong else "black"
        )
    return figure


def _show(axes, path: Path | None) -> None:
    axes.axis("off")
    if path is not None:
        with Image.open(path) as image:
            axes.imshow(image.convert("RGB"), interpolation="nearest")
