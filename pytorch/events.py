"""From a Lambda event to what the client wants. Called by app.py.

Four kinds of events come in: of a REST API (payload format 1.0), of an HTTP API or a Function URL
(2.0), and a direct invocation, whose event is the request itself.
"""

import base64
import json
from dataclasses import dataclass

from errors import RequestError

MAX_BATCH = 16  # images in a request
MAX_TOP_K = 1000
EXAMPLE = 'like {"url": "https://…"}'
FIELDS = ("url", "image", "urls", "top_k")


@dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
        sources: where the images are (addresses), or the images themselves (bytes).
        batch: whether the client sent a list, and so gets one.
        top_k: how many classes to name beside the best, None for none.
        health: whether it only asks for the function's state.
    """

    sources: list[str | bytes]
    batch: bool = False
    top_k: int | None = None
    health: bool = False


def parse(event: object) -> Request:
    """Read an event. Raises RequestError: 400 malformed, 404 and 405 no such route, 413, 415."""
    if not isinstance(event, dict):
        raise RequestError(400, "bad_event", "The event is not a JSON object.")
    if not {"httpMethod", "requestContext", "body"} & event.keys():
        return _from_fields(event)
    if _route(event) == "health":
        return Request([], health=True)
    body = _body(event)
    content_type = _header(event, "content-type").split(";")[0].strip().lower()
    if content_type.startswith("image/") or content_type == "application/octet-stream":
        if not event.get("isBase64Encoded"):
            sentence = "The image's bytes were lost on the way; send it as a JPEG or PNG."
            raise RequestError(415, "not_binary", sentence)
        return Request([body])
    try:
        fields = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RequestError(400, "bad_json", "The body is not valid JSON.") from None
    return _from_fields(fields)


def _route(event: dict) -> str:
    """`invocations` or `health`: the end of the path, before which stages and base paths stand."""
    context = event.get("requestContext")
    http = context.get("http") if isinstance(context, dict) else None
    if isinstance(http, dict):  # payload format 2.0
        method, path = http.get("method"), event.get("rawPath")
    else:
        method, path = event.get("httpMethod", "POST"), event.get("path")
    route = str(path or "").rstrip("/").rpartition("/")[2]
    expected = {"health": "GET", "invocations": "POST", "": "POST"}.get(route)
    if expected is None:
        raise RequestError(404, "not_found", "There is only POST /invocations and GET /health.")
    if method != expected:
        sentence = f"Only {expected} is answered here."
        raise RequestError(405, "method_not_allowed", sentence, headers={"Allow": expected})
    return route


def _header(event: dict, name: str) -> str:
    headers = event.get("headers")
    for key, value in headers.items() if isinstance(headers, dict) else ():
        if key.lower() == name:
            return str(value)
    return ""


def _body(event: dict) -> bytes:
    body = event.get("body")
    if not body:
        raise RequestError(400, "no_body", f"The request has no body; send JSON {EXAMPLE}.")
    try:
        if event.get("isBase64Encoded"):
            return base64.b64decode(body, validate=True)
        return body if isinstance(body, bytes) else body.encode()
    except (AttributeError, TypeError, ValueError):
        raise RequestError(400, "bad_json", "The body is not valid JSON.") from None


def _from_fields(fields: object) -> Request:
    """The request in a JSON object."""
    if not isinstance(fields, dict):
        raise RequestError(400, "no_url", f"The body must be a JSON object {EXAMPLE}.")
    if unknown := sorted(fields.keys() - set(FIELDS)):
        sentence = f"There is no field {unknown[0][:40]!r}, only {', '.join(FIELDS)}."
        raise RequestError(400, "unknown_field", sentence)
    given = [name for name in ("url", "image", "urls") if name in fields]
    if not given:
        raise RequestError(400, "no_url", f"The body must be a JSON object {EXAMPLE}.")
    if len(given) > 1:
        raise RequestError(400, "ambiguous", f"Send {given[0]} or {given[1]}, not both.")
    top_k = fields.get("top_k")
    if "top_k" in fields and not (type(top_k) is int and 1 <= top_k <= MAX_TOP_K):
        raise RequestError(400, "bad_top_k", f"top_k must be an integer from 1 to {MAX_TOP_K}.")
    if given == ["urls"]:
        return Request(_addresses(fields["urls"]), True, top_k)
    value = fields[given[0]]
    if not isinstance(value, str) or not value:
        raise RequestError(400, f"no_{given[0]}", f"{given[0]} must be a string that is not empty.")
    return Request([value if given == ["url"] else _image(value)], False, top_k)


def _addresses(urls: object) -> list[str]:
    if not isinstance(urls, list) or not all(isinstance(url, str) and url for url in urls):
        raise RequestError(400, "no_urls", "urls must be a list of strings that are not empty.")
    if not urls:
        raise RequestError(400, "no_urls", "urls must not be empty.")
    if len(urls) > MAX_BATCH:
        sentence = f"urls may have at most {MAX_BATCH} entries, not {len(urls)}."
        raise RequestError(413, "too_large", sentence)
    return urls


def _image(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise RequestError(400, "bad_base64", "image is not valid base64.") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
