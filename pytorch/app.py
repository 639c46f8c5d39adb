"""The Lambda function behind POST /invocations: an image's address in, its class out.

    {"url": "https://…/dog.jpg"}   →   {"class": "english_cocker_spaniel", "confidence": 0.99}

Environment: MODEL_BUCKET and MODEL_KEY name the bundle made by notebook 03. torch, numpy, Pillow
and requests come from the Lambda layer (layer/), boto3 from the Lambda runtime.
"""

try:
    import unzip_requirements  # noqa: F401
except ImportError:  # no layer: the packages are installed
    pass

import base64
import functools
import json
import logging
import os
import time

from errors import ModelError, RequestError
from fetch import fetch
from images import load_image
from model import Model

logger = logging.getLogger("app")
logger.setLevel(os.environ.get("LOG_LEVEL", "INFO"))
if not logging.getLogger().handlers:  # Lambda's runtime brings a handler of its own
    logging.basicConfig(format="%(levelname)s %(message)s")


@functools.cache
def get_model() -> Model:
    """The model of this execution environment. A load that failed is tried again next time."""
    started = time.perf_counter()
    model = Model.from_s3(os.environ.get("MODEL_BUCKET"), os.environ.get("MODEL_KEY"))
    logger.info("model loaded in %.0f ms: %s", _ms_since(started), model)
    return model


def lambda_handler(event: dict, context: object) -> dict:
    """Classify the image that the body of an API Gateway (REST) event points to.

    Returns a proxy response: 200 with class and confidence, else a status and a sentence.
    """
    try:
        return respond(200, classify(parse(event)))
    except RequestError as error:
        failure = error
        logger.info("%d %s: %s", error.status, error.code, error)
    except ModelError as error:
        failure = RequestError(503, "model_unavailable", "The model could not be loaded.")
        logger.error("no model: %s", error)
    except Exception:
        failure = RequestError(500, "internal_error", "The request could not be processed.")
        logger.exception("unexpected error")
    request_id = getattr(context, "aws_request_id", None)
    body = {"code": failure.code, "message": str(failure), "request_id": request_id}
    return respond(failure.status, {"error": body})


def parse(event: dict) -> str:
    """The image address in the event's JSON body. Raises RequestError(400) if there is none."""
    body = event.get("body") if isinstance(event, dict) else None
    if not body:
        raise RequestError(400, "no_body", 'The request has no body; send {"url": "…"}.')
    try:
        if event.get("isBase64Encoded"):
            body = base64.b64decode(body, validate=True)
        request = json.loads(body)
    except (TypeError, ValueError, RecursionError):
        raise RequestError(400, "bad_json", "The body is not valid JSON.") from None
    url = request.get("url") if isinstance(request, dict) else None
    if not isinstance(url, str) or not url:
        raise RequestError(400, "no_url", 'The body must be a JSON object like {"url": "…"}.')
    return url


def classify(url: str) -> dict:
    """The class of the image at `url` and the model's confidence in it, from 0 to 1."""
    started = time.perf_counter()
    image = load_image(fetch(url))
    fetch_ms = _ms_since(started)
    model = get_model()
    started = time.perf_counter()
    probabilities = model.predict([image])[0]
    best = int(probabilities.argmax())
    name, confidence = model.classes[best], float(probabilities[best])
    logger.info(
        "%s %.3f fetch_ms=%.0f predict_ms=%.0f", name, confidence, fetch_ms, _ms_since(started)
    )
    return {"class": name, "confidence": confidence}


def respond(status: int, body: dict) -> dict:
    """An API Gateway proxy response with a JSON body."""
    return {
        "statusCode": status,
        "headers": {"Content-Type": "application/json"},
        "body": json.dumps(body),
    }


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


if "AWS_LAMBDA_FUNCTION_NAME" in os.environ:  # on Lambda: load in INIT, not in the first request
    try:
        get_model()
    except ModelError as error:
        logger.error("no model yet: %s", error)
