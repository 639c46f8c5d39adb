"""Create the environments: .venv (notebooks, command lines) and .venv-aws (embedded AWS).

    python3 -m local.install            called by `make install`

An environment is complete or is built anew: one whose installation was interrupted is deleted,
one that fits its requirements file is left alone. Standard library only, since nothing else is
there yet. TORCH_INDEX_URL names the package index for torch; by default PyTorch's CPU index is
taken where it answers, else whatever index pip is configured with.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request

from local.paths import ROOT
from local.processes import die_with_parent, lock

LOG = ROOT / "build" / "install.log"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GB = 1_000_000_000

# Installed sizes, measured on Linux x86_64. The layer's packages come later (notebook 02).
SIZE_CPU = 2.2 * GB
SIZE_CUDA = 6.5 * GB
SIZE_REST = 2.5 * GB  # layer build, embedded AWS, models


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m local.install", description=__doc__)
    parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  (whoever runs this may not have read the README)
        sys.exit(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}.")
    die_with_parent()
    with lock(ROOT / "build" / "install.lock") as held:
        notebooks = ["requirements.txt", "requirements-dev.txt"]
        todo = {
            folder: files
            for folder, files in {
                ".venv": [*notebooks, "pyproject.toml"],
                ".venv-aws": ["requirements-aws.txt"],
            }.items()
            if not is_complete(folder, files)
        }
        if not todo:
            return
        index = torch_index() if ".venv" in todo else []
        announce(todo, index)
        for folder, files in todo.items():
            arguments = [a for f in files if f.endswith(".txt") for a in ("-r", f)]
            if folder == ".venv":
                arguments += [*index, "-e", "."]
            install(folder, arguments, held)
            (ROOT / folder / "complete").write_text(fingerprint(files))


def fingerprint(files: list[str]) -> str:
    """Changes whenever the environment has to: with its requirements, the Python, the place."""
    digest = hashlib.sha256(f"{sys.version} {ROOT}".encode())
    for file in files:
        digest.update((ROOT / file).read_bytes())
    return digest.hexdigest()


def is_complete(folder: str, files: list[str]) -> bool:
    stamp = ROOT / folder / "complete"
    return stamp.exists() and stamp.read_text() == fingerprint(files)


def torch_index() -> list[str]:
    """pip's arguments for the index that torch comes from."""
    url = os.environ.get("TORCH_INDEX_URL")
    if not url:
        if sys.platform != "linux":  # PyPI's own builds are CPU builds there
            return []
        try:
            urllib.request.urlopen(f"{TORCH_CPU_INDEX}/torch/", timeout=3).close()
        except OSError:
            return []
        url = TORCH_CPU_INDEX
    return ["--extra-index-url", url]


def announce(todo: dict, index: list[str]) -> None:
    """Say what is about to happen; stop here if the disk is too small for it."""
    needed = SIZE_REST
    if ".venv" in todo:
        cuda = sys.platform == "linux" and TORCH_CPU_INDEX not in index
        needed += SIZE_CUDA if cuda else SIZE_CPU
    free = shutil.disk_usage(ROOT).free
    source = f" (torch from {index[-1]})" if index else ""
    say(f"Installing {' and '.join(todo)}{source} from Python {sys.version.split()[0]}.")
    say(
        f"With the layer's packages, fetched later, this takes up to {needed / GB:.1f} GB of disk "
        f"and downloads about a third of it; {free / GB:.0f} GB are free."
    )
    if free < needed:
        sys.exit("That is not enough: free some space, or clone to another disk.")


def install(folder: str, arguments: list[str], held: int) -> None:
    """Create a virtual environment and install into it, showing what pip is at.

    pip inherits the lock `held`: should only this process be killed, no other one touches the
    folder while pip still works in it.
    """
    target = ROOT / folder
    if not (target / "complete").exists():  # interrupted, or not ours: nothing in it can be trusted
        shutil.rmtree(target, ignore_errors=True)
    (target / "complete").unlink(missing_ok=True)
    started = time.monotonic()
    with open(LOG, "w") as log:
        # The index of an outer environment (PYTHONPATH, VIRTUAL_ENV) must not leak into ours.
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        create = [sys.executable, "-m", "venv", str(target)]
        if subprocess.run(create, stdout=log, stderr=log, env=variables).returncode:
            sys.exit(f"{' '.join(create)} failed; on Debian: apt install python3-venv. See {LOG}")
        pip = [target / "bin" / "python", "-m", "pip", "install", "--progress-bar", "off"]
        process = subprocess.Popen(
            [*pip, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=variables | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
            pass_fds=[held],
            preexec_fn=die_with_parent,
        )
        with process:
            for line in process.stdout:
                log.write(line)
                log.flush()
                show(folder, line, started)
    if process.returncode:
        with contextlib.suppress(OSError):
            print(*LOG.read_text().splitlines()[-8:], sep="\n", file=sys.stderr)
        sys.exit(f"Installing {folder} failed; the whole of pip's output is in {LOG}.")
    say(f"{folder} is complete after {time.monotonic() - started:.0f} s.")


def show(folder: str, line: str, started: float) -> None:
    """One line that is rewritten on a terminal; elsewhere only the big steps."""
    words = line.split()
    if not words or words[0] not in ("Collecting", "Downloading", "Installing"):
        return
    text = f"{folder} {time.monotonic() - started:4.0f} s  {' '.join(words[:2])}"
    if sys.stderr.isatty():
        say(text[: shutil.get_terminal_size().columns - 1], end="")
    elif words[:2] == ["Installing", "collected"]:
        say(text)


def say(text: str, end: str = "\n") -> None:
    """On stderr: stdout may be read by a shell, as in `eval "$(make -s aws)"`."""
    erase = "\r\033[K" if sys.stderr.isatty() else ""
    print(erase + text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
