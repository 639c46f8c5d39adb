"""The model's bundle, from S3. Begun by app.py, fetched by model.py.

Nothing here needs torch, so that the download can run while torch is being imported.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import boto3
import botocore.config
import botocore.exceptions

from archive import CHUNK, Archive, unpack
from errors import ModelError

CONFIG = botocore.config.Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 2})
CODES = {"404": "model_not_found", "403": "model_access_denied"}


begun: dict[tuple[str | None, str | None], Future[Archive]] = {}


def begin(bucket: str | None, key: str | None) -> None:
    """Download in a thread; the next `fetch` of the same bundle waits for that and raises its
    errors."""
    executor = ThreadPoolExecutor(1)
    begun[bucket, key] = executor.submit(download, bucket, key)
    executor.shutdown(wait=False)


def fetch(bucket: str | None, key: str | None) -> Archive:
    """The bundle s3://bucket/key, unpacked. Raises ModelError."""
    running = begun.pop((bucket, key), None)
    return running.result() if running else download(bucket, key)


class Ahead:
    """A stream whose next piece is read while the last one is used."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.executor = ThreadPoolExecutor(1)
        self.piece = self.executor.submit(stream.read, CHUNK)

    def read(self, _size: int) -> bytes:
        """A piece of CHUNK bytes, a smaller one at the end, then none; or the stream's error."""
        data = self.piece.result()
        self.piece = self.executor.submit(self.stream.read, CHUNK)
        return data

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown()


def download(bucket: str | None, key: str | None) -> Archive:
    """The same, here and now.

    If MODEL_SHA256 is set in the environment, no other bundle is accepted.
    """
    if not bucket or not key:
        raise ModelError(
            "model_not_configured", "MODEL_BUCKET and MODEL_KEY must name the model bundle."
        )
    source = f"s3://{bucket}/{key}"
    try:
        body = boto3.client("s3", config=CONFIG).get_object(Bucket=bucket, Key=key)["Body"]
        with body, Ahead(body) as stream:
            return unpack(stream, source, os.environ.get("MODEL_SHA256"))
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise ModelError(_code(error), f"{source} cannot be read: {error}") from error


def _code(error: Exception) -> str:
    if isinstance(error, botocore.exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return CODES.get(str(status), "model_unavailable")
    if isinstance(error, botocore.exceptions.NoCredentialsError):
        return "model_access_denied"
    return "model_unavailable"
