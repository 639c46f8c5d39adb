"""A trained classifier and everything that was decided about it, in one file that is safe to load.

`train` makes it, `trace` and the notebooks take it from there.
"""

import difflib
import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torchvision
from torch import nn

from local.atomic import replacing
from local.cli import UserError
from local.paths import ROOT
from preprocessing import Preprocessing

FORMAT = "image-classifier-checkpoint-1"
# With these two a classifier in training mode would return auxiliary outputs beside its own.
WITHOUT_AUXILIARY = {"googlenet": {"aux_logits": False}, "inception_v3": {"aux_logits": False}}


@dataclass
class TrainedModel:
    """A classifier on the CPU, in evaluation mode, with its record.

    Attributes:
        architecture: torchvision's name for it, such as `resnet18`; any other name if the model
            came as TorchScript.
        options: further arguments of torchvision's constructor.
        classes: names in the order of the model's outputs.
        model: maps float32 of (N, 3, crop, crop) to logits of (N, len(classes)).
        archive: the bytes of the TorchScript file, if it came as one; `model` was loaded from them.
        temperature: probabilities are softmax(logits / temperature).
        history: one dict an epoch: `epoch`, `train_loss`, `train_accuracy`, `val_loss`,
            `val_accuracy` (mean cross-entropy in nats; share of right answers in 0..1).
        metrics: of the test split, as `training.evaluate.assess` describes them; `best_epoch` and
            `seconds` of a training; empty without data.
        configuration: what decided the result: source, seed, epochs, hashes of data and code;
            `data_folder` is relative to the repository if it is inside, None without data.
        versions: of the libraries that made it.
    """

    architecture: str
    options: dict
    classes: list[str]
    preprocessing: Preprocessing
    model: nn.Module
    history: list[dict] = field(default_factory=list)
    metrics: dict = field(default_factory=dict)
    configuration: dict = field(default_factory=dict)
    versions: dict = field(default_factory=lambda: library_versions())
    temperature: float = 1.0
    archive: bytes | None = None

    def save(self, path: Path) -> None:
        """Write plain types and tensors only, so that the file loads with `weights_only=True`."""
        record = {item.name: getattr(self, item.name) for item in fields(self)}
        record |= {
            "format": FORMAT,
            "preprocessing": self.preprocessing.to_json(),
        }
        if self.archive is None:
            record["model"] = self.model.state_dict()
        else:
            record["model"] = None
            record["archive"] = torch.frombuffer(bytearray(self.archive), dtype=torch.uint8)
        with replacing(path) as partial:
            torch.save(record, partial)

    @classmethod
    def load(cls, path: Path) -> "TrainedModel":
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, damaged or something else.
        """
        if not path.is_file():
            raise UserError(f"there is no checkpoint {path}; train a model first (training.train)")
        try:
            record = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in many ways, all of which mean this
            raise UserError(f"{path} is damaged or not a PyTorch checkpoint") from error
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise UserError(
                f"{path} is a PyTorch file, but not a checkpoint of training.train; a state_dict "
                "needs its architecture and a file of class names beside it"
            )
        try:
            state = record.pop("model")
            record["preprocessing"] = Preprocessing.from_json(record["preprocessing"])
            if record.get("archive") is not None:
                record["archive"] = record["archive"].numpy().tobytes()
                model = load_torchscript(record["archive"])
            else:
                model = build(record["architecture"], len(record["classes"]), record["options"])
                model.load_state_dict(state)
            return cls(model=model.eval(), **record)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is inconsistent: {reason}") from error

    @property
    def data_folder(self) -> Path | None:
        """The folder with train, val and test that the model was trained or measured on, if it is
        there."""
        name = self.configuration.get("data_folder")
        return ROOT / name if name and (ROOT / name).is_dir() else None

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what the model answers, and of nothing else."""
        if self.archive is not None:
            return hashlib.sha256(self.archive).hexdigest()
        digest = hashlib.sha256(json.dumps([self.architecture, self.options]).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def build(architecture: str, classes: int, options: dict | None = None) -> nn.Module:
    """An untrained torchvision classifier with `classes` outputs.

    Raises:
        UserError: torchvision has no classifier of that name.
    """
    check_architecture(architecture)
    return torchvision.models.get_model(architecture, num_classes=classes, **(options or {}))


def check_architecture(name: str) -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=3) or ["resnet18"]
        raise UserError(f"torchvision has no classifier {name!r}; try {', '.join(close)}")


def load_torchscript(archive: bytes) -> torch.jit.ScriptModule:
    """Load a TorchScript file's bytes on the CPU. Raises RuntimeError if they are no such file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        return torch.jit.load(io.BytesIO(archive), map_location="cpu").eval()


def read_classes(path: Path) -> list[str]:
    """The names in a `classes.txt`, one a line. Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the classes cannot be read from {path}: {error}") from error


def check_classes(classes: Sequence[str]) -> None:
    """Raises UserError if the names are not usable in a `classes.txt`."""
    if not classes:
        raise UserError("there are no classes")
    seen = set()
    for number, name in enumerate(classes, start=1):
        if not name or name != name.strip() or len(name.splitlines()) != 1:
            raise UserError(f"class {number} is {name!r}: empty, or with line ends or outer spaces")
        if name in seen:
            raise UserError(f"class {name!r} is there twice")
        seen.add(name)


def library_versions() -> dict:
    return {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
