"""Links to the previous and the next notebook, at the top and the end of each.

python -m local.navigation            write them (`make refresh` does)
python -m local.navigation --check    only say whether they are right (`make lint` does)
"""

import argparse

import nbformat

from local.cli import UserError, run
from local.paths import ROOT

TAG = "navigation"


def with_links(notebook: nbformat.NotebookNode, before: str, after: str) -> nbformat.NotebookNode:
    """`notebook` with the links of a notebook between two others, whatever links it had."""
    links = ["[Contents](../README.md#the-series)"]
    if before:
        links.insert(0, f"[← {before}]({before}.ipynb)")
    if after:
        links.append(f"[{after} →]({after}.ipynb)")
    cells = [c for c in notebook.cells if TAG not in c.metadata.get("tags", [])]
    top, end = (
        nbformat.v4.new_markdown_cell(
            " · ".join(links), id=f"navigation-{place}", metadata={"tags": [TAG]}
        )
        for place in ("top", "end")
    )
    return notebook | {"cells": [cells[0], top, *cells[1:], end]}


def write(check: bool = False) -> None:
    """Put the links into all notebooks; with `check`, UserError if one has not the right ones."""
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    names = ["", *(path.stem for path in paths), ""]
    for path, before, after in zip(paths, names, names[2:], strict=False):
        notebook = nbformat.read(path, as_version=4)
        linked = nbformat.from_dict(with_links(notebook, before, after))
        if linked == notebook:
            continue
        if check:
            raise UserError(f"The links of {path.name} are not right: python -m local.navigation")
        beside = path.with_suffix(".new")
        nbformat.write(linked, beside)
        beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m local.navigation", description="Links.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if wrong")
    write(parser.parse_args().check)


if __name__ == "__main__":
    run(main)
