"""What `make run` says and leaves behind when a notebook fails."""

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from local import walkthrough
from local.cli import UserError
from local.paths import ROOT


@pytest.fixture
def run(tmp_path, capsys):
    papermill.engines.papermill_engines.register("steps", walkthrough.Engine)

    def run(*cells: str):
        notebook = new_notebook(cells=[new_markdown_cell("# A title\n\n> and more")])
        notebook.cells.append(new_markdown_cell("## A step"))
        notebook.cells += [new_code_cell(cell) for cell in cells]
        path, output = tmp_path / "05_layer.ipynb", tmp_path / "executed.ipynb"
        nbformat.write(notebook, path)
        walkthrough.run_notebook(path, output)
        return nbformat.read(output, as_version=4)

    return run


def test_a_good_notebook_shows_its_steps(run, capsys):
    executed = run("print(6 * 7)")
    assert executed.cells[-1].outputs[0].text == "42\n"
    shown = capsys.readouterr().out
    assert "05  A title" in shown
    assert "A step" in shown


def test_steps_keep_their_names_when_parameters_are_put_in(run, tmp_path, capsys):
    run("X = 1")
    path = tmp_path / "05_layer.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": ""}
    notebook.cells[-1].metadata["tags"] = ["parameters"]
    later = ["## A later step", "## The last step"]
    for heading, code in zip(later, ["assert X == 2", "1 / 0"], strict=True):
        notebook.cells += [new_markdown_cell(heading), new_code_cell(code)]
    nbformat.write(notebook, path)
    with pytest.raises(SystemExit):
        walkthrough.run_notebook(path, tmp_path / "executed.ipynb", {"X": 2})
    shown = capsys.readouterr()
    steps = ["A step", *later]
    places = [shown.out.rindex(step.removeprefix("## ")) for step in steps]
    assert places == sorted(places)
    assert "The last step" in shown.err


@pytest.mark.parametrize(
    ("cell", "cause"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("from local.cli import UserError\nraise UserError('Run 01 first.')", "Run 01 first."),
        ("%%bash -eu\necho out\necho 'the reason' >&2\nfalse", "the reason"),
        ("%%bash -eu\nexit 3", "status 3"),
        ("import os\nos._exit(3)", "died"),
    ],
)
def test_a_failure_names_notebook_cell_and_cause(run, capsys, cell, cause):
    with pytest.raises(SystemExit) as exit_:
        run("x = 1", cell, "y = 2")
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert "05_layer.ipynb" in said
    assert "A step" in said
    assert "executed.ipynb" in said
    assert cause in said.splitlines()[-1]
    assert "Traceback" not in said


def test_the_executed_notebook_of_a_failure_is_kept(run, tmp_path):
    with pytest.raises(SystemExit):
        run("print('so far')", "1 / 0")
    executed = nbformat.read(tmp_path / "executed.ipynb", as_version=4)
    texts = [o.get("text", "") for c in executed.cells for o in c.get("outputs", [])]
    assert "so far\n" in texts


def test_stored_outputs_carry_nothing_of_the_run(run, tmp_path):
    run("import sys\nprint(6 * 7)\nprint('  \\r', end='', file=sys.stderr)")
    target = tmp_path / "05_layer.ipynb"
    walkthrough.store_outputs(tmp_path / "executed.ipynb", target)
    text = target.read_text()
    assert "42" in text
    assert "stderr" not in [o.name for o in nbformat.read(target, 4).cells[-1].outputs]
    assert "papermill" not in text


def test_parameters_reach_the_notebooks_that_declare_them(tmp_path):
    for name, source in (("01_a", "X = 1\nIMAGES = None"), ("02_b", "IMAGES = None")):
        cell = new_code_cell(source, metadata={"tags": ["parameters"]})
        nbformat.write(new_notebook(cells=[cell]), tmp_path / f"{name}.ipynb")
    first, second = sorted(tmp_path.glob("*.ipynb"))
    assert walkthrough.assign({"X": 2, "IMAGES": "pics"}, [first, second]) == {
        first: {"X": 2, "IMAGES": "pics"},
        second: {"IMAGES": "pics"},
    }
    with pytest.raises(UserError, match="IMAGE; did you mean IMAGES"):
        walkthrough.assign({"IMAGE": 1}, [first, second])


def test_the_series_declares_what_the_documentation_promises():
    notebooks = {path.name[:2]: path for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {"MODEL_SOURCE", "DATA", "MODEL_FILE", "CLASSES_FILE", "PREPROCESSING"} <= (
        walkthrough.declared(notebooks["01"])
    )
    assert all("IMAGES" in walkthrough.declared(notebooks[n]) for n in ("02", "04", "07", "09"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("None", None),
        ("True", True),
        ("resnet50", "resnet50"),
        ("/a/b.pt", "/a/b.pt"),
        ("{'crop': 32}", {"crop": 32}),
        ("file.py:make", "file.py:make"),
    ],
)
def test_values_are_read_as_in_a_cell(text, value):
    assert walkthrough.literal(text) == value
