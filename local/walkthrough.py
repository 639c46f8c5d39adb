"""Run the whole series of notebooks in order, as `make run` does.

    python -m local.walkthrough              against an embedded AWS of its own
    python -m local.walkthrough --target aws against the AWS account of the environment
    python -m local.walkthrough --refresh    and store the outputs in notebooks/ (for maintainers)
    python -m local.walkthrough -p MODEL_SOURCE pretrained -p ARCHITECTURE resnet50
                                             with other values in the notebooks' parameters

Executed notebooks are kept in build/run/. The last line printed is what the endpoint answered.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import papermill
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from traitlets.config import Config

from local import aws, navigation
from local.cli import UserError, run, shown
from local.paths import BUILD, ROOT
from local.processes import die_with_parent, lock

RUN = BUILD / "run"
ANSWERS = BUILD / "answers.json"  # of notebook 07
TAIL = 6  # lines of a failed cell's output that are shown

KERNEL = Config({"KernelManager": {"transport": "ipc"}})  # no port that others could listen to

console = Console(highlight=False, soft_wrap=True)


class Steps:
    """Shows which step of a notebook runs and how long each took. A step is a headed section."""

    def __init__(self):
        self.headings: list[str] = []
        self.name = ""
        self.started = 0.0
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )

    def __enter__(self) -> "Steps":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self.progress.stop()

    def cell(self, index: int) -> None:
        """The cell at `index` starts."""
        name = self.headings[index]
        if name != self.name:
            self._finish()
            self.name, self.started = name, time.monotonic()
            self.progress.add_task(name)

    def _finish(self) -> None:
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        if self.name:
            seconds = time.monotonic() - self.started
            console.print(f"   {self.name:60} {seconds:6.1f} s", markup=False)
        self.name = ""


class Engine(NBClientEngine):
    """papermill's own engine, telling `steps` about each cell."""

    steps: Steps

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        cls.steps.headings = _headings(nb_man.nb)  # with the cell of parameters put in
        cell_start = nb_man.cell_start

        @functools.wraps(cell_start)
        def announce(cell, cell_index=None, **others):
            if cell.cell_type == "code":
                cls.steps.cell(cell_index)
            return cell_start(cell, cell_index, **others)

        nb_man.cell_start = announce
        return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


def run_notebook(path: Path, output: Path, parameters: dict | None = None) -> None:
    """Execute one notebook. Ends the program with its name, the cell and the cause if it fails."""
    notebook = nbformat.read(path, as_version=4)
    title = notebook.cells[0].source.splitlines()[0].lstrip("# ")
    console.print(f"{path.stem[:2]}  {title}", style="bold", markup=False)
    with Steps() as steps:
        Engine.steps = steps
        try:
            papermill.execute_notebook(
                str(path),
                str(output),
                parameters=parameters or {},
                engine_name="steps",
                kernel_name="python3",
                cwd=str(path.parent),
                progress_bar=False,
                config=KERNEL,
                coalesce_streams=True,
            )
            return
        except PapermillExecutionError as error:
            if error.ename == "KeyboardInterrupt":
                raise KeyboardInterrupt from None
            failed = steps.headings[error.cell_index], error
        except (RuntimeError, OSError) as error:  # the kernel died or did not start
            failed = steps.name, error
    explain(path, output, *failed)


def declared(path: Path) -> set[str]:
    """The names that a notebook's `parameters` cell assigns to."""
    return {
        target.id
        for cell in nbformat.read(path, as_version=4).cells
        if "parameters" in cell.metadata.get("tags", [])
        for statement in ast.parse(cell.source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    }


def assign(parameters: dict, notebooks: list[Path]) -> dict[Path, dict]:
    """For each notebook those of the parameters that it declares.

    Raises:
        UserError: no notebook declares a parameter of that name.
    """
    names = {path: declared(path) for path in notebooks}
    everywhere = sorted(set().union(*names.values()))
    for name in parameters:
        if name not in everywhere:
            close = difflib.get_close_matches(name, everywhere, n=1, cutoff=0) or everywhere
            raise UserError(f"no notebook has a parameter {name}; did you mean {close[0]}?")
    return {
        path: {name: value for name, value in parameters.items() if name in names[path]}
        for path in notebooks
    }


def literal(text: str) -> object:
    """A parameter's value as it would be written in the cell; text that is no literal is itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def explain(path: Path, output: Path, step: str, error: Exception) -> None:
    """End the program: what the failed cell printed, then notebook, cell and cause."""
    cell, cause = "", f"The notebook's Python process ended: {error}"
    if isinstance(error, PapermillExecutionError):
        cell = f", cell [{error.exec_count}]"
        cause = error.evalue if error.ename == "UserError" else f"{error.ename}: {error.evalue}"
        printed = _streams(nbformat.read(output, as_version=4), error.exec_count)
        for line in printed[-TAIL:]:
            print(f"   | {line}", file=sys.stderr)
        if error.ename == "CalledProcessError" and printed:  # of %%bash: the command has said why
            cause = printed[-1]
    cause = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", cause).split())
    print(
        f"The run failed in {path.name}{cell}, step “{step}”.\n"
        f"The notebook with all its output: {shown(output)}\n"
        f"{cause}",
        file=sys.stderr,
    )
    sys.exit(1)


def store_outputs(executed: Path, notebook: Path) -> None:
    """Put the outputs of a run into the notebook, without papermill's notes on the run."""
    result = nbformat.read(executed, as_version=4)
    result.metadata.pop("papermill", None)
    for cell in result.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if outputs := cell.get("outputs"):  # of a bar that has gone, blanks are left
            cell.outputs = [output for output in outputs if output.get("text", "text").strip()]
    beside = notebook.with_suffix(".new")
    nbformat.write(result, beside)
    beside.replace(notebook)


def report() -> None:
    """The endpoint, the image sent and, as the last line, the body that was answered."""
    answer = json.loads(ANSWERS.read_text())[0]
    print(f"Endpoint  {answer['endpoint']}")
    print(f"Image     {answer['image']}")
    print(answer["body"])


def _headings(notebook: nbformat.NotebookNode) -> list[str]:
    """For each cell, the heading that it stands under."""
    heading, headings = "", []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^#{1,3} +(.+)$", cell.source, re.MULTILINE)
            heading = found[-1] if found else heading
        headings.append(heading)
    return headings


def _streams(notebook: nbformat.NotebookNode, exec_count: int) -> list[str]:
    """The lines that the cell with this execution count printed, those on stderr last."""
    for cell in notebook.cells:
        if cell.get("execution_count") == exec_count:
            streams = [o for o in cell.outputs if o.output_type == "stream"]
            streams.sort(key=lambda stream: stream.name == "stderr")
            return "".join(stream.text for stream in streams).strip().splitlines()
    return []


@contextlib.contextmanager
def _only_run() -> Iterator[None]:
    """Refuse to run twice at a time in one folder: the second would overwrite the first's files."""
    try:
        with lock(RUN / "lock", patience=20):  # a run that was just killed is still cleaning up
            yield
    except TimeoutError:
        sys.exit(f"Another run is under way in {shown(RUN)}; wait for it or stop it.")


@contextlib.contextmanager
def _target(name: str) -> Iterator[None]:
    if name == "aws":
        os.environ.pop("AWS_ENDPOINT_URL", None)
        yield
        return
    with aws.running(RUN / "aws") as variables:
        aws.adopt(variables)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m local.walkthrough", description="Run all notebooks in order."
    )
    parser.add_argument(
        "--target",
        choices=["embedded", "aws"],
        default="embedded",
        help="aws: the account that AWS_PROFILE or the credentials of the environment select",
    )
    parser.add_argument(
        "--refresh", action="store_true", help="store the outputs in notebooks/ afterwards"
    )
    parser.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="for every notebook that has it in its parameters; may be repeated",
    )
    arguments = parser.parse_args()
    parameters = {name: literal(value) for name, value in arguments.parameter}
    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assigned = assign(parameters, notebooks)
    if parameters and arguments.refresh:
        raise UserError("--refresh stores the outputs of the default parameters; leave out -p")
    die_with_parent()  # of `make`, too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if started with `&`
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    papermill_engines.register("steps", Engine)
    started = time.monotonic()
    os.environ["IPYTHONDIR"] = str(RUN / "ipython")  # no personal configuration, no history
    with _only_run(), _target(arguments.target):
        for old in (ANSWERS, *RUN.glob("*.ipynb")):
            old.unlink(missing_ok=True)
        for path in notebooks:
            run_notebook(path, RUN / path.name, assigned[path])
        if arguments.refresh:
            for path in notebooks:
                store_outputs(RUN / path.name, path)
            navigation.write()
    print(f"\nAll {len(notebooks)} notebooks ran in {time.monotonic() - started:.0f} s.")
    report()


if __name__ == "__main__":
    run(main)
