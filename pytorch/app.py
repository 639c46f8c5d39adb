"""The Lambda function: images in, classes out. openapi.yaml is its contract.

    POST /invocations   {"url": "https://…/dog.jpg"}  →  {"class": "…", "confidence": 0.99}
    GET  /health        →  {"status": "ready", "model": …}

Environment: MODEL_BUCKET and MODEL_KEY name the bundle made by notebook 03; MODEL_SHA256,
ALLOWED_HOSTS, ALLOW_PRIVATE_HOSTS, IMAGE_BUCKET and LOG_LEVEL are described in template.yaml.
torch, numpy and Pillow come from the Lambda layer (layer/), boto3 from the Lambda runtime.
"""

try:
    import unzip_requirements  # noqa: F401
except ImportError:  # no layer: the packages are installed
    pass

import contextlib
import itertools
import json
import os
import time

import download

ON_LAMBDA = "AWS_LAMBDA_FUNCTION_NAME" in os.environ
if ON_LAMBDA:  # while torch is unpacked and imported
    download.begin(os.environ.get("MODEL_BUCKET"), os.environ.get("MODEL_KEY"))

import numpy as np

from errors import ModelError, RequestError
from events import Request, parse
from fetch import fetch_all
from images import load_image
from loading import get_model
from model import Model
from telemetry import Timings, configure, logger, metrics

ANSWER_WITHIN = 25.0  # seconds; API Gateway gives up after 29
FETCH_SHARE = 0.8  # of that time; the rest is for decoding and the model

requests = itertools.count()  # of this execution environment

configure()


def lambda_handler(event: dict, context: object) -> dict:
    """Answer one event of a REST API, an HTTP API, a Function URL or a direct invocation.

    Returns a proxy response. Every mistake ends here, as a status, a code and a sentence.
    """
    request_id = getattr(context, "aws_request_id", None)
    log = {"request_id": request_id, "cold_start": int(next(requests) == 0)}
    timings = Timings()
    try:
        with timings.of("latency_ms"):
            body = answer(event, context, timings)
        status, failure = 200, None
    except RequestError as error:
        failure = error
    except ModelError as error:
        failure = RequestError(503, error.code, "The model is not available.", str(error))
    except Exception:
        logger.exception("unexpected error", extra={"fields": {"request_id": request_id}})
        failure = RequestError(500, "internal_error", "The request could not be processed.")
    if failure:
        status, body = failure.status, {"error": described(failure)}
        body["error"]["request_id"] = request_id
        log |= {"error": failure.code, **({"detail": failure.detail} if failure.detail else {})}
    log |= {"status": status, **timings}
    logger.info("request", extra={"fields": log | metrics(log)})
    return respond(status, body, failure.headers if failure else {})


def answer(event: dict, context: object, timings: Timings) -> dict:
    """The body for an event. Raises RequestError and ModelError."""
    deadline = time.monotonic() + seconds_for(context)
    request = parse(event)
    model = get_model()
    return health(model) if request.health else predict(request, model, deadline, timings)


def predict(request: Request, model: Model, deadline: float, timings: Timings) -> dict:
    """Class and confidence of the images of a request, which go through the model as one batch.

    A client that sent a list gets a list, in which each image has its own answer or error.
    """
    fetch_until = deadline - (1 - FETCH_SHARE) * (deadline - time.monotonic())
    with timings.of("fetch_ms"):
        fetched = fetch_all(request.sources, fetch_until)
    answers, inputs = [], []
    while fetched:  # the bytes and pixels of one image are gone before the next one's are made
        try:
            inputs.append(prepare(fetched.pop(0), model, deadline, timings))
            answers.append(None)
        except RequestError as error:
            if not request.batch:
                raise
            answers.append({"error": described(error)})
    if inputs:
        with timings.of("predict_ms"):
            rows = iter(model.predict_batch(np.stack(inputs)))
        answers = [given or classified(next(rows), model, request.top_k) for given in answers]
    return {"predictions": answers} if request.batch else answers[0]


def prepare(
    content: bytes | RequestError, model: Model, deadline: float, timings: Timings
) -> np.ndarray:
    """The model's input for one fetched image. Raises RequestError."""
    if isinstance(content, RequestError):
        raise content
    if time.monotonic() > deadline:
        raise RequestError(504, "too_slow", "The request took too long.")
    with timings.of("decode_ms"):
        image = load_image(content)
    try:
        with timings.of("preprocess_ms"):
            return model.preprocessing(image)
    except ValueError as error:
        raise RequestError(422, "unusable_image", f"Not usable: {error}.") from None


def classified(row: np.ndarray, model: Model, top_k: int | None) -> dict:
    """The best class of one row of probabilities; with `top_k` also as many of the best."""
    if not np.isfinite(row).all():
        raise ModelError("model_failed", "The model's output is not finite.")
    best = np.argsort(-row, kind="stable")[: top_k or 1]
    named = [{"class": model.classes[i], "confidence": float(row[i])} for i in best]
    return named[0] | ({"top_k": named} if top_k else {})


def health(model: Model) -> dict:
    """What serves here; whoever gets this answer knows that the model is loaded."""
    import torch  # at the top it would come first, and the other imports hide its unpacking

    return {
        "status": "ready",
        "model": getattr(model, "name", model.source.rpartition("/")[2]),
        "version": model.sha256[:16],
        "sha256": model.sha256,
        "classes": len(model.classes),
        "torch": torch.__version__,
    }


def described(error: RequestError) -> dict:
    """What a client learns of an error: a code for programs, a sentence for people."""
    return {"code": error.code, "message": str(error)}


def respond(status: int, body: dict, headers: dict[str, str]) -> dict:
    """A proxy response with a JSON body, as all kinds of API Gateway take it."""
    return {
        "statusCode": status,
        "headers": {"Content-Type": "application/json"} | headers,
        "body": json.dumps(body),
    }


def seconds_for(context: object) -> float:
    """How long the answer to a request may take: what the gateway and the function have left."""
    remaining = getattr(context, "get_remaining_time_in_millis", None)
    return min(ANSWER_WITHIN, remaining() / 1000 - 1) if remaining else ANSWER_WITHIN


if ON_LAMBDA:  # load in INIT, not in the first request
    with contextlib.suppress(ModelError):  # logged; each request is answered with it
        get_model()
