"""The model of an execution environment: loaded once, or failed once. Called by app.py."""

import math
import os
import time
from dataclasses import dataclass

from errors import ModelError
from model import Model
from telemetry import Timings, logger

RETRY_AFTER = 30.0  # seconds until S3 is asked again for a model, if it did not answer


@dataclass
class Environment:
    """What this execution environment remembers between requests."""

    model: Model | None = None
    failure: ModelError | None = None
    retry_at: float = 0.0  # of time.monotonic


environment = Environment()


def get_model() -> Model:
    """The model that MODEL_BUCKET and MODEL_KEY name. Raises ModelError.

    A failure is kept too: a wrong bundle costs one download and one line in the log, not one a
    request, until the stack is deployed anew. Only an S3 that did not answer is asked again.
    """
    if environment.model is None and time.monotonic() >= environment.retry_at:
        try:
            load()
        except ModelError as error:
            keep(error)
        except Exception as error:  # one that escaped would have Lambda start over and over
            logger.exception("unexpected error")
            keep(ModelError("model_failed", repr(error)))
    if environment.model is None:
        raise environment.failure
    return environment.model


def load() -> None:
    timings = Timings()
    with timings.of("load_ms"):
        model = Model.from_s3(os.environ.get("MODEL_BUCKET"), os.environ.get("MODEL_KEY"))
    environment.model = model
    logger.info("model loaded", extra={"fields": {"model": str(model), **timings}})


def keep(failure: ModelError) -> None:
    passing = failure.code == "model_unavailable"
    environment.failure = failure
    environment.retry_at = time.monotonic() + RETRY_AFTER if passing else math.inf
    fields = {"error": failure.code, "detail": str(failure)}
    logger.error("model not loaded", extra={"fields": fields})
