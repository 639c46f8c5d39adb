"""The handler under AWS's own runtime emulator and runtime client, with the real layer."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from test_deploy import BUCKET, shell, upload_model

from local.notebook import private_hosts, share_image
from local.paths import ROOT


@pytest.fixture
def files(aws, tmp_path):
    """event.json and env.json for a red image and a model that knows it."""
    shell(f"aws s3 mb s3://{BUCKET} || true; ./create_layer_zipfile.sh", ROOT / "layer")
    image = tmp_path / "red.png"
    Image.new("RGB", (40, 30), "red").save(image)
    key = upload_model(1.0, tmp_path)
    event = json.loads((ROOT / "event.json").read_text())
    event["body"] = json.dumps({"url": share_image(image, BUCKET)})
    (tmp_path / "event.json").write_text(json.dumps(event))
    variables = {"MODEL_BUCKET": BUCKET, "MODEL_KEY": key, "ALLOW_PRIVATE_HOSTS": private_hosts()}
    (tmp_path / "env.json").write_text(json.dumps({"PyTorchFunction": variables}))
    return tmp_path


def invoke(files: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "local.invoke", "PyTorchFunction"]
    command += ["-e", files / "event.json", "-n", files / "env.json", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_prints_the_answer_and_nothing_else(files):
    done = invoke(files)
    assert done.returncode == 0, done.stderr
    response = json.loads(done.stdout)
    assert response["statusCode"] == 200
    assert json.loads(response["body"])["class"] == "red"
    assert "model loaded" in done.stderr


def test_a_wrong_model_is_a_503_and_named_in_the_log(files):
    (files / "env.json").write_text(
        json.dumps({"PyTorchFunction": {"MODEL_BUCKET": BUCKET, "MODEL_KEY": "missing"}})
    )
    done = invoke(files)
    assert json.loads(done.stdout)["statusCode"] == 503
    assert f"s3://{BUCKET}/missing" in done.stderr


@pytest.mark.parametrize(
    ("name", "text"), [("env.json", "{"), ("env.json", "{}"), ("event.json", "")]
)
def test_a_bad_file_is_a_sentence(files, name, text):
    (files / name).write_text(text)
    done = invoke(files)
    assert done.returncode == 1
    assert name in done.stderr and "Traceback" not in done.stderr


def test_without_the_layer_a_sentence(files):
    done = invoke(files, "--layer", files / "missing.zip")
    assert done.returncode == 1
    assert "create_layer_zipfile.sh" in done.stderr


def test_nothing_is_left_running_by_a_kill(files):
    command = [sys.executable, "-m", "local.invoke", "-e", files / "event.json"]
    process = subprocess.Popen(
        [*command, "-n", files / "env.json"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    (emulator,) = wait_for(lambda: psutil.Process(process.pid).children())
    (runtime,) = wait_for(emulator.children)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs([emulator, runtime], timeout=10)
    assert not alive


def wait_for(children):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := children():
            return found
        time.sleep(0.05)
    raise AssertionError("no process was started")
