"""The contract of pytorch/app.py, with a real model, real images and a real web server."""

import base64
import io
import json
import logging
import socket

import pytest
from conftest import Context, png

import app
import fetch
import images
import loading
import model


@pytest.fixture
def ready(members, monkeypatch):
    """A handler with the tiny model loaded, as after INIT."""
    from conftest import archive

    loaded = model.Model.from_archive(io.BytesIO(archive(members)), "test bundle")
    monkeypatch.setattr(loading, "environment", loading.Environment(model=loaded))


def call(body, **event):
    response = app.lambda_handler({"body": body, **event}, Context())
    return response["statusCode"], json.loads(response["body"])


def ask(url):
    return call(json.dumps({"url": url}))


@pytest.mark.parametrize("colour", ["red", "lime", "blue"])
def test_answers_class_and_confidence_only(ready, web, colour):
    status, body = ask(web.serve("/image", png(colour)))
    assert status == 200
    assert set(body) == {"class", "confidence"}
    assert body["class"] == {"lime": "green"}.get(colour, colour)
    assert 0.9 < body["confidence"] <= 1


def test_response_is_a_json_proxy_response(ready, web):
    event = {"body": json.dumps({"url": web.serve("/image", png("red"))})}
    response = app.lambda_handler(event, Context())
    assert response["headers"]["Content-Type"] == "application/json"
    assert isinstance(response["body"], str)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_reads_common_formats(ready, web, form):
    assert ask(web.serve("/image", png("blue", form=form)))[1]["class"] == "blue"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_reads_all_modes(ready, web, mode):
    form = "TIFF" if mode == "CMYK" else "PNG"
    assert ask(web.serve("/image", png(0, mode=mode, form=form)))[0] == 200


def test_body_may_be_base64(ready, web):
    body = json.dumps({"url": web.serve("/image", png("red"))}).encode()
    assert call(base64.b64encode(body).decode(), isBase64Encoded=True)[0] == 200
    assert call("%%%", isBase64Encoded=True)[0] == 400


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (None, "no_body"),
        ("", "no_body"),
        ("{", "bad_json"),
        (b"\xff\xfe", "bad_json"),
        (17, "bad_json"),
        ("[" * 100_000, "bad_json"),
        ("null", "no_url"),
        ("[]", "no_url"),
        ('"http://a"', "no_url"),
        ("{}", "no_url"),
        ('{"url": null}', "no_url"),
        ('{"url": ["http://a"]}', "no_url"),
        ('{"url": ""}', "no_url"),
        ('{"url": "dog.jpg"}', "bad_url"),
        ('{"url": "file:///etc/passwd"}', "bad_url"),
        ('{"url": "ftp://127.0.0.1/a"}', "bad_url"),
        ('{"url": "http://"}', "bad_url"),
        ('{"url": "http://[::1"}', "bad_url"),
        ('{"url": "http://a..b/"}', "bad_url"),
        ('{"url": "http://127.0.0.1:99999/"}', "bad_url"),
    ],
)
def test_bad_request_is_a_400_with_a_sentence(ready, body, code):
    status, answer = call(body)
    assert (status, answer["error"]["code"]) == (400, code)
    assert answer["error"]["message"].endswith(".")
    assert answer["error"]["request_id"] == Context.aws_request_id


@pytest.mark.parametrize("event", [None, [], "text", {}, {"body": None}])
def test_an_event_that_is_no_event_is_a_400(event):
    assert app.lambda_handler(event, Context())["statusCode"] == 400


def test_an_address_where_nobody_answers_is_a_502(ready):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        status, body = ask(f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert (status, body["error"]["code"]) == (502, "fetch_failed")


def test_the_other_servers_error_is_a_502(ready, web):
    status, body = ask(web.serve("/image", status=404))
    assert (status, body["error"]["code"]) == (502, "fetch_failed")


def test_a_slow_server_is_a_504(ready, monkeypatch):
    monkeypatch.setattr(fetch, "READ_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        status, body = ask(f"http://127.0.0.1:{silent.getsockname()[1]}/")
    assert (status, body["error"]["code"]) == (504, "fetch_timeout")


def test_a_dripping_server_is_a_504(ready, web, monkeypatch):
    monkeypatch.setattr(fetch, "TOTAL_TIMEOUT", 0)
    status, body = ask(web.serve("/image", chunks=[b"a", b"b"]))
    assert (status, body["error"]["code"]) == (504, "fetch_timeout")


def test_too_many_bytes_are_a_413(ready, web, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 1000)
    status, body = ask(web.serve("/image", b"a" * 1001))
    assert (status, body["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize("limit", [40 * 30 - 1, 40 * 30 // 3])
def test_too_many_pixels_are_a_413(ready, web, monkeypatch, limit):
    monkeypatch.setattr(images, "MAX_PIXELS", limit)
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", limit)
    status, body = ask(web.serve("/image", png("red", size=(40, 30))))
    assert (status, body["error"]["code"]) == (413, "too_large")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG", b"GIF89a"])
def test_what_is_no_image_is_a_415(ready, web, content):
    status, body = ask(web.serve("/image", content))
    assert (status, body["error"]["code"]) == (415, "not_an_image")


def test_half_an_image_is_a_422(ready, web):
    status, body = ask(web.serve("/image", png("red", size=(400, 300))[:-200]))
    assert (status, body["error"]["code"]) == (422, "broken_image")


def test_without_a_model_a_503_and_the_reason_in_the_log(web, monkeypatch, caplog):
    monkeypatch.delenv("MODEL_BUCKET", raising=False)
    status, body = ask(web.serve("/image", png("red")))
    assert (status, body["error"]["code"]) == (503, "model_unavailable")
    assert "MODEL_BUCKET" not in json.dumps(body)
    assert "MODEL_BUCKET" in caplog.text


def test_an_unforeseen_error_is_a_500_without_details(ready, web, monkeypatch, caplog):
    def fail(data):
        raise RuntimeError("secret path")

    monkeypatch.setattr(app, "load_image", fail)
    status, body = ask(web.serve("/image", png("red")))
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "secret" not in json.dumps(body)
    assert "secret path" in caplog.text


def test_the_log_has_no_address(ready, web, caplog):
    caplog.set_level(logging.DEBUG, logger="app")
    ask(web.serve("/image?token=secret", png("red")))
    ask(web.serve("/broken?token=secret", b"nothing"))
    assert "predict_ms" in caplog.text
    assert "secret" not in caplog.text
