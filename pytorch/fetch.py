"""Downloads the images that a request points to. Called by app.py.

http.client and not `requests`: each step needs its socket. It is connected to an address that
addresses.py has checked, and every wait on it, from the first byte to the last, ends at one
deadline; timeouts per read let a server drip for ever.
"""

import functools
import http.client
import io
import os
import re
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urljoin

import boto3
import botocore.config
import botocore.exceptions
import certifi

from addresses import Address, forbidden, parse, resolve
from errors import RequestError

MAX_BYTES = 10_000_000
MAX_REDIRECTS = 5
CONNECT_TIMEOUT = 5.0  # seconds for each of a name's addresses
CONNECTIONS = 8  # at once, for a batch
CHUNK = 65_536  # bytes
HEADERS = {
    "User-Agent": "notebook-to-lambda/0.1",
    "Accept": "image/*",
    "Accept-Encoding": "identity",  # nothing is decompressed, so nothing can explode
    "Connection": "close",
}
NOT_FOUND = {"NoSuchKey", "NoSuchBucket", "AccessDenied", "404", "403"}


def fetch_all(sources: list[str | bytes], deadline: float) -> list[bytes | RequestError]:
    """The content of each source, or what is wrong with it; bytes are taken as they are."""

    def one(source: str | bytes) -> bytes | RequestError:
        try:
            return source if isinstance(source, bytes) else fetch(source, deadline)
        except RequestError as error:
            return error

    if len(sources) == 1:
        return [one(sources[0])]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(one, sources))


def fetch(url: str, deadline: float) -> bytes:
    """The content of an http(s) or s3 address: at most MAX_BYTES, by `deadline` (time.monotonic).

    Raises RequestError: 400 for what is no such address, 403 if it is not allowed, 404 if S3 does
    not have it, 413 if it is too large, 502 if the other server fails, 504 if it is too slow.
    """
    if url.startswith("s3://"):
        return _fetch_s3(url, deadline)
    address = parse(url)
    for _ in range(MAX_REDIRECTS + 1):
        try:
            answer = _get(address, deadline)
        except TimeoutError:
            raise _too_slow() from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            sentence = "The image's server cannot be reached, or does not speak HTTP."
            raise _failed(sentence, f"{address.host}: {type(error).__name__}") from None
        if isinstance(answer, bytes):
            return answer
        try:
            address = parse(urljoin(f"{address.scheme}://{address.place}{address.target}", answer))
        except (RequestError, ValueError) as error:
            if getattr(error, "status", 400) == 403:
                raise
            raise _failed("The image's server redirects to no valid address.") from None
    raise _failed(f"The image's server redirects more than {MAX_REDIRECTS} times.")


def _get(address: Address, deadline: float) -> bytes | str:
    """One GET: the content, or where it redirects to."""
    connection = http.client.HTTPConnection(address.host, address.port)
    with _connect(address, deadline) as sock:
        connection.sock = Wire(sock, deadline)
        default = address.port == (443 if address.scheme == "https" else 80)
        host = address.place.rpartition(":")[0] if default else address.place
        connection.request("GET", address.target, headers={"Host": host, **HEADERS})
        with connection.getresponse() as response:
            location = response.headers.get("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                return location.encode("latin-1").decode("utf-8", "replace")
            if not 200 <= response.status < 300:
                sentence = f"The image's server answered {response.status}."
                raise _failed(sentence, address.host)
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise _failed("The image's server sent a compressed answer.", address.host)
            return _read(response)


def _read(response: http.client.HTTPResponse) -> bytes:
    """The body, complete. Raises RequestError(413) as soon as it is known to be too large."""
    if (response.length or 0) > MAX_BYTES:
        raise too_large()
    data = bytearray()
    while chunk := response.read(min(CHUNK, MAX_BYTES + 1 - len(data))):
        data += chunk
        if len(data) > MAX_BYTES:
            raise too_large()
    if response.length:  # of what the server had promised
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(data)


def _connect(address: Address, deadline: float) -> socket.socket:
    """A connection to one of the checked addresses, and to no other."""
    failure: OSError = OSError("no address")
    for family, place in resolve(address, deadline):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(min(CONNECT_TIMEOUT, left(deadline)))
            sock.connect(place)
            if address.scheme == "https":
                sock.settimeout(left(deadline))
                return _tls().wrap_socket(sock, server_hostname=address.host)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certifi.where())


class Wire(io.RawIOBase):
    """A connected socket as http.client uses one, of which every wait ends at a deadline."""

    def __init__(self, sock: socket.socket, deadline: float):
        self.sock = sock
        self.deadline = deadline

    def sendall(self, data: bytes) -> None:
        self.sock.settimeout(left(self.deadline))
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self.sock.settimeout(left(self.deadline))
        return self.sock.recv_into(buffer)

    def close(self) -> None:
        """http.client lets go of the connection before it has read the body; _get closes it."""


def left(deadline: float) -> float:
    """Seconds until the deadline. Raises TimeoutError if there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _fetch_s3(url: str, deadline: float) -> bytes:
    """An object of the one bucket that the template's parameter ImageBucket opens."""
    parts = re.fullmatch(r"s3://([a-z0-9.-]{3,63})/(.{1,1024})", url)
    if not parts:
        raise RequestError(400, "bad_url", "An s3 address looks like s3://bucket/key.")
    bucket, key = parts.groups()
    if bucket != os.environ.get("IMAGE_BUCKET"):
        raise forbidden("is of a bucket that this function may not read")
    try:
        seconds = left(deadline)
        config = botocore.config.Config(
            connect_timeout=min(CONNECT_TIMEOUT, seconds),
            read_timeout=seconds,
            retries={"total_max_attempts": 1},
        )
        answer = boto3.client("s3", config=config).get_object(Bucket=bucket, Key=key)
        if answer["ContentLength"] > MAX_BYTES:
            answer["Body"].close()
            raise too_large()
        data = bytearray()
        for chunk in answer["Body"].iter_chunks(CHUNK):
            data += chunk
            left(deadline)
        return bytes(data)
    except (
        TimeoutError,
        botocore.exceptions.ConnectTimeoutError,
        botocore.exceptions.ReadTimeoutError,
    ):
        raise _too_slow() from None
    except botocore.exceptions.ParamValidationError:
        raise RequestError(400, "bad_url", "An s3 address looks like s3://bucket/key.") from None
    except botocore.exceptions.ClientError as error:
        code = error.response["Error"]["Code"]
        if code in NOT_FOUND:
            sentence = "The bucket has no such object, or this function may not read it."
            raise RequestError(404, "image_not_found", sentence, code) from None
        raise _failed("S3 did not give the image.", code) from None
    except botocore.exceptions.BotoCoreError as error:
        raise _failed("S3 did not give the image.", type(error).__name__) from None


def too_large() -> RequestError:
    return RequestError(413, "too_large", f"The image is larger than {MAX_BYTES:,} bytes.")


def _too_slow() -> RequestError:
    return RequestError(504, "fetch_timeout", "The image's server is too slow.")


def _failed(sentence: str, detail: str = "") -> RequestError:
    return RequestError(502, "fetch_failed", sentence, detail)
