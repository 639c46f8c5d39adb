"""openapi.yaml says what the code does and what the template deploys."""

import json
import re

import pytest
import yaml
from openapi_spec_validator import validate

import events
import fetch
import images
from local.paths import ROOT

DOCUMENT = yaml.safe_load((ROOT / "openapi.yaml").read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]


class Template(yaml.SafeLoader):
    """CloudFormation's short forms (`!Ref x`, `!Sub …`) as plain values."""


Template.add_multi_constructor(
    "!",
    lambda loader, suffix, node: (
        loader.construct_scalar(node)
        if isinstance(node, yaml.ScalarNode)
        else loader.construct_sequence(node, deep=True)
    ),
)
TEMPLATE = yaml.load((ROOT / "template.yaml").read_text(), Template)
FUNCTION = TEMPLATE["Resources"]["PyTorchFunction"]["Properties"]


def test_the_document_is_valid_openapi():
    validate(DOCUMENT)


def test_the_template_deploys_the_documented_routes_and_no_others():
    deployed = {
        (event["Properties"]["Path"], event["Properties"]["Method"])
        for event in FUNCTION["Events"].values()
    }
    documented = {(path, method) for path, item in DOCUMENT["paths"].items() for method in item}
    assert deployed == documented


def test_the_documented_bodies_arrive_as_binary():
    types = TEMPLATE["Globals"]["Api"]["BinaryMediaTypes"]
    documented = set(DOCUMENT["paths"]["/invocations"]["post"]["requestBody"]["content"])
    assert set(types) == documented - {"application/json"}


def test_the_documented_limits_are_the_codes():
    properties = SCHEMAS["Request"]["properties"]
    assert set(properties) == set(events.FIELDS)
    assert properties["urls"]["maxItems"] == events.MAX_BATCH
    assert properties["top_k"]["maximum"] == events.MAX_TOP_K
    text = SCHEMAS["Image"]["description"]
    for number in (fetch.MAX_BYTES, images.MAX_PIXELS, images.MAX_WEBP_PIXELS):
        assert f"{number:,}" in text
    assert f"{images.MAX_SCANS} scans" in json.dumps(DOCUMENT)


def test_every_code_is_documented_with_its_status():
    documented = {}
    for path in DOCUMENT["paths"].values():
        for method in path.values():
            for status, response in method["responses"].items():
                name = response.get("$ref", "").rpartition("/")[2]
                text = DOCUMENT["components"]["responses"].get(name, {}).get("description", "")
                documented.setdefault(status, "")
                documented[status] += text
    source = "".join(path.read_text() for path in (ROOT / "pytorch").glob("*.py"))
    raised = re.findall(r'RequestError\(\s*(\d{3}),\s*"(\w+)"', source)
    assert len(raised) > 20
    # What only a Function URL or a direct invocation can meet: other routes, other events.
    elsewhere = {"not_found", "method_not_allowed", "bad_event"}
    for status, code in raised:
        assert code in elsewhere or code in documented[status], (status, code)


@pytest.mark.parametrize("name", ["event.json", *(p.name for p in ROOT.glob("events/*.json"))])
def test_the_example_events_are_requests(name):
    path = ROOT / name if name == "event.json" else ROOT / "events" / name
    events.parse(json.loads(path.read_text()))


def test_what_opens_something_is_off_by_default():
    parameters = TEMPLATE["Parameters"]
    for name in ("AllowPrivateHosts", "AllowedHosts", "ImageBucket", "ModelSha256"):
        assert parameters[name]["Default"] == "", name
    assert parameters["Tracing"]["Default"] == "PassThrough"


def test_the_functions_variables_are_those_that_the_code_reads():
    source = "".join(path.read_text() for path in (ROOT / "pytorch").glob("*.py"))
    read = set(re.findall(r'(?:environ\.get\(|environ\[|_listed\()"([A-Z0-9_]+)"', source))
    given = set(FUNCTION["Environment"]["Variables"])
    assert read - {"AWS_LAMBDA_FUNCTION_NAME"} <= given
