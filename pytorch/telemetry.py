"""The function's log: one line of JSON a request, which CloudWatch also reads as metrics.

A line with a member `_aws` is in the embedded metric format, from which CloudWatch Logs makes
metrics without any call:
https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch_Embedded_Metric_Format_Specification.html

Powertools for AWS Lambda does the same and more; docs/handler.md says what it would cost here.
"""

import json
import logging
import os
import re
import time
import traceback

NAMESPACE = "PyTorchClassifier"
METRICS = {  # names in the log line, units as CloudWatch knows them
    "latency_ms": "Milliseconds",
    "fetch_ms": "Milliseconds",
    "predict_ms": "Milliseconds",
    "cold_start": "Count",  # 1 or 0
}

logger = logging.getLogger("app")


class JsonLines(logging.Handler):
    """Writes records to standard output, where Lambda takes each line as one event."""

    def emit(self, record: logging.LogRecord) -> None:
        line = {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03}Z",
            "level": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        line = {k: _without_query(v) if isinstance(v, str) else v for k, v in line.items()}
        print(json.dumps(line, default=str), flush=True)


def configure() -> None:
    """Make `logger` write JSON lines, once, at the level LOG_LEVEL."""
    level = os.environ.get("LOG_LEVEL", "INFO").upper()
    logger.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")
    if not any(isinstance(handler, JsonLines) for handler in logger.handlers):
        logger.addHandler(JsonLines())
    # On Lambda the root logger writes too, in a format of its own.
    logger.propagate = "AWS_LAMBDA_FUNCTION_NAME" not in os.environ


class Timings(dict):
    """Milliseconds by name, measured by `with timings.of("fetch_ms"): …` blocks."""

    def of(self, name: str) -> "_Block":
        return _Block(self, name)


class _Block:
    def __init__(self, timings: Timings, name: str):
        self.timings, self.name = timings, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        taken = (time.perf_counter() - self.started) * 1000
        self.timings[self.name] = round(self.timings.get(self.name, 0.0) + taken, 1)


def metrics(fields: dict) -> dict:
    """The member that makes the METRICS among `fields` metrics of this function."""
    directive = {
        "Namespace": NAMESPACE,
        "Dimensions": [["function_name"]],
        "Metrics": [{"Name": n, "Unit": unit} for n, unit in METRICS.items() if n in fields],
    }
    return {
        "function_name": os.environ.get("AWS_LAMBDA_FUNCTION_NAME", "local"),
        "_aws": {"Timestamp": time.time_ns() // 1_000_000, "CloudWatchMetrics": [directive]},
    }


def _without_query(text: str) -> str:
    """Presigned addresses carry a signature behind the question mark."""
    return re.sub(r"""(?i)\b((?:https?|s3):[^\s"'?]*)\?[^\s"']*""", r"\1?…", text)
