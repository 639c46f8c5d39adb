"""The commands of the README from a plain shell: one stack, two models, the embedded AWS."""

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import requests
import torch
from PIL import Image

from local.notebook import private_hosts, reachable, require_stack, share_image
from local.paths import ROOT
from preprocessing import Preprocessing
from training.bundle import create
from training.trace import serialize, trace_module
from training.upload import upload

STACK, BUCKET, LAYER = "pytorch-sam-app", "artifacts", "pytorch"
SMALL = Preprocessing(16, 16, (0.5,) * 3, (0.5,) * 3)


class Brightest(torch.nn.Module):
    """Answers with the brightest channel, or with the darkest one."""

    def __init__(self, sign: float):
        super().__init__()
        self.sign = torch.nn.Parameter(torch.tensor(sign))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.sign * 10 * batch.mean(dim=(2, 3))


def shell(script: str, cwd: Path, **variables: str) -> str:
    """Run a script as a person would in a terminal, with the environment's commands on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env=os.environ | {"PATH": path} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def upload_model(sign: float, folder: Path) -> str:
    model = folder / "brightest.pt"
    model.write_bytes(serialize(trace_module(Brightest(sign), torch.ones(1, 3, 16, 16))))
    bundle = create(model, ["red", "green", "blue"], SMALL, folder / "model.tar.gz")
    key = f"models/{sign}.tar.gz"
    upload(bundle, BUCKET, key)
    return key


def deploy(key: str, layer_arn: str, folder: Path, **parameters: object) -> str:
    """`sam package` and `sam deploy` as in the README; the endpoint's address here."""
    parameters = {"AllowPrivateHosts": private_hosts()} | parameters
    overrides = " ".join(f"{name}={value}" for name, value in parameters.items() if value)
    shell(
        f"""
        sam package --output-template-file {folder}/packaged.yaml --s3-bucket {BUCKET}
        sam deploy --template-file {folder}/packaged.yaml --stack-name {STACK} \
            --capabilities CAPABILITY_IAM --no-fail-on-empty-changeset --parameter-overrides \
            BucketName={BUCKET} ObjectKey={key} LambdaLayerArn={layer_arn} \
            Runtime=python{sys.version_info.major}.{sys.version_info.minor} {overrides}
        """,
        ROOT,
    )
    return reachable(require_stack(STACK)["PyTorchApi"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("deploy")


@pytest.fixture(scope="module")
def layer_arn(embedded):
    """The real layer, built (or reused) and published by the scripts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in embedded.items():
            patch.setenv(name, value)
        shell(f"aws s3 mb s3://{BUCKET}; ./create_layer_zipfile.sh", ROOT / "layer")
        out = shell(
            f"./create_code_buckets.sh --bucket-prefix code >&2;"
            f"./publish_lambda_layers.sh --bucket-prefix code --layer-name {LAYER}",
            ROOT / "layer",
        )
        return out.split()[-1]


@pytest.fixture(scope="module")
def image(folder):
    path = folder / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def ask(endpoint: str, url: str) -> requests.Response:
    return requests.post(endpoint, json={"url": url}, timeout=60)


def test_from_bundle_to_answer_and_another_model_through_the_same_stack(
    aws, layer_arn, folder, image
):
    url = share_image(image, BUCKET)
    endpoint = deploy(upload_model(1.0, folder), layer_arn, folder)
    answer = ask(endpoint, url)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"class", "confidence"}
    assert answer.json()["class"] == "red"
    assert answer.headers["Content-Type"].startswith("application/json")

    # The bundle of a function can be changed by deploying again, and only by that.
    assert deploy(upload_model(-1.0, folder), layer_arn, folder) == endpoint
    assert ask(endpoint, url).json()["class"] in ("green", "blue")


def test_the_endpoint_answers_bad_requests(aws, layer_arn, folder, image):
    endpoint = deploy(upload_model(1.0, folder), layer_arn, folder)
    for body, status in (("{", 400), ("{}", 400), ('{"url": "file:///etc/passwd"}', 400)):
        answer = requests.post(endpoint, data=body, timeout=60)
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["request_id"]


def test_the_logs_can_be_read_by_the_logical_name(aws, layer_arn, folder, image):
    endpoint = deploy(upload_model(1.0, folder), layer_arn, folder)
    ask(endpoint, share_image(image, BUCKET))
    log = shell(f"sam logs -n PyTorchFunction --stack-name {STACK}", ROOT)
    assert "model loaded" in log and "predict_ms" in log
    assert "X-Amz-Signature" not in log


def test_the_table_of_the_endpoint(aws, layer_arn, folder):
    deploy(upload_model(1.0, folder), layer_arn, folder)
    table = shell(
        f"aws cloudformation describe-stacks --stack-name {STACK} "
        "--query 'Stacks[].Outputs[?OutputKey==`PyTorchApi`]' --output table",
        ROOT,
    )
    assert "/Prod/invocations" in table


def test_without_the_layer_there_is_no_answer(aws, layer_arn, folder, image):
    endpoint = deploy(upload_model(1.0, folder), layer_arn, folder)
    url = share_image(image, BUCKET)
    assert ask(endpoint, url).status_code == 200
    function = require_stack(STACK)["PyTorchFunction"]
    client = boto3.client("lambda")
    client.update_function_configuration(FunctionName=function, Layers=[])
    client.get_waiter("function_updated_v2").wait(FunctionName=function)
    assert ask(endpoint, url).status_code >= 500
    client.update_function_configuration(FunctionName=function, Layers=[layer_arn])
    client.get_waiter("function_updated_v2").wait(FunctionName=function)
    assert ask(endpoint, url).status_code == 200


def test_event_and_variables_invoke_the_function_directly(aws, layer_arn, folder, image):
    deploy(upload_model(1.0, folder), layer_arn, folder)
    event = json.loads((ROOT / "event.json").read_text())
    event["body"] = json.dumps({"url": share_image(image, BUCKET)})
    out = boto3.client("lambda").invoke(
        FunctionName=require_stack(STACK)["PyTorchFunction"], Payload=json.dumps(event)
    )
    assert "FunctionError" not in out
    response = json.load(out["Payload"])
    assert response["statusCode"] == 200
    assert json.loads(response["body"])["class"] == "red"
    assert list(json.loads((ROOT / "env.json").read_text())) == ["PyTorchFunction"]


def test_sam_build_installs_nothing_into_the_function(aws, folder):
    shell(f"sam build --build-dir {folder}/sam", ROOT)
    template = (folder / "sam" / "template.yaml").read_text()
    assert "PyTorchFunction" in template
    assert not list((folder / "sam").rglob("torch"))


def test_delete_stack_leaves_nothing(aws, layer_arn, folder):
    deploy(upload_model(1.0, folder), layer_arn, folder)
    shell(f"aws cloudformation delete-stack --stack-name {STACK}", ROOT)
    shell(f"aws cloudformation wait stack-delete-complete --stack-name {STACK}", ROOT)
    assert boto3.client("lambda").list_functions()["Functions"] == []
    assert boto3.client("logs").describe_log_groups()["logGroups"] == []
