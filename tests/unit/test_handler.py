"""The contract of pytorch/app.py, with a real model, real images and a real web server."""

import base64
import io
import json
import logging
import socket
import time

import numpy as np
import pytest
from conftest import Context, archive, png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app
import fetch
import images
import loading
import model
from errors import ModelError, RequestError
from events import MAX_BATCH, parse

CLASSES = {"red": "red", "lime": "green", "blue": "blue"}


@pytest.fixture
def ready(members, monkeypatch):
    """A handler with the tiny model loaded, as after INIT."""
    loaded = model.Model.from_archive(io.BytesIO(archive(members)), "s3://bucket/model.tar.gz")
    monkeypatch.setattr(loading, "environment", loading.Environment(model=loaded))
    return loaded


def handle(event, context=None):
    response = app.lambda_handler(event, context or Context())
    assert set(response) == {"statusCode", "headers", "body"}
    body = json.loads(response["body"], parse_constant=pytest.fail)
    if response["statusCode"] != 200:
        assert set(body) == {"error"}
        assert set(body["error"]) == {"code", "message", "request_id"}
        assert body["error"]["message"].endswith(".")
    return response["statusCode"], body


def call(body, **event):
    return handle({"body": body, **event})


def ask(url, **fields):
    return call(json.dumps({"url": url, **fields}))


def v1(method="POST", path="/invocations", body=None, headers=None, binary=False):
    """An event of a REST API: payload format 1.0."""
    return {
        "version": "1.0", "resource": path, "path": path, "httpMethod": method,
        "headers": headers, "multiValueHeaders": None, "queryStringParameters": None,
        "requestContext": {"httpMethod": method, "path": f"/Prod{path}", "stage": "Prod"},
        "body": body, "isBase64Encoded": binary,
    }  # fmt: skip


def v2(method="POST", path="/invocations", body=None, headers=None, binary=False):
    """An event of an HTTP API or a Function URL: payload format 2.0."""
    event = {
        "version": "2.0", "routeKey": "$default", "rawPath": path, "rawQueryString": "",
        "headers": headers or {}, "isBase64Encoded": binary,
        "requestContext": {"http": {"method": method, "path": path, "protocol": "HTTP/1.1"}},
    }  # fmt: skip
    return event | ({} if body is None else {"body": body})


@pytest.mark.parametrize("colour", CLASSES)
def test_answers_class_and_confidence_only(ready, web, colour):
    status, body = ask(web.serve("/image", png(colour)))
    assert status == 200
    assert list(body) == ["class", "confidence"]
    assert body["class"] == CLASSES[colour]
    assert 0.9 < body["confidence"] <= 1


def test_response_is_a_json_proxy_response(ready, web):
    event = {"body": json.dumps({"url": web.serve("/image", png("red"))})}
    response = app.lambda_handler(event, Context())
    assert response["headers"]["Content-Type"] == "application/json"
    assert isinstance(response["body"], str)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_reads_common_formats(ready, web, form):
    assert ask(web.serve("/image", png("blue", form=form)))[1]["class"] == "blue"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_reads_all_modes(ready, web, mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert ask(web.serve("/image", png(0, mode=mode, form=form)))[0] == 200


@pytest.mark.parametrize("make", [v1, v2])
class TestEventsOfBothFormats:
    def test_json(self, ready, web, make):
        body = json.dumps({"url": web.serve("/image", png("red"))})
        assert handle(make(body=body))[1]["class"] == "red"

    def test_json_in_base64(self, ready, web, make):
        body = base64.b64encode(json.dumps({"url": web.serve("/image", png("red"))}).encode())
        assert handle(make(body=body.decode(), binary=True))[1]["class"] == "red"
        assert handle(make(body="%%%", binary=True))[0] == 400

    @pytest.mark.parametrize(
        "content_type",
        ["image/png", "image/whatever", "application/octet-stream", "IMAGE/PNG; a=b"],
    )
    def test_an_image_as_the_body(self, ready, make, content_type):
        body = base64.b64encode(png("lime")).decode()
        event = make(body=body, headers={"Content-Type": content_type}, binary=True)
        assert handle(event)[1]["class"] == "green"

    def test_an_image_that_came_as_text_is_lost(self, ready, make):
        event = make(body="\ufffdPNG", headers={"content-type": "image/png"})
        assert handle(event)[1]["error"]["code"] == "not_binary"

    @pytest.mark.parametrize("path", ["/health", "/Prod/health", "/base/path/health/"])
    def test_health(self, ready, make, path):
        status, body = handle(make("GET", path))
        assert (status, body["status"], body["sha256"]) == (200, "ready", ready.sha256)
        assert set(body) == {"status", "model", "version", "sha256", "classes", "torch"}

    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/invocations", 405),
            ("GET", "/", 405),
            ("POST", "/health", 405),
            ("DELETE", "/invocations", 405),
            ("HEAD", "/health", 405),
            ("post", "/invocations", 405),
            ("POST", "/invocation", 404),
            ("GET", "/favicon.ico", 404),
            ("GET", "/health/../admin", 404),
            ("GET", "/.env", 404),
        ],
    )
    def test_other_routes(self, ready, make, method, path, status):
        answer = app.lambda_handler(make(method, path, body="{}"), None)
        assert answer["statusCode"] == status
        expected = "GET" if path == "/health" else "POST"
        assert answer["headers"].get("Allow") == (expected if status == 405 else None)

    def test_the_root_of_a_function_url(self, ready, web, make):
        body = json.dumps({"url": web.serve("/image", png("red"))})
        assert handle(make(path="/", body=body))[0] == 200


def test_a_direct_invocation_is_the_request_itself(ready, web):
    assert handle({"url": web.serve("/image", png("red"))})[1]["class"] == "red"
    assert handle({"image": base64.b64encode(png("blue")).decode(), "top_k": 1})[0] == 200


def test_an_image_in_base64(ready):
    body = json.dumps({"image": base64.b64encode(png("blue")).decode()})
    assert call(body)[1]["class"] == "blue"


def test_top_k_gives_the_best_classes_in_order(ready, web):
    url = web.serve("/image", png((200, 100, 0)))
    status, body = ask(url, top_k=2)
    assert status == 200
    assert [entry["class"] for entry in body["top_k"]] == ["red", "green"]
    assert body["top_k"][0] == {"class": body["class"], "confidence": body["confidence"]}
    assert len(ask(url, top_k=1000)[1]["top_k"]) == 3


def test_a_batch_is_one_call_of_the_model(ready, web, monkeypatch):
    calls = []
    predict = ready.predict_batch
    monkeypatch.setattr(ready, "predict_batch", lambda x: calls.append(x.shape) or predict(x))
    urls = [web.serve(f"/{colour}", png(colour)) for colour in CLASSES]
    status, body = call(json.dumps({"urls": urls}))
    assert status == 200
    assert [entry["class"] for entry in body["predictions"]] == list(CLASSES.values())
    assert calls == [(3, 3, 224, 224)]


def test_one_bad_address_does_not_spoil_a_batch(ready, web):
    good = web.serve("/image", png("red"))
    bad = [
        web.serve("/text", b"text"),
        "http://10.0.0.1/",
        "nonsense",
        web.serve("/404", status=404),
    ]
    status, body = call(json.dumps({"urls": [good, *bad, good]}))
    assert status == 200
    first, *failed, last = body["predictions"]
    assert first == last and first["class"] == "red"
    codes = ["not_an_image", "address_not_allowed", "bad_url", "fetch_failed"]
    assert [entry["error"]["code"] for entry in failed] == codes
    assert all(set(entry["error"]) == {"code", "message"} for entry in failed)


def test_a_batch_of_bad_addresses_only_does_without_the_model(ready):
    status, body = call(json.dumps({"urls": ["http://10.0.0.1/"], "top_k": 2}))
    assert status == 200
    assert body["predictions"][0]["error"]["code"] == "address_not_allowed"


def test_a_batch_may_have_so_many_and_no_more(ready, web):
    url = web.serve("/image", png("red"))
    assert len(call(json.dumps({"urls": [url] * MAX_BATCH}))[1]["predictions"]) == MAX_BATCH
    assert call(json.dumps({"urls": [url] * (MAX_BATCH + 1)}))[0] == 413


BAD = [
    (None, "no_body"),
    ("", "no_body"),
    ("{", "bad_json"),
    (b"\xff\xfe", "bad_json"),
    (17, "bad_json"),
    ([], "no_body"),
    (["{}"], "bad_json"),
    ({"url": "http://a"}, "bad_json"),
    ("\ud800", "bad_json"),
    ("[" * 100_000, "bad_json"),
    ('{"url":' * 50_000, "bad_json"),
    ("1" * 10_000, "bad_json"),
    ('{"top_k": ' + "1" * 10_000 + "}", "bad_json"),
    ('{"url": NaN}', "bad_json"),
    ('{"url": Infinity}', "bad_json"),
    ("{'url': 'http://a'}", "bad_json"),
    ("url=http://a", "bad_json"),
    ("\ufeff{}", "no_url"),
    ("null", "no_url"),
    ("true", "no_url"),
    ("1", "no_url"),
    ("[]", "no_url"),
    ('"http://a"', "no_url"),
    ('["http://a"]', "no_url"),
    ("{}", "no_url"),
    ('{"top_k": 1}', "no_url"),
    ('{"URL": "http://a"}', "unknown_field"),
    ('{"uri": "http://a"}', "unknown_field"),
    ('{"url": "http://a", "topk": 3}', "unknown_field"),
    ('{"": ""}', "unknown_field"),
    ('{"url": "http://a", "image": ""}', "ambiguous"),
    ('{"url": "http://a", "urls": []}', "ambiguous"),
    ('{"image": "", "urls": []}', "ambiguous"),
    ('{"url": null}', "no_url"),
    ('{"url": 1}', "no_url"),
    ('{"url": true}', "no_url"),
    ('{"url": {}}', "no_url"),
    ('{"url": ["http://a"]}', "no_url"),
    ('{"url": ""}', "no_url"),
    ('{"urls": null}', "no_urls"),
    ('{"urls": "http://a"}', "no_urls"),
    ('{"urls": {}}', "no_urls"),
    ('{"urls": []}', "no_urls"),
    ('{"urls": [1]}', "no_urls"),
    ('{"urls": [null]}', "no_urls"),
    ('{"urls": [""]}', "no_urls"),
    ('{"urls": [["http://a"]]}', "no_urls"),
    ('{"image": null}', "no_image"),
    ('{"image": ""}', "no_image"),
    ('{"image": 1}', "no_image"),
    ('{"image": []}', "no_image"),
    ('{"image": "%%%"}', "bad_base64"),
    ('{"image": "YQ"}', "bad_base64"),
    ('{"image": "YWJj\\n"}', "bad_base64"),
    ('{"image": "data:image/png;base64,YWJj"}', "bad_base64"),
    ('{"image": "ü"}', "bad_base64"),
    *(
        (f'{{"url": "http://a", "top_k": {value}}}', "bad_top_k")
        for value in ("0", "-1", "1001", "1e9", "1.0", "true", "null", '"3"', "[]", "{}", "9" * 99)
    ),
    ('{"url": "dog.jpg"}', "bad_url"),
    ('{"url": "file:///etc/passwd"}', "bad_url"),
    ('{"url": "ftp://127.0.0.1/a"}', "bad_url"),
    ('{"url": "http://"}', "bad_url"),
    ('{"url": "http://[::1"}', "bad_url"),
    ('{"url": "http://a..b/"}', "bad_url"),
    ('{"url": "http://127.0.0.1:99999/"}', "bad_url"),
    ('{"url": "\\ud800"}', "bad_url"),
    ('{"url": "http://a.com/\\u0000"}', "bad_url"),
]


@pytest.mark.parametrize(("body", "code"), BAD)
def test_bad_request_is_a_400_with_a_sentence(ready, body, code):
    status, answer = call(body)
    assert (status, answer["error"]["code"]) == (400, code)
    assert answer["error"]["request_id"] == Context.aws_request_id


@pytest.mark.parametrize(
    "event",
    [
        *(None, [], "text", 1, {}, {"body": None}, {"httpMethod": None}, {"requestContext": None}),
        {"requestContext": {"http": None}, "body": "{}"},
        {"requestContext": {"http": {}}, "body": "{}"},
        {"httpMethod": "POST", "path": 17, "body": "{}"},
        {"httpMethod": "POST", "headers": [], "body": "{}"},
        {"httpMethod": "POST", "headers": {"Content-Type": None}, "body": "{}"},
        {"httpMethod": "POST", "body": "{}", "isBase64Encoded": "yes"},
        {"httpMethod": "POST", "body": {}, "isBase64Encoded": True},
        {"Records": [{"eventSource": "aws:s3"}]},
        {"source": "aws.events"},
    ],
)
def test_an_event_that_is_no_request_is_a_4xx(ready, event):
    assert handle(event)[0] in (400, 404, 405)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["body", "headers", "httpMethod", "path", "requestContext", "rawPath"])
FIELDS = st.sampled_from(["url", "urls", "image", "top_k"])


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.one_of(JSON, st.dictionaries(NAMES | st.text(), JSON, max_size=5)))
def test_any_event_is_answered_with_a_4xx(ready, event):
    assert 400 <= handle(event)[0] < 500


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(FIELDS, JSON, max_size=3))
def test_any_fields_are_answered_without_a_5xx(ready, fields):
    assert handle(v1(body=json.dumps(fields)))[0] in (200, 400, 403, 413, 415)


@given(st.text())
def test_any_text_is_no_request(text):
    with pytest.raises(RequestError) as caught:
        parse({"body": text})
    assert caught.value.status == 400


def test_a_private_address_is_a_403(ready, web, monkeypatch):
    url = web.serve("/image", png("red"))
    monkeypatch.setenv("ALLOW_PRIVATE_HOSTS", "")
    status, body = ask(url)
    assert (status, body["error"]["code"]) == (403, "address_not_allowed")
    assert "127.0.0.1" not in json.dumps(body)


def test_an_address_where_nobody_answers_is_a_502(ready, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("ALLOW_PRIVATE_HOSTS", place)
        status, body = ask(f"http://{place}/")
    assert (status, body["error"]["code"]) == (502, "fetch_failed")


def test_the_other_servers_error_is_a_502(ready, web):
    status, body = ask(web.serve("/image", status=404))
    assert (status, body["error"]["code"]) == (502, "fetch_failed")


@pytest.fixture
def silent(monkeypatch):
    """The address of a server that accepts and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("ALLOW_PRIVATE_HOSTS", place)
        yield f"http://{place}/"


def test_a_slow_server_is_a_504(ready, silent, monkeypatch):
    monkeypatch.setattr(app, "ANSWER_WITHIN", 0.2)
    status, body = ask(silent)
    assert (status, body["error"]["code"]) == (504, "fetch_timeout")


def test_the_answer_is_there_before_the_function_is_ended(ready, silent):
    started = time.monotonic()
    status, _ = handle({"url": silent}, Context(remaining=1500))
    assert status == 504
    assert time.monotonic() - started < 1


def test_with_no_time_left_a_504_at_once(ready, web):
    event = {"url": web.serve("/image", png("red"))}
    assert handle(event, Context(remaining=0))[0] == 504


def test_images_that_there_is_no_time_to_decode_are_a_504(ready, monkeypatch):
    monkeypatch.setattr(app, "ANSWER_WITHIN", 0.0)
    body = json.dumps({"image": base64.b64encode(png("red")).decode()})
    assert call(body)[1]["error"]["code"] == "too_slow"


def test_the_gateways_limit_is_kept():
    assert app.ANSWER_WITHIN < 29
    assert app.seconds_for(None) == app.seconds_for(Context()) == app.ANSWER_WITHIN
    assert app.seconds_for(Context(remaining=10_000)) == 9


def test_too_many_bytes_are_a_413(ready, web, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 1000)
    status, body = ask(web.serve("/image", b"a" * 1001))
    assert (status, body["error"]["code"]) == (413, "too_large")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [40 * 30 - 1, 40 * 30 // 3])
def test_too_many_pixels_are_a_413(ready, web, monkeypatch, limit):
    monkeypatch.setattr(images, "MAX_PIXELS", limit)
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", limit)
    status, body = ask(web.serve("/image", png("red", size=(40, 30))))
    assert (status, body["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"\x89PNG", b"GIF89a", png("red", form="TIFF")]
)
def test_what_is_no_image_is_a_415(ready, web, content):
    status, body = ask(web.serve("/image", content))
    assert (status, body["error"]["code"]) == (415, "not_an_image")


def test_half_an_image_is_a_422(ready, web):
    status, body = ask(web.serve("/image", png("red", size=(400, 300))[:-200]))
    assert (status, body["error"]["code"]) == (422, "broken_image")


def test_an_image_that_cannot_be_scaled_is_a_422(ready, web):
    status, body = ask(web.serve("/image", png("red", size=(1, 60_000))))
    assert (status, body["error"]["code"]) == (422, "unusable_image")


def test_a_model_whose_output_is_not_finite_is_a_503(ready, web, monkeypatch):
    monkeypatch.setattr(ready, "predict_batch", lambda x: np.full((len(x), 3), np.nan, np.float32))
    status, body = ask(web.serve("/image", png("red")))
    assert (status, body["error"]["code"]) == (503, "model_failed")


class TestLoading:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        monkeypatch.setattr(loading, "environment", loading.Environment())
        monkeypatch.delenv("MODEL_BUCKET", raising=False)

    @staticmethod
    def from_s3(monkeypatch, *outcomes):
        """`Model.from_s3` with these outcomes, one a call; gives the list of calls."""
        calls = []

        def load(bucket, key):
            calls.append((bucket, key))
            outcome = outcomes[min(len(calls), len(outcomes)) - 1]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(model.Model, "from_s3", load)
        return calls

    def test_without_a_model_a_503_and_the_reason_in_the_log(self, web, capsys):
        status, body = ask(web.serve("/image", png("red")))
        assert (status, body["error"]["code"]) == (503, "model_not_configured")
        assert "MODEL_BUCKET" not in json.dumps(body)
        line = json.loads(capsys.readouterr().out.splitlines()[0])
        assert (line["level"], line["error"]) == ("ERROR", "model_not_configured")
        assert "MODEL_BUCKET" in line["detail"]

    @pytest.mark.parametrize(
        "code", ["model_not_found", "model_access_denied", "model_archive_invalid", "model_failed"]
    )
    def test_a_failure_is_kept_and_costs_one_load_and_one_line(self, monkeypatch, capsys, code):
        calls = self.from_s3(monkeypatch, ModelError(code, "wrong"))
        for _ in range(5):
            assert ask("http://a.example/")[1]["error"]["code"] == code
            assert handle(v1("GET", "/health"))[0] == 503
        assert len(calls) == 1
        assert capsys.readouterr().out.count("model not loaded") == 1

    def test_a_mistake_of_the_client_is_still_one_without_a_model(self, monkeypatch):
        self.from_s3(monkeypatch, ModelError("model_not_found", "wrong"))
        assert call("{")[0] == 400

    def test_an_s3_that_did_not_answer_is_asked_again_after_a_while(self, ready, monkeypatch):
        loaded = ready
        monkeypatch.setattr(loading, "environment", loading.Environment())
        calls = self.from_s3(monkeypatch, ModelError("model_unavailable", "no answer"), loaded)
        now = time.monotonic()
        monkeypatch.setattr(loading.time, "monotonic", lambda: now)
        assert handle(v1("GET", "/health"))[1]["error"]["code"] == "model_unavailable"
        assert handle(v1("GET", "/health"))[0] == 503
        assert len(calls) == 1
        now += loading.RETRY_AFTER
        assert handle(v1("GET", "/health"))[0] == 200
        assert handle(v1("GET", "/health"))[0] == 200
        assert len(calls) == 2

    def test_an_unforeseen_error_while_loading_is_no_crash(self, monkeypatch, capsys):
        self.from_s3(monkeypatch, RuntimeError("surprise"))
        assert handle(v1("GET", "/health"))[1]["error"]["code"] == "model_failed"
        assert "surprise" in capsys.readouterr().out

    def test_it_is_loaded_once(self, ready, monkeypatch):
        monkeypatch.setattr(loading, "environment", loading.Environment())
        calls = self.from_s3(monkeypatch, ready)
        assert loading.get_model() is loading.get_model() is ready
        assert len(calls) == 1


def test_an_unforeseen_error_is_a_500_without_details(ready, web, monkeypatch, caplog):
    def fail(data):
        raise RuntimeError("secret path")

    monkeypatch.setattr(app, "load_image", fail)
    status, body = ask(web.serve("/image", png("red")))
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "secret" not in json.dumps(body)
    assert "secret path" in caplog.text


class TestLog:
    @staticmethod
    def lines(capsys):
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    def test_a_request_is_one_line_of_json_with_its_timings(self, ready, web, capsys):
        ask(web.serve("/image", png("red")))
        (line,) = self.lines(capsys)
        assert (line["level"], line["message"], line["status"]) == ("INFO", "request", 200)
        assert line["request_id"] == Context.aws_request_id
        for name in ("fetch_ms", "decode_ms", "preprocess_ms", "predict_ms", "latency_ms"):
            assert line[name] >= 0
        assert line["latency_ms"] >= line["fetch_ms"] + line["predict_ms"]

    def test_the_line_is_in_the_embedded_metric_format(self, ready, web, capsys, monkeypatch):
        monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "a-function")
        ask(web.serve("/image", png("red")))
        (line,) = self.lines(capsys)
        assert abs(line["_aws"]["Timestamp"] / 1000 - time.time()) < 60
        (directive,) = line["_aws"]["CloudWatchMetrics"]
        assert directive["Dimensions"] == [["function_name"]]
        assert line["function_name"] == "a-function"
        names = [metric["Name"] for metric in directive["Metrics"]]
        assert names == ["latency_ms", "fetch_ms", "predict_ms", "cold_start"]
        assert all(type(line[name]) in (int, float) for name in names)

    def test_only_the_first_request_is_a_cold_start(self, ready, monkeypatch, capsys):
        monkeypatch.setattr(app, "requests", app.itertools.count())
        call("{")
        call("{")
        assert [line["cold_start"] for line in self.lines(capsys)] == [1, 0]

    def test_errors_name_their_code(self, ready, capsys):
        call("{")
        (line,) = self.lines(capsys)
        assert (line["status"], line["error"]) == (400, "bad_json")

    def test_there_is_no_address_no_image_and_no_credential(self, ready, web, capsys, caplog):
        caplog.set_level(logging.DEBUG, logger="app")
        secret = "X-Amz-Signature=0123456789abcdef"
        for path in (f"/image?{secret}", f"/broken?{secret}", f"/missing?{secret}"):
            content = {"i": png("red"), "b": b"nothing"}.get(path[1])
            ask(web.serve(path, content or b"", status=200 if content else 404))
        ask(f"http://user:{secret}@a.com/?{secret}")
        ask(f"http://10.0.0.1/?{secret}")
        image = base64.b64encode(png("red")).decode()
        call(json.dumps({"image": image}))
        logged = capsys.readouterr().out + caplog.text
        assert "0123456789abcdef" not in logged and image[:40] not in logged

    def test_an_address_in_an_exception_loses_its_query(self, ready, monkeypatch, capsys):
        def fail(data):
            raise RuntimeError("https://bucket.example/key?X-Amz-Signature=abc&x=1 'and' more")

        monkeypatch.setattr(app, "load_image", fail)
        call(json.dumps({"image": base64.b64encode(png("red")).decode()}))
        line, _ = self.lines(capsys)
        assert "X-Amz-Signature" not in line["exception"]
        assert "https://bucket.example/key?… 'and' more" in line["exception"]
