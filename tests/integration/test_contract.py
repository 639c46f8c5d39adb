"""The deployed endpoint against openapi.yaml: by hand, by schemathesis, and under load."""

import base64
import collections
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
import requests
from PIL import Image
from test_deploy import BUCKET, STACK, deploy, folder, layer_arn, upload_model  # noqa: F401 - fixtures

from local.notebook import require_stack, share_image
from local.paths import ROOT

COLOURS = {"red": "red", "lime": "green", "blue": "blue"}


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def stack(embedded, layer_arn, folder):  # noqa: F811
    """A deployed stack's endpoint, and the addresses of images; their bucket is open to s3://."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in embedded.items():
            patch.setenv(name, value)
        endpoint = deploy(upload_model(1.0, folder), layer_arn, folder, ImageBucket=BUCKET)
        urls = {}
        for colour in COLOURS:
            path = folder / f"{colour}.png"
            path.write_bytes(png(colour))
            urls[colour] = share_image(path, BUCKET)
        yield endpoint, urls


def answered(endpoint: str, **arguments) -> tuple[int, dict]:
    answer = requests.post(endpoint, timeout=60, **arguments)
    return answer.status_code, answer.json()


def test_every_way_of_sending_an_image(aws, stack):
    endpoint, urls = stack
    for colour, name in COLOURS.items():
        image = base64.b64encode(png(colour)).decode()
        for arguments in (
            {"json": {"url": urls[colour]}},
            {"json": {"image": image}},
            {
                "json": {
                    "url": f"s3://{BUCKET}/images/{urls[colour].split('/images/')[1].split('?')[0]}"
                }
            },
            {"data": png(colour), "headers": {"Content-Type": "image/png"}},
            {"data": png(colour), "headers": {"Content-Type": "application/octet-stream"}},
        ):
            status, body = answered(endpoint, **arguments)
            assert (status, body.get("class")) == (200, name), (arguments, body)
            assert set(body) == {"class", "confidence"}


def test_a_batch_and_the_best_classes(aws, stack):
    endpoint, urls = stack
    request = {"urls": [*urls.values(), "http://10.0.0.1/"], "top_k": 2}
    status, body = answered(endpoint, json=request)
    assert status == 200
    *good, bad = body["predictions"]
    assert [entry["class"] for entry in good] == list(COLOURS.values())
    assert all(len(entry["top_k"]) == 2 for entry in good)
    assert bad["error"]["code"] == "address_not_allowed"


def test_health(aws, stack):
    endpoint, _ = stack
    answer = requests.get(endpoint.replace("/invocations", "/health"), timeout=60)
    assert answer.status_code == 200
    body = answer.json()
    assert (body["status"], body["classes"]) == ("ready", 3)
    model = boto3.client("s3").get_object(Bucket=BUCKET, Key="models/1.0.tar.gz")["Body"].read()
    assert body["sha256"] == hashlib.sha256(model).hexdigest()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.0.0.1:9001/2018-06-01/runtime/invocation/next",
        "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
        "http://2852039166/",
        "http://[::ffff:169.254.169.254]/",
        "http://localhost/",
        "s3://another-bucket/key",
    ],
)
def test_what_is_private_is_refused(aws, stack, url):
    endpoint, _ = stack
    status, body = answered(endpoint, json={"url": url})
    assert (status, body["error"]["code"]) == (403, "address_not_allowed")


def test_the_exception_for_the_embedded_aws_is_off_unless_it_is_asked_for(aws, stack):
    """The same stack without the parameter refuses the image that it took before."""
    endpoint, urls = stack
    function = require_stack(STACK)["PyTorchFunction"]
    client = boto3.client("lambda")
    variables = client.get_function_configuration(FunctionName=function)["Environment"]["Variables"]
    assert variables["ALLOW_PRIVATE_HOSTS"] == aws["AWS_ENDPOINT_URL"].removeprefix("http://")
    assert variables["ALLOWED_HOSTS"] == ""

    def configure(value: str) -> None:
        environment = {"Variables": variables | {"ALLOW_PRIVATE_HOSTS": value}}
        client.update_function_configuration(FunctionName=function, Environment=environment)
        client.get_waiter("function_updated_v2").wait(FunctionName=function)

    configure("")
    try:
        status, body = answered(endpoint, json={"url": urls["red"]})
        assert (status, body["error"]["code"]) == (403, "address_not_allowed")
    finally:
        configure(variables["ALLOW_PRIVATE_HOSTS"])
    assert answered(endpoint, json={"url": urls["red"]})[0] == 200


def test_events_of_a_function_url(aws, stack):
    _, urls = stack
    client = boto3.client("lambda")
    function = require_stack(STACK)["PyTorchFunction"]
    event = json.loads((ROOT / "events" / "http_api.json").read_text())
    event["body"] = json.dumps({"url": urls["blue"]})
    for payload in (event, {"url": urls["blue"]}):
        out = client.invoke(FunctionName=function, Payload=json.dumps(payload))
        assert "FunctionError" not in out
        response = json.load(out["Payload"])
        assert response["statusCode"] == 200
        assert json.loads(response["body"])["class"] == "blue"


def test_the_endpoint_keeps_to_the_document(aws, stack, tmp_path):
    """schemathesis makes requests from openapi.yaml, right ones and wrong ones."""
    endpoint, _ = stack
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(ROOT / "openapi.yaml")),
        *("--url", endpoint.removesuffix("/invocations")),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "150", "--seed", "1"),
        *("--checks", "not_a_server_error,status_code_conformance,content_type_conformance"),
        *("--checks", "response_schema_conformance"),
        *("--request-timeout", "60", "--workers", "2", "--generation-database", "none"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


REQUESTS, CLIENTS = 2000, 32


def test_no_request_is_lost_under_load(aws, stack):
    """32 clients; throttled calls are retried with growing pauses, as an AWS client does."""
    endpoint, urls = stack
    wanted = [
        (colour, kind)
        for _ in range(REQUESTS // 6)
        for colour in COLOURS
        for kind in ("url", "raw")
    ]
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=CLIENTS))

    def ask(job: tuple[str, str]) -> tuple[str, int]:
        colour, kind = job
        arguments = (
            {"json": {"url": urls[colour]}}
            if kind == "url"
            else {"data": png(colour), "headers": {"Content-Type": "image/png"}}
        )
        for attempt in range(60):
            answer = session.post(endpoint, timeout=120, **arguments)
            if answer.status_code not in (429, 503) or "error" in answer.json():
                break
            time.sleep(min(2.0, 0.05 * 2**attempt))
        right = answer.status_code == 200 and answer.json()["class"] == COLOURS[colour]
        return ("right" if right else f"{answer.status_code} {answer.text[:200]}"), attempt

    with ThreadPoolExecutor(CLIENTS) as clients:
        results = list(clients.map(ask, wanted))
    counts = collections.Counter(outcome for outcome, _ in results)
    assert counts == {"right": len(wanted)}, counts
