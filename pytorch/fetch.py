"""Download of the image that a request points to. Called by app.py."""

import time

import requests

from errors import RequestError

MAX_BYTES = 10_000_000
CONNECT_TIMEOUT = 5  # seconds
READ_TIMEOUT = 10  # seconds without a byte
TOTAL_TIMEOUT = 20  # seconds in all; API Gateway gives up after 29
CHUNK = 65_536  # bytes


def fetch(url: str) -> bytes:
    """The content of an http(s) address: at most MAX_BYTES, within TOTAL_TIMEOUT.

    Raises RequestError: 400 for what is no such address, 413 if it is too large, 502 if the other
    server fails, 504 if it is too slow.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise RequestError(400, "bad_url", "The url is not an http:// or https:// address.")
    deadline = time.monotonic() + TOTAL_TIMEOUT
    data = bytearray()
    try:
        with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
            if not response.ok:
                sentence = f"The image's server answered {response.status_code}."
                raise RequestError(502, "fetch_failed", sentence)
            for chunk in response.iter_content(CHUNK):
                data += chunk
                if len(data) > MAX_BYTES:
                    sentence = f"The image is larger than {MAX_BYTES:,} bytes."
                    raise RequestError(413, "too_large", sentence)
                if time.monotonic() > deadline:
                    raise requests.Timeout
    except requests.Timeout:
        raise RequestError(504, "fetch_timeout", "The image's server is too slow.") from None
    except ValueError:  # of requests, urllib3 and the IDNA codec
        raise RequestError(400, "bad_url", "The url is not a valid address.") from None
    except requests.RequestException:
        raise RequestError(502, "fetch_failed", "The image's server cannot be reached.") from None
    return bytes(data)
