"""Run the Lambda function once under AWS's own runtime, without Docker: `python -m local.invoke`.

What `sam local invoke` does in a container happens here in a process: AWS's Runtime Interface
Emulator (inside the SAM CLI's wheel) speaks to AWS's runtime client for Python (awslambdaric), and
that calls the handler. The interpreter is .venv-aws's: PyTorch can only come from the layer.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import psutil
import requests

from layer.build import default_name
from layer.packages import REQUIREMENTS
from local.atomic import replacing
from local.cli import UserError, run
from local.paths import BUILD, ROOT
from local.processes import die_with_parent

PYTHON = ROOT / ".venv-aws" / "bin" / "python"
LAYER = ROOT / "layer" / default_name(REQUIREMENTS)
TIMEOUT = 60  # seconds, as in template.yaml


def emulator() -> Path:
    """AWS's Runtime Interface Emulator for this processor."""
    machine = "arm64" if platform.machine() in ("arm64", "aarch64") else "x86_64"
    return Path(find_spec("samcli").origin).parent / f"local/rapid/aws-lambda-rie-{machine}"


@contextlib.contextmanager
def running(
    task: Path,
    layer: Path,
    scratch: Path,
    variables: dict[str, str],
    log: int | IO[bytes],
    cores: set[int] | None = None,
) -> Iterator[str]:
    """The function in folder `task` with an unpacked layer, until the block ends.

    `scratch` is its /tmp, `cores` the processors that it may use. Yields the address to POST events
    to; the execution environment starts with the first of them.
    """
    address, runtime_api = (f"127.0.0.1:{port}" for port in free_ports(2))
    arguments = {
        "--log-level": "error",
        "--runtime-interface-emulator-address": address,
        "--runtime-api-address": runtime_api,
    }
    runtime = [PYTHON, "-m", "awslambdaric", "app.lambda_handler"]
    process = subprocess.Popen(
        [emulator(), *(part for pair in arguments.items() for part in pair), *runtime],
        cwd=task,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=lambda: _before_the_emulator(cores),
        env={
            "PATH": os.environ["PATH"],
            "TMPDIR": str(scratch),
            "LAMBDA_TASK_ROOT": str(task),
            "PYTHONPATH": str(layer / "python"),
            "AWS_REGION": "us-east-1",
            "AWS_LAMBDA_FUNCTION_NAME": "PyTorchFunction",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "3008",
            "AWS_LAMBDA_FUNCTION_TIMEOUT": str(TIMEOUT),
            **variables,
        },
    )
    try:
        wait_for(address, process)
        yield f"http://{address}/2015-03-31/functions/function/invocations"
    finally:
        stop(process)


def _before_the_emulator(cores: set[int] | None) -> None:
    """In the new process: it ends with this one, even if that is killed."""
    die_with_parent(signal.SIGTERM)
    if cores:
        os.sched_setaffinity(0, cores)


def stop(emulator: subprocess.Popen) -> None:
    """End it and the runtime, which it has put into a group of its own."""
    family = [emulator]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += psutil.Process(emulator.pid).children(recursive=True)
    for process in family:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family[1:], timeout=5)
    emulator.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def wait_for(address: str, process: subprocess.Popen) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), 1).close()
            return
        time.sleep(0.02)
    raise UserError("AWS's runtime emulator did not start.")


def unpacked(layer: Path) -> Path:
    """The folder with the content of a layer's zip, as it would be in /opt; unpacked once."""
    if not layer.is_file():
        raise UserError(f"There is no {layer}: run layer/create_layer_zipfile.sh first.")
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = BUILD / "invoke" / digest
    if not folder.exists():
        for old in folder.parent.glob("*"):  # of layers that have been replaced since
            shutil.rmtree(old, ignore_errors=True)
        with replacing(folder) as partial, zipfile.ZipFile(layer) as archive:
            archive.extractall(partial)
    return folder


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable JSON file: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m local.invoke", description=__doc__)
    parser.add_argument("function", nargs="?", default="PyTorchFunction", help="logical name")
    parser.add_argument("-e", "--event", type=Path, default=ROOT / "event.json")
    parser.add_argument("-n", "--env-vars", type=Path, default=ROOT / "env.json")
    parser.add_argument("--layer", type=Path, default=LAYER, help="the layer's zip")
    arguments = parser.parse_args()
    variables = read_json(arguments.env_vars).get(arguments.function)
    if not isinstance(variables, dict):
        raise UserError(f"{arguments.env_vars} has no variables for {arguments.function}.")
    event = read_json(arguments.event)
    aws = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    # The log goes to standard error, the answer alone to standard output.
    layer = unpacked(arguments.layer)
    with (
        tempfile.TemporaryDirectory() as scratch,
        running(
            ROOT / "pytorch", layer, Path(scratch), aws | variables, log=sys.stderr.fileno()
        ) as address,
    ):
        answer = requests.post(address, json=event, timeout=TIMEOUT).json()
    print(json.dumps(answer))
    if "errorMessage" in answer:
        raise UserError(f"the function failed: {answer['errorMessage']}")


if __name__ == "__main__":
    run(main)
