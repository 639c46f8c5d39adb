"""The classifier: a bundle from S3, images in, probabilities out. Called by app.py.

A bundle is a tar.gz archive of plain files:
    *.pt or *.pth          the TorchScript model: (N, 3, H, W) float32 → (N, classes) logits
    classes.txt            one class name a line, in the order of the logits
    preprocessing.json     optional; without it ImageNet's preprocessing applies
"""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import boto3
import botocore.config
import botocore.exceptions
import numpy as np
import torch
from PIL import Image

from archive import unpack
from errors import ModelError
from preprocessing import IMAGENET, Preprocessing

S3_CONFIG = botocore.config.Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 2})


@dataclass
class Model:
    """A loaded classifier.

    Attributes:
        script: maps float32 of (N, 3, crop, crop) to logits of (N, len(classes)).
        source: where the bundle came from, such as s3://bucket/key.
        sha256: of the bundle's bytes, in hex.
    """

    script: torch.jit.ScriptModule
    classes: list[str]
    preprocessing: Preprocessing
    source: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.source}, {len(self.classes)} classes, torch {torch.__version__}"

    @classmethod
    def from_s3(cls, bucket: str | None, key: str | None) -> "Model":
        """Download and load the bundle s3://bucket/key. Raises ModelError."""
        if not bucket or not key:
            raise ModelError(
                "model_not_configured", "MODEL_BUCKET and MODEL_KEY must name the model bundle."
            )
        source = f"s3://{bucket}/{key}"
        try:
            body = boto3.client("s3", config=S3_CONFIG).get_object(Bucket=bucket, Key=key)["Body"]
            return cls.from_archive(body, source)
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise ModelError(_s3_code(error), f"{source} cannot be read: {error}") from error

    @classmethod
    def from_archive(cls, stream: BinaryIO, source: str) -> "Model":
        """Load a bundle from a stream of its bytes; `source` names it. Raises ModelError."""
        with tempfile.TemporaryDirectory(prefix="model-") as folder:
            members, sha256 = unpack(stream, Path(folder), source)
            try:
                classes = members["classes.txt"].read_text("utf-8").splitlines()
                preprocessing = IMAGENET
                if "preprocessing.json" in members:
                    text = members["preprocessing.json"].read_text("utf-8")
                    preprocessing = Preprocessing.from_json(text)
                with warnings.catch_warnings():  # that TorchScript is deprecated is known
                    warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)
                    script = torch.jit.load(str(members["model"]), map_location="cpu").eval()
            except Exception as error:  # torch reports a damaged file in many ways
                raise ModelError(
                    "model_archive_invalid", f"{source}: {_last_line(error)}"
                ) from error
        model = cls(script, [name.strip() for name in classes], preprocessing, source, sha256)
        model._check()
        return model

    @torch.inference_mode()
    def logits(self, batch: np.ndarray) -> torch.Tensor:
        """The (N, classes) output for an (N, 3, H, W) float32 batch."""
        return self.script(torch.from_numpy(batch))

    def predict(self, images: list[Image.Image]) -> np.ndarray:
        """The softmax probabilities of N images: float32 of (N, len(classes))."""
        return self.predict_batch(np.stack([self.preprocessing(image) for image in images]))

    def predict_batch(self, batch: np.ndarray) -> np.ndarray:
        """The same for images that are preprocessed already: float32 of (N, 3, crop, crop)."""
        return self.logits(batch).softmax(1).numpy()

    def _check(self) -> None:
        """One prediction proves that model, classes and preprocessing fit, and warms up."""
        size = self.preprocessing.crop
        try:
            shape = tuple(self.logits(np.zeros((1, 3, size, size), np.float32)).shape)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ModelError(
                "model_failed", f"{self.source}: the model fails on an image: {_last_line(error)}"
            ) from error
        if shape != (1, len(self.classes)):
            raise ModelError(
                "model_classes_mismatch",
                f"{self.source}: classes.txt has {len(self.classes)} names, "
                f"but the model's output for one image has shape {shape}.",
            )


def _s3_code(error: Exception) -> str:
    if isinstance(error, botocore.exceptions.ClientError):
        code = error.response["Error"]["Code"]
        if code in ("NoSuchKey", "NoSuchBucket", "404"):
            return "model_not_found"
        if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            return "model_access_denied"
    return "model_unavailable"


def _last_line(error: Exception) -> str:
    """torch's messages bring a C++ backtrace; what went wrong is in the last line."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
