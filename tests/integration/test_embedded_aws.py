"""The embedded AWS: starts, is found, stops, survives what happens to processes."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from local import aws
from local.cli import UserError
from local.paths import ROOT

MODULE = [sys.executable, "-m", "local.aws"]


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def home(tmp_path):
    yield tmp_path / "home"
    aws.stop(tmp_path / "home")


def server(home) -> psutil.Process:
    return psutil.Process(aws._read_record(home)["pid"])


def test_start_is_safe_to_repeat_and_stop_leaves_nothing(home):
    port = aws.start(home)
    assert aws.start(home) == port == aws.find(home)
    pid = server(home).pid
    assert aws.stop(home) is True
    assert wait_until_gone(pid)
    assert aws.find(home) is None
    assert aws.stop(home) is False
    assert {path.name for path in home.iterdir()} <= {"lock", "server.log"}


def test_listens_on_the_loopback_only(home):
    port = aws.start(home)
    connections = [c for c in server(home).net_connections() if c.status == psutil.CONN_LISTEN]
    assert [(c.laddr.ip, c.laddr.port) for c in connections] == [("127.0.0.1", port)]


def test_a_killed_server_is_replaced(home):
    aws.start(home)
    first = server(home)
    first.kill()
    first.wait(5)
    port = aws.start(home)
    assert aws.find(home) == port
    assert server(home).pid != first.pid


def test_another_process_with_the_recorded_number_is_left_alone(home):
    home.mkdir()
    me = psutil.Process()
    aws._write_record(home, {"pid": me.pid, "created": me.create_time() - 100, "port": 1})
    assert aws.find(home) is None
    assert aws.stop(home) is False


@pytest.mark.parametrize("content", ["", "{", '{"pid": '])
def test_a_half_written_record_does_no_harm(home, content):
    home.mkdir()
    (home / "server.json").write_text(content)
    assert aws.find(home) is None
    port = aws.start(home)
    assert aws.find(home) == port


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_it_dies_with_whoever_runs_it(home):
    code = f"import sys; from local import aws; from pathlib import Path\n\
with aws.running(Path({str(home)!r})): print('up', flush=True); sys.stdin.read()"
    runner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert runner.stdout.readline() == b"up\n"
    pid = server(home).pid
    runner.kill()
    runner.wait()
    assert wait_until_gone(pid)


def test_run_passes_on_the_exit_status_and_cleans_up(home):
    script = 'aws s3 mb s3://a-bucket > /dev/null && test "$AWS_SECRET_ACCESS_KEY" = test; exit 7'
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        [*MODULE, "run", "--home", home, "--", "sh", "-c", script],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "AWS_PROFILE": "somebody", "AWS_SESSION_TOKEN": "x"},
    )
    assert done.returncode == 7
    assert aws.find(home) is None


def test_the_command_line_tells_a_shell_where_it_is(home):
    port = aws.start(home)
    out = subprocess.run(
        [*MODULE, "start", "--home", home], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    shown = subprocess.run(
        ["bash", "-euc", 'eval "$1"; echo "$AWS_ENDPOINT_URL ${AWS_PROFILE:-none}"', "-", out],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"AWS_PROFILE": "somebody"},
    ).stdout
    assert shown == f"http://127.0.0.1:{port} none\n"


def test_without_its_environment_a_sentence(home, monkeypatch):
    monkeypatch.setattr(aws, "MINISTACK", ROOT / ".venv-aws" / "bin" / "missing")
    with pytest.raises(UserError, match="run `make install` first"):
        aws.start(home)


def test_interrupted_it_stops_what_it_started(home):
    process = subprocess.Popen(
        [*MODULE, "run", "--home", home, "--", "sleep", "60"], cwd=ROOT, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while aws.find(home) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    pid = server(home).pid
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) != 0
    assert wait_until_gone(pid)


def test_its_environment_has_no_package_of_the_layer():
    python = ROOT / ".venv-aws" / "bin" / "python"
    for name in ("torch", "numpy", "PIL", "requests"):
        found = subprocess.run([python, "-c", f"import {name}"], capture_output=True)
        assert found.returncode != 0, f"{name} would hide a broken layer"
