"""Downloads from servers that mean no good: slow, endless, lying, redirecting, exploding."""

import contextlib
import gzip
import io
import socket
import ssl
import threading
import time
import zlib
from types import SimpleNamespace

import pytest
import trustme
from botocore.response import StreamingBody
from botocore.stub import ANY, Stubber
from conftest import png

import fetch as module
from errors import RequestError
from fetch import MAX_BYTES, fetch, fetch_all

SOON = 0.6  # seconds: the deadline of what never ends


@pytest.fixture
def raw(monkeypatch):
    """A server that does with each connection what it is told; gives its address.

    `raw(serve)` calls `serve(socket, request)`, in a thread of its own, for each request.
    """
    servers = []

    def start(serve) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def talk(peer):
            with peer:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += peer.recv(65536) or b"\r\n\r\n"
                with contextlib.suppress(OSError):  # the client has had enough
                    serve(peer, request)

        def accept():
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(peer,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        place = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("ALLOW_PRIVATE_HOSTS", place, prepend=",")
        return f"http://{place}/"

    yield start
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def says(*parts: bytes):
    """Sends the parts and closes."""

    def serve(peer, request):
        for part in parts:
            peer.sendall(part)

    return serve


def drips(start: bytes, drop: bytes):
    """Sends `start`, then `drop` ten times a second, for ever."""

    def serve(peer, request):
        peer.sendall(start)
        while True:
            time.sleep(0.1)
            peer.sendall(drop)

    return serve


def floods(start: bytes, wave: bytes):
    """Sends `start`, then `wave` as fast as it is taken, for ever."""

    def serve(peer, request):
        peer.sendall(start)
        while True:
            peer.sendall(wave)

    return serve


def refusal(url: str, seconds: float = 5) -> RequestError:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        fetch(url, started + seconds)
    assert time.monotonic() - started < seconds + 0.5
    return caught.value


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "serve",
    [
        says(OK, b"Content-Length: 5\r\n\r\n", b"image"),
        says(OK, b"\r\n", b"image"),
        says(b"HTTP/1.0 200 OK\r\n\r\nimage"),
        says(OK, b"Transfer-Encoding: chunked\r\n\r\n3\r\nima\r\n2;x=y\r\nge\r\n0\r\nA: b\r\n\r\n"),
        says(b"HTTP/1.1 100 Continue\r\n\r\n", OK, b"Content-Length: 5\r\n\r\nimage"),
        says(OK, b"Content-Length: 5\r\n\r\n", b"image and more than was announced"),
        says(OK, b"Content-Encoding: identity\r\nContent-Length: 5\r\n\r\nimage"),
        says(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\n\r\nimage"),
    ],
)
def test_what_http_allows_is_understood(raw, serve):
    assert fetch(raw(serve), time.monotonic() + 5) == b"image"


@pytest.mark.parametrize(
    "serve",
    [
        lambda peer, request: time.sleep(5),
        drips(b"", b"H"),
        drips(b"HTTP/1.1 200 OK\r\nA: ", b"a"),
        drips(OK, b"A: b\r\n"),
        drips(OK + b"Content-Length: 1000\r\n\r\n", b"a"),
        drips(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        drips(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1"),
        drips(OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"A: b\r\n"),
        drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=[
        *("silent", "drips a status", "drips a header", "drips headers", "drips a body"),
        *("drips chunks", "drips a chunk's size", "drips trailers", "drips 100", "floods 100"),
    ],
)
def test_whatever_a_slow_server_does_it_is_a_504_in_time(raw, serve):
    error = refusal(raw(serve), SOON)
    assert (error.status, error.code) == (504, "fetch_timeout")


@pytest.mark.parametrize(
    "serve",
    [
        floods(OK + b"\r\n", b"a" * 65536),
        floods(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"a" * 65536 + b"\r\n"),
        says(OK, b"Content-Length: 10000001\r\n\r\n"),
        says(OK, b"Content-Length: 99999999999999999999\r\n\r\n"),
        floods(OK + b"Content-Length: -1\r\n\r\n", b"a" * 65536),
    ],
    ids=["endless", "endless chunks", "announced", "announced absurdly", "negative"],
)
def test_too_large_is_a_413_as_soon_as_it_is_known(raw, serve):
    assert refusal(raw(serve)).status == 413


@pytest.mark.parametrize(
    "serve",
    [
        says(b""),
        says(b"\r\n\r\n"),
        says(b"image\r\n\r\n"),
        says(b"HTTP/1.1 abc OK\r\n\r\n"),
        says(b"HTTP/1.1 99999 OK\r\n\r\n"),
        says(b"HTTP/9 200 OK\r\n\r\n"),
        says(b"SSH-2.0-OpenSSH_9.9\r\n"),
        says(b"HTTP/1.1 200 OK\r\n" + b"A: " + b"a" * 70_000 + b"\r\n\r\n"),
        says(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n"),
        floods(OK, b"A: b\r\n"),
        floods(b"HTTP/1.1 ", b"2"),
        says(OK, b"Content-Length: 10\r\n\r\nshort"),
        says(OK, b"Content-Length: 10\r\n\r\n"),
        says(OK, b"Transfer-Encoding: chunked\r\n\r\n5\r\nima"),
        says(OK, b"Transfer-Encoding: chunked\r\n\r\n-5\r\nimage"),
        says(OK, b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nimage"),
        floods(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1"),
        says(OK, b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(10_000_000))),
        says(OK, b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(bytes(10_000_000))),
        says(OK, b"Content-Encoding: br, gzip\r\nContent-Length: 3\r\n\r\nabc"),
        *(says(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode())
          for status in (300, 301, 304, 400, 401, 403, 404, 407, 418, 429, 500, 503, 599)),
    ],
)  # fmt: skip
def test_what_is_no_complete_answer_is_a_502(raw, serve):
    error = refusal(raw(serve))
    assert (error.status, error.code) == (502, "fetch_failed"), error


def test_a_server_that_hangs_up_without_a_word_is_a_502(raw):
    def serve(peer, request):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # resets

    assert refusal(raw(serve)).status == 502


@pytest.fixture
def tls(monkeypatch):
    """A server for https://img.example, on 127.0.0.1; gives its address for a given name."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("img.example").configure_cert(context)
    seen = []
    context.sni_callback = lambda sock, name, context: seen.append(name)
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                peer, _ = server.accept()
                with context.wrap_socket(peer, server_side=True) as encrypted:
                    encrypted.recv(65536)
                    encrypted.sendall(OK + b"Content-Length: 5\r\n\r\nimage")
            except ssl.SSLError:
                pass  # the client did not like the certificate
            except OSError:
                return

    def address(name: str) -> str:
        place = f"{name}:{server.getsockname()[1]}"
        monkeypatch.setenv("ALLOW_PRIVATE_HOSTS", place)
        return f"https://{place}/"

    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, **options: real("127.0.0.1", port, **options)
    )
    threading.Thread(target=serve, daemon=True).start()
    module._tls.cache_clear()
    yield SimpleNamespace(address=address, authority=authority, names=seen)
    module._tls.cache_clear()
    server.shutdown(socket.SHUT_RDWR)
    server.close()


@pytest.fixture
def trusted(tls, monkeypatch, tmp_path):
    tls.authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setattr(module.certifi, "where", lambda: str(tmp_path / "ca.pem"))


def test_https_checks_the_name_in_the_url_on_the_checked_address(tls, trusted):
    assert fetch(tls.address("img.example"), time.monotonic() + 5) == b"image"
    assert tls.names == ["img.example"]


def test_a_certificate_for_another_name_is_a_502(tls, trusted):
    assert refusal(tls.address("other.example")).status == 502


def test_a_certificate_that_nobody_signed_is_a_502(tls):
    assert refusal(tls.address("img.example")).status == 502


def test_https_to_a_server_that_never_shakes_hands_is_a_504(raw):
    url = raw(lambda peer, request: time.sleep(5))
    assert refusal(url.replace("http:", "https:"), SOON).status == 504


def test_the_request_asks_for_nothing_compressed_and_carries_no_secret(raw, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login name password secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []

    def serve(peer, request):
        seen.append(request.decode())
        peer.sendall(OK + b"Content-Length: 5\r\n\r\nimage")

    url = raw(serve)
    fetch(url + "a b?c=d e#f", time.monotonic() + 5)
    lines = seen[0].split("\r\n")
    assert lines[0] == "GET /a%20b?c=d%20e HTTP/1.1"
    assert f"Host: {url.split('/')[2]}" in lines
    assert "Accept-Encoding: identity" in lines
    assert not {"authorization", "cookie"} & {line.split(":")[0].lower() for line in lines}


def redirects(location: str, status: int = 302):
    return says(f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\n\r\n".encode())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(raw, status):
    goal = raw(says(OK, b"Content-Length: 5\r\n\r\nimage"))
    assert fetch(raw(redirects(goal, status)), time.monotonic() + 5) == b"image"


def test_relative_redirects_are_followed(raw):
    def serve(peer, request):
        if request.startswith(b"GET /ima%20ge?x "):
            peer.sendall(OK + b"Content-Length: 5\r\n\r\nimage")
        else:
            peer.sendall(b"HTTP/1.1 302 Found\r\nLocation: /ima ge?x\r\n\r\n")

    assert fetch(raw(serve), time.monotonic() + 5) == b"image"


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/",
        "http://127.0.0.1:1/",
        "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
        "http://[fd00:ec2::254]/latest/meta-data/",
        "//169.254.169.254/",
        "//localhost/",
        "http://2852039166/",
        "http://metadata.google.internal/",
        "http://user@10.0.0.1/",
        "https://[::ffff:169.254.169.254]/",
        "http://10.0.0.1:80/",
    ],
)
@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_to_a_private_address_is_a_403(raw, location, status):
    assert refusal(raw(redirects(location, status))).status == 403


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "gopher://a/", "s3://bucket/key", "http://", "http://[", "http://a..b/"],
)
def test_a_redirect_to_no_http_address_is_a_502(raw, location):
    assert refusal(raw(redirects(location))).status == 502


def test_a_redirect_loop_is_a_502(raw):
    asked = []

    def serve(peer, request):
        asked.append(request)
        peer.sendall(f"HTTP/1.1 302 Found\r\nLocation: /{len(asked)}\r\n\r\n".encode())

    assert refusal(raw(serve)).status == 502
    assert len(asked) == module.MAX_REDIRECTS + 1


def test_redirects_and_reading_share_one_deadline(raw):
    def serve(peer, request):
        time.sleep(0.25)
        peer.sendall(b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n")

    assert refusal(raw(serve), SOON).status == 504


def test_a_batch_is_fetched_at_once_and_each_has_its_own_result(raw):
    def slow(peer, request):
        time.sleep(0.3)
        peer.sendall(OK + b"Content-Length: 5\r\n\r\nimage")

    good, bad = raw(slow), raw(redirects("http://10.0.0.1/"))
    started = time.monotonic()
    results = fetch_all([good, bad, b"bytes", good, good, "nonsense"], started + 5)
    assert time.monotonic() - started < 0.8
    statuses = [getattr(result, "status", result) for result in results]
    assert statuses == [b"image", 403, b"bytes", b"image", b"image", 400]


@pytest.fixture
def s3(monkeypatch):
    """An S3 client whose answers are set by the test."""
    monkeypatch.setenv("IMAGE_BUCKET", "images")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    client = module.boto3.client("s3")
    monkeypatch.setattr(module.boto3, "client", lambda *_, **__: client)
    with Stubber(client) as stubber:
        yield stubber


def body(data: bytes, length: int | None = None) -> dict:
    length = len(data) if length is None else length
    return {"Body": StreamingBody(io.BytesIO(data), length), "ContentLength": length}


def test_an_object_of_the_open_bucket(s3):
    s3.add_response("get_object", body(png("red")), {"Bucket": "images", "Key": "a/b?c.png"})
    assert fetch("s3://images/a/b?c.png", time.monotonic() + 5) == png("red")


def test_another_bucket_is_a_403_and_none_is_asked(s3):
    assert refusal("s3://models/key").status == 403


@pytest.mark.parametrize(
    ("code", "status"),
    [("NoSuchKey", 404), ("AccessDenied", 404), ("SlowDown", 502), ("InternalError", 502)],
)
def test_s3s_errors(s3, code, status):
    s3.add_client_error("get_object", code, expected_params={"Bucket": ANY, "Key": ANY})
    assert refusal("s3://images/key").status == status


def test_a_large_object_is_not_read(s3):
    s3.add_response("get_object", body(b"", MAX_BYTES + 1))
    assert refusal("s3://images/key").status == 413
