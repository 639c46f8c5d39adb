"""The classifier: a bundle from S3, images in, probabilities out. Called by app.py.

A bundle is a tar.gz archive of plain files:
    *.pt, *.pth or *.pt2   the model: (1, 3, H, W) float32 → (1, classes) logits; *.pt2 is an
                           archive of torch.export, the others are TorchScript
    classes.txt            one class name a line, in the order of the logits
    preprocessing.json     optional; without it ImageNet's preprocessing applies
    model.json             optional; kind, name and the temperature of the softmax
    MODEL_CARD.md          optional; for people
"""

import json
import re
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from archive import KINDS, Archive, unpack
from download import fetch
from errors import ModelError
from network import Network, load
from preprocessing import IMAGENET, Preprocessing


@dataclass
class Model:
    """A loaded classifier.

    Attributes:
        network: maps float32 of (1, 3, crop, crop) to logits of (1, len(classes)).
        source: where the bundle came from, such as s3://bucket/key.
        sha256: of the bundle's bytes, in hex.
        kind: "torchscript" or "export".
        name: of the model, such as "resnet18".
        temperature: what the logits are divided by before the softmax.
    """

    network: Network
    classes: list[str]
    preprocessing: Preprocessing
    source: str
    sha256: str
    kind: str
    name: str
    temperature: float = 1.0

    def __str__(self) -> str:
        return (
            f"{self.source}, {self.name}, {len(self.classes)} classes, "
            f"torch {torch.__version__}, {self.kind}, {self.network.engine}"
        )

    @classmethod
    def from_s3(cls, bucket: str | None, key: str | None) -> "Model":
        """Download and load the bundle s3://bucket/key, or take over the download that has begun.

        If MODEL_SHA256 is set in the environment, no other bundle is accepted. Raises ModelError.
        """
        return cls._load(fetch(bucket, key))

    @classmethod
    def from_archive(
        cls, stream: BinaryIO, source: str, expected_sha256: str | None = None
    ) -> "Model":
        """Load a bundle from a stream of its bytes; `source` names it. Raises ModelError."""
        return cls._load(unpack(stream, source, expected_sha256))

    @classmethod
    def _load(cls, archive: Archive) -> "Model":
        with archive.model:
            try:
                return cls._from_members(archive)
            except ModelError as error:
                raise ModelError(error.code, f"{archive.source}: {error}") from error

    @classmethod
    def _from_members(cls, archive: Archive) -> "Model":
        kind = KINDS[archive.suffix]
        name, temperature = _settings(archive.texts.get("model.json"), archive.name, kind)
        classes = [line.strip() for line in archive.texts["classes.txt"].splitlines()]
        preprocessing = IMAGENET
        if "preprocessing.json" in archive.texts:
            try:
                preprocessing = Preprocessing.from_json(archive.texts["preprocessing.json"])
            except ValueError as error:
                raise ModelError("model_preprocessing_invalid", str(error)) from error
        network = load(archive.model, kind, preprocessing.crop)
        if network.outputs != (1, len(classes)):
            raise ModelError(
                "model_classes_mismatch",
                f"classes.txt has {len(classes)} names, "
                f"but the model's output for one image has shape {network.outputs}.",
            )
        source, sha256 = archive.source, archive.sha256
        return cls(network, classes, preprocessing, source, sha256, kind, name, temperature)

    @torch.inference_mode()
    def logits(self, batch: np.ndarray) -> torch.Tensor:
        """The (N, classes) output for an (N, 3, crop, crop) float32 batch.

        The images go through the network one by one: it is compiled for that shape, and on a CPU
        this is faster than a batch through the plain one (docs/serving.md).
        """
        return torch.cat([self.network(image) for image in torch.from_numpy(batch).split(1)])

    def predict(self, images: list[Image.Image]) -> np.ndarray:
        """The softmax probabilities of N images: float32 of (N, len(classes))."""
        return self.predict_batch(np.stack([self.preprocessing(image) for image in images]))

    def predict_batch(self, batch: np.ndarray) -> np.ndarray:
        """The same for images that are preprocessed already: float32 of (N, 3, crop, crop)."""
        return (self.logits(batch) / self.temperature).softmax(1).numpy()


def _settings(text: str | None, name: str, kind: str) -> tuple[str, float]:
    """Name and temperature from a model.json; `name` and 1 without one. Raises ModelError."""
    try:
        values = {"format": 1} if text is None else json.loads(text)
        values = {"kind": kind, "name": name, "temperature": 1.0} | values
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(
            "model_archive_invalid", f"model.json is not a JSON object: {error}"
        ) from error
    temperature = values["temperature"]
    for field, fits in {
        "format": values.get("format") == 1,
        "kind": values["kind"] == kind,
        "name": isinstance(values["name"], str)
        and re.fullmatch(r"[\w.+ -]{1,100}", values["name"]),
        "temperature": type(temperature) in (int, float) and 0.01 <= temperature <= 100,
    }.items():
        if not fits:
            raise ModelError(
                "model_archive_invalid",
                f"model.json: {field} cannot be {values.get(field)!r:.100} for a {kind} model.",
            )
    return values["name"], float(temperature)
