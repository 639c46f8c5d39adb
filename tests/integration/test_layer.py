"""The real layer: built, unpacked, killed, and published to the embedded AWS."""

import hashlib
import json
import random
import subprocess
import sys
import time
import zipfile

import boto3
import pytest

from layer import build
from local.paths import ROOT

PREDICT = (
    "import unzip_requirements, torch; "
    "print(torch.nn.functional.relu(torch.tensor([-1.0, 2.0])).tolist())"
)


@pytest.fixture(scope="module")
def zip_path():
    return build.build(build.Target.create("local"))


@pytest.fixture(scope="module")
def layer(zip_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layer")
    with zipfile.ZipFile(zip_path) as file:
        file.extractall(folder)
    return folder / "python"


def start(layer, scratch, code=PREDICT):
    code = f"import sys; sys.path.insert(0, {str(layer)!r}); {code}"
    return subprocess.Popen(
        [sys._base_executable, "-I", "-S", "-B", "-c", code],
        env={"TMPDIR": str(scratch)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_sizes(zip_path):
    budget = build.read_manifest(zip_path)["budget"]
    with zipfile.ZipFile(zip_path) as file:
        assert sum(entry.file_size for entry in file.infolist()) <= 250_000_000
    assert zip_path.stat().st_size <= 135_000_000
    assert budget["extracted"] <= 350_000_000
    rows = budget["packages"].values()
    parts = sum(row["kept"] + row["compressed"] for row in rows)
    assert abs(parts - budget["unzipped"]) < 100_000  # the manifest itself is written last


def test_the_same_inputs_give_the_same_bytes(zip_path, tmp_path):
    again = build.build(build.Target.create("local"), output=tmp_path / "again.zip")
    assert again.read_bytes() == zip_path.read_bytes()


def test_it_predicts_after_being_killed_at_any_instant(layer, tmp_path):
    delays = random.Random(0)
    for _ in range(10):
        process = start(layer, tmp_path)
        time.sleep(delays.uniform(0, 2))
        process.kill()
        process.communicate()
    out, err = start(layer, tmp_path).communicate()
    assert (out, err) == ("[0.0, 2.0]\n", "")
    manifest = json.loads((layer / ".requirements" / "manifest.json").read_text())
    (path,) = (p for p in tmp_path.rglob("*") if p.is_file())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest["libraries"][0]["sha256"]


def test_two_processes_at_once(layer, tmp_path):
    processes = [start(layer, tmp_path) for _ in range(2)]
    assert [p.communicate() for p in processes] == [("[0.0, 2.0]\n", "")] * 2


def test_rare_packages_come_from_the_archive(layer, tmp_path):
    code = (
        "import io, unzip_requirements, torch, sympy; "
        "program = torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),)); "
        "print(program.module()(torch.ones(1, 3)).shape, '.zip' in sympy.__file__)"
    )
    out, err = start(layer, tmp_path, code).communicate()
    assert out == "torch.Size([1, 2]) True\n", err


def script(name, *arguments):
    return subprocess.run(
        [str(ROOT / "layer" / name), *arguments], capture_output=True, text=True, cwd="/"
    )


def test_publish_in_two_regions_once(aws, zip_path):
    both = ["--bucket-prefix", "layer-code", "--regions", "us-east-1,eu-west-1"]
    missing = script("publish_lambda_layers.sh", *both, "--layer-name", "test")
    assert missing.returncode == 1
    assert "create_code_buckets.sh --bucket-prefix layer-code" in missing.stderr
    assert "Traceback" not in missing.stderr

    for _ in range(2):  # a second time changes nothing
        buckets = script("create_code_buckets.sh", *both)
        assert buckets.stdout.split() == ["layer-code-us-east-1", "layer-code-eu-west-1"]
        assert buckets.returncode == 0, buckets.stderr
        published = script("publish_lambda_layers.sh", *both, "--layer-name", "test", "--public")
        assert published.returncode == 0, published.stderr
        arns = published.stdout.split()
        assert [arn.split(":")[3:] for arn in arns] == [
            ["us-east-1", arns[0].split(":")[4], "layer", "test", "1"],
            ["eu-west-1", arns[0].split(":")[4], "layer", "test", "1"],
        ]
    client = boto3.client("lambda", region_name="eu-west-1")
    version = client.get_layer_version_by_arn(Arn=arns[1])
    manifest = build.read_manifest(zip_path)
    assert version["CompatibleRuntimes"] == [manifest["runtime"]]
    assert version["CompatibleArchitectures"] == [manifest["architecture"]]
    policy = client.get_layer_version_policy(LayerName="test", VersionNumber=1)["Policy"]
    assert json.loads(policy)["Statement"][0]["Principal"] == "*"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--bucket-prefix", "X y"], "no valid bucket name"),
        (
            ["--bucket-prefix", "p", "--regions", "atlantis"],
            "'atlantis' is not the name of a region",
        ),
        (["--bucket-prefix", "p", "--account", "12"], "12 digits"),
        (["--bucket-prefix", "p", "--zip", "/no.zip"], "does not exist"),
        (["--bucket-prefix", "p", "--layer-name", "a b"], "no layer name"),
        (["--bucket-prefix", "p", "--zip", "/etc/hostname"], "is no layer made by"),
    ],
)
def test_what_is_wrong_is_named(aws, zip_path, arguments, sentence):
    result = script("publish_lambda_layers.sh", *arguments)
    assert result.returncode == 1
    assert sentence in result.stderr and "Traceback" not in result.stderr
