"""The classifier: a bundle from S3, an image in, a class and a confidence out. Called by app.py.

A bundle is a tar.gz archive of plain files:
    *.pt or *.pth          the TorchScript model: (N, 3, H, W) float32 → (N, classes) logits
    classes.txt            one class name a line, in the order of the logits
    preprocessing.json     optional; without it ImageNet's preprocessing applies
"""

import gzip
import io
import shutil
import tarfile
import tempfile
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import boto3
import botocore.config
import botocore.exceptions
import numpy as np
import torch
from PIL import Image

from errors import RequestError
from preprocessing import IMAGENET, Preprocessing

MAX_PIXELS = 50_000_000
MAX_MODEL_BYTES = 2_000_000_000
MAX_TEXT_BYTES = 1_000_000
CHUNK = 1 << 20  # bytes
S3_CONFIG = botocore.config.Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 2})

Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class ModelError(Exception):
    """The model cannot be loaded; the message says what is wrong with what."""


@dataclass
class Model:
    """A loaded classifier."""

    script: torch.jit.ScriptModule
    classes: list[str]
    preprocessing: Preprocessing
    source: str

    def __str__(self) -> str:
        return f"{self.source}, {len(self.classes)} classes, torch {torch.__version__}"

    @classmethod
    def from_s3(cls, bucket: str | None, key: str | None) -> "Model":
        """Download and load the bundle s3://bucket/key. Raises ModelError."""
        if not bucket or not key:
            raise ModelError("MODEL_BUCKET and MODEL_KEY must name the model bundle.")
        source = f"s3://{bucket}/{key}"
        try:
            body = boto3.client("s3", config=S3_CONFIG).get_object(Bucket=bucket, Key=key)["Body"]
            return cls.from_archive(body, source)
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise ModelError(f"{source} cannot be read: {error}") from error

    @classmethod
    def from_archive(cls, stream: BinaryIO, source: str) -> "Model":
        """Load a bundle from a stream of its bytes; `source` names it. Raises ModelError."""
        with tempfile.TemporaryDirectory(prefix="model-") as folder:
            members = _unpack(stream, Path(folder), source)
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
                raise ModelError(f"{source}: {_last_line(error)}") from error
        model = cls(script, [name.strip() for name in classes], preprocessing, source)
        model._check()
        return model

    @torch.inference_mode()
    def logits(self, batch: np.ndarray) -> torch.Tensor:
        """The (N, classes) output for an (N, 3, H, W) float32 batch."""
        return self.script(torch.from_numpy(batch))

    def predict(self, image: Image.Image) -> tuple[str, float]:
        """The most probable class of an image and its softmax probability."""
        probabilities = self.logits(self.preprocessing(image)[np.newaxis])[0].softmax(0)
        confidence, index = probabilities.max(0)
        return self.classes[int(index)], float(confidence)

    def _check(self) -> None:
        """One prediction proves that model, classes and preprocessing fit, and warms up."""
        size = self.preprocessing.crop
        try:
            shape = tuple(self.logits(np.zeros((1, 3, size, size), np.float32)).shape)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{self.source}: the model fails on an image: {_last_line(error)}"
            ) from error
        if shape != (1, len(self.classes)):
            raise ModelError(
                f"{self.source}: classes.txt has {len(self.classes)} names, "
                f"but the model's output for one image has shape {shape}."
            )


def _unpack(stream: BinaryIO, folder: Path, source: str) -> dict[str, Path]:
    """Write the members of a bundle into `folder`, no others and nowhere else."""
    members: dict[str, Path] = {}
    try:
        with (
            gzip.GzipFile(fileobj=stream) as unzipped,
            tarfile.open(fileobj=unzipped, mode="r|") as archive,
        ):
            for member in archive:
                name = member.name.removeprefix("./")
                role = "model" if name.endswith((".pt", ".pth")) else name
                if role not in ("model", "classes.txt", "preprocessing.json"):
                    raise ModelError(f"{source}: unexpected member {member.name!r}.")
                if not member.isreg() or "/" in name:
                    raise ModelError(f"{source}: member {member.name!r} is not a plain file.")
                if role in members:
                    raise ModelError(f"{source}: more than one {role}.")
                if member.size > (MAX_MODEL_BYTES if role == "model" else MAX_TEXT_BYTES):
                    raise ModelError(f"{source}: member {member.name!r} is too large.")
                members[role] = folder / role
                with open(members[role], "wb") as file:
                    shutil.copyfileobj(archive.extractfile(member), file, CHUNK)
            while unzipped.read(CHUNK):  # gzip checks the checksum at the end
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ModelError(f"{source} is not a complete tar.gz archive: {error}") from error
    for role in ("model", "classes.txt"):
        if role not in members:
            missing = "*.pt or *.pth file" if role == "model" else role
            raise ModelError(f"{source}: the bundle has no {missing}.")
    return members


def load_image(data: bytes) -> Image.Image:
    """Decode an image. Raises RequestError: 413 too many pixels, 415 no image, 422 a broken one."""
    too_large = RequestError(413, "too_large", f"The image has more than {MAX_PIXELS:,} pixels.")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise too_large from None
    except (OSError, ValueError, SyntaxError):
        raise RequestError(415, "not_an_image", "The address does not hold an image.") from None
    if image.width * image.height > MAX_PIXELS:  # known before anything is decoded
        raise too_large
    try:
        image.load()
    except Image.DecompressionBombError:
        raise too_large from None
    except (OSError, ValueError, SyntaxError):
        raise RequestError(422, "broken_image", "The image cannot be decoded.") from None
    return image


def _last_line(error: Exception) -> str:
    """torch's messages bring a C++ backtrace; what went wrong is in the last line."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
