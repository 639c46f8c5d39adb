"""The embedded AWS: a MiniStack server in an environment of its own (.venv-aws).

    python -m local.aws {start,stop,status,run} --help

`make aws`, `make lab`, `make run`, the tests and the first cell of every notebook come here.
Standard-library and psutil only. Nothing here knows what is deployed on the server.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from local.cli import UserError, run
from local.paths import BUILD, ROOT
from local.processes import die_with_parent, lock

MINISTACK = ROOT / ".venv-aws" / "bin" / "ministack"
START_TIMEOUT = 60  # seconds
WORKER_MEMORY = 1_500_000_000  # bytes to have for each concurrent function; PyTorch takes half

# Whatever is exported for a real account must not reach a client of the embedded one.
FOREIGN = (
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_ROLE_ARN",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL_LAMBDA",
    "AWS_ENDPOINT_URL_CLOUDFORMATION",
    "AWS_ENDPOINT_URL_LOGS",
    "AWS_ENDPOINT_URL_STS",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
)


def environment(port: int) -> dict[str, str]:
    """The variables with which the AWS CLI, the SAM CLI, boto3 and the layer's scripts speak to
    the embedded AWS on `port`."""
    around_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "LAYER_TARGET": "local",
        "SAM_CLI_TELEMETRY": "0",
        "NO_PROXY": around_proxy,
        "no_proxy": around_proxy,
    }


def account_concurrency() -> int:
    """How many functions may run at once: what the memory carries, at most 10, as on AWS in a new
    account. Beyond it callers are throttled."""
    return max(2, min(10, psutil.virtual_memory().available // WORKER_MEMORY))


def adopt(variables: dict[str, str]) -> None:
    """Make this process, and all that it starts, speak to the embedded AWS."""
    for name in FOREIGN:
        os.environ.pop(name, None)
    os.environ.update(variables)


def find(home: Path) -> int | None:
    """The port of the server whose state is in `home`, or None if none answers there."""
    record = _read_record(home)
    if record and _process(record) and _answers(record["port"]):
        return record["port"]
    return None


def start(home: Path, with_parent: bool = False) -> int:
    """Start a server with its state in `home`, unless one runs there already; return its port.

    `with_parent` ties its life to the calling thread's: it ends even if that one is killed.

    Raises UserError if the environment is missing or the server does not come up.
    """
    with lock(home / "lock"):
        port = find(home)
        if port:
            return port
        _stop(home)
        if not MINISTACK.exists():
            raise UserError(f"{MINISTACK.relative_to(ROOT)} is missing: run `make install` first.")
        for _ in range(3):  # somebody else may take the free port before the server does
            port = _start(home, with_parent)
            if port:
                return port
        log = home / "server.log"
        raise UserError(
            f"The embedded AWS did not start. Its last words, from {log}:\n{_tail(log)}"
        )


def stop(home: Path) -> bool:
    """Stop the server of `home` and delete its state. Returns whether one was running."""
    with lock(home / "lock"):
        return _stop(home)


@contextlib.contextmanager
def running(home: Path) -> Iterator[dict[str, str]]:
    """A server for as long as the block lasts, and no longer, however the block ends."""
    stop(home)
    port = start(home, with_parent=True)
    try:
        yield environment(port)
    finally:
        stop(home)


def _start(home: Path, with_parent: bool) -> int | None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scratch = home / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "PYTHON"))}
    variables |= environment(port) | {
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "TMPDIR": str(scratch),  # unpacked functions and layers, and their /tmp
        "STATE_DIR": str(home / "state"),
        "S3_DATA_DIR": str(home / "s3"),
        "LAMBDA_EXECUTOR": "local",
        "LAMBDA_ACCOUNT_CONCURRENCY": str(account_concurrency()),
        "DOCKER_HOST": "unix:///nonexistent",  # never look for a Docker engine
        "SFTP_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }
    with open(home / "server.log", "wb") as log:
        server = subprocess.Popen(
            [MINISTACK],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=home,
            env=variables,
            start_new_session=True,  # Ctrl-C reaches whoever started it, who then stops it
            preexec_fn=die_with_parent if with_parent else None,
        )
    record = {
        "pid": server.pid,
        "created": psutil.Process(server.pid).create_time(),
        "port": port,
    }
    _write_record(home, record)
    deadline = time.monotonic() + START_TIMEOUT
    while server.poll() is None and time.monotonic() < deadline:
        if _answers(port):
            return port
        time.sleep(0.1)
    _stop(home)
    return None


def _stop(home: Path) -> bool:
    record = _read_record(home)
    server = _process(record) if record else None
    if server:
        family = [server, *server.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
    for name in ("tmp", "state", "s3"):
        shutil.rmtree(home / name, ignore_errors=True)
    (home / "server.json").unlink(missing_ok=True)
    return server is not None


def _answers(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/_ministack/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def _process(record: dict) -> psutil.Process | None:
    """The recorded process, unless it has ended; a process that got its number later is not it."""
    try:
        process = psutil.Process(record["pid"])
        same = abs(process.create_time() - record["created"]) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _read_record(home: Path) -> dict | None:
    try:
        return json.loads((home / "server.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _write_record(home: Path, record: dict) -> None:
    beside = home / "server.json.new"
    beside.write_text(json.dumps(record))
    beside.replace(home / "server.json")


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def main() -> None:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--home",
        type=Path,
        default=BUILD / "aws",
        help="folder of its state (default: build/aws); one server each",
    )
    parser = argparse.ArgumentParser(prog="python -m local.aws", description="The embedded AWS.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_ in {
        "start": "start it, or find the one that runs; print its environment for a shell",
        "stop": "stop it and delete its state",
        "status": "say whether it runs",
        "run": "run a command against one that lives only as long",
    }.items():
        command = commands.add_parser(name, help=help_, description=help_, parents=[common])
        if name == "run":
            command.add_argument("argv", nargs="+", metavar="COMMAND", help="after a --")
    arguments = parser.parse_args()
    home = arguments.home.resolve()
    if arguments.command == "start":
        port = start(home)
        print('# For this shell:  eval "$(make -s aws)"     To end it:  make aws-stop')
        print("unset " + " ".join(FOREIGN))
        for name, value in environment(port).items():
            print(f"export {name}={shlex.quote(value)}")
        print(f'export PATH={shlex.quote(str(ROOT / ".venv" / "bin"))}:"$PATH"')
    elif arguments.command == "stop":
        print("Stopped." if stop(home) else "The embedded AWS was not running.")
    elif arguments.command == "run":
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with running(home) as variables:
            adopt(variables)
            sys.exit(subprocess.run(arguments.argv, check=False).returncode)
    else:
        port = find(home)
        print(f"Runs at http://127.0.0.1:{port}" if port else "Not running.")
        sys.exit(0 if port else 1)


if __name__ == "__main__":
    run(main)
