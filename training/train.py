"""Train a classifier, load one, or take torchvision's: `python -m training.train --help`.

Whatever the source, the result is `checkpoint.pt` with `classes.txt` and `preprocessing.json`
beside it, and the next steps (trace, bundle) do not ask where it came from.
"""

import argparse
import copy
import hashlib
import json
import os
import platform
import socket
import time
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import preprocessing as preprocessing_module
from local.atomic import replacing
from local.cli import UserError, run, shown
from local.paths import BUILD
from preprocessing import Preprocessing
from training.data import DIGITS, write_digits
from training.model import (
    WITHOUT_AUXILIARY,
    TrainedModel,
    build,
    check_architecture,
    library_versions,
)

SOURCES = ("digits", "checkpoint", "pretrained")
OUTPUT = BUILD / "model"
# The scans have 8 x 8 pixels; at 32 x 32 a ResNet, which divides a side by 32, keeps one cell.
SMALL = Preprocessing(32, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BATCH_SIZE = 64
EPOCHS = 6
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
NETWORK_TIMEOUT = 30  # seconds without an answer or a byte


@dataclass(frozen=True)
class Predictions:
    """What a model says about every image of a folder; arrays of length N in the folder's order.

    Attributes:
        paths: the image files.
        labels, predicted: indices into `classes`.
        confidence: softmax probability of the predicted class, in 0..1.
        loss: mean cross-entropy in nats.
    """

    classes: list[str]
    paths: list[Path]
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    loss: float

    @property
    def accuracy(self) -> float:
        return float((self.labels == self.predicted).mean())


def get_model(
    source: str = "digits",
    *,
    architecture: str = "resnet18",
    data: Path | None = None,
    checkpoint: Path | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
    preprocessing: Preprocessing = SMALL,
    output: Path = OUTPUT,
    force: bool = False,
) -> TrainedModel:
    """Get a model from `source` and leave it in `output`.

    Args:
        source: `digits` trains on `data` (scikit-learn's digits if None); `checkpoint` loads the
            file `checkpoint` (that of `output` if None); `pretrained` takes torchvision's ImageNet
            weights, through torchvision's own loader and its cache.
        data: folder with `train`, `val` and `test`, each with a sub-folder of images a class.
        preprocessing: used at training, and kept with the model for serving.
        force: train even if `output` holds the result of the same configuration, data and code.

    Raises:
        UserError: an argument, a file or the network is not what it has to be.
    """
    saved = output / "checkpoint.pt"
    # Building and training draw random numbers; in a fork, the caller keeps his own.
    with torch.random.fork_rng():
        if source == "digits":
            trained, reused = _train(architecture, data, epochs, seed, preprocessing, saved, force)
        elif source == "checkpoint":
            trained = TrainedModel.load(checkpoint or saved)
            reused = checkpoint in (None, saved)
        elif source == "pretrained":
            trained, reused = pretrained(architecture), False
        else:
            raise UserError(f"unknown source {source!r}; it must be one of {', '.join(SOURCES)}")
    _write(output / "classes.txt", "".join(f"{name}\n" for name in trained.classes))
    _write(output / "preprocessing.json", trained.preprocessing.to_json())
    if not reused:
        trained.save(saved)
    return trained


def pretrained(architecture: str = "resnet18") -> TrainedModel:
    """torchvision's default ImageNet weights, from the cache below TORCH_HOME or the network.

    Raises:
        UserError: there are no such weights, they cannot be fetched, or the cached file is damaged.
    """
    check_architecture(architecture)
    weights = torchvision.models.get_model_weights(architecture).DEFAULT
    options = dict(WITHOUT_AUXILIARY.get(architecture, {}))
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)  # torchvision's loader would wait without end
    try:
        model = torchvision.models.get_model(architecture, weights=weights, **options)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"the weights {weights.url} could not be fetched ({getattr(error, 'reason', error)}); "
            f"connect to the network, or put that file at {cached}, where it is looked for first"
        ) from error
    except Exception as error:  # a damaged file fails in many ways, all of which mean this
        raise UserError(
            f"the weights in {cached} do not fit {architecture}; remove the file to fetch it again"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    if architecture in WITHOUT_AUXILIARY:
        options["transform_input"] = True  # what the builder sets for these weights
    return TrainedModel(
        architecture=architecture,
        options=options,
        classes=list(weights.meta["categories"]),
        preprocessing=_preprocessing_of(weights.transforms()),
        model=model.eval(),
        configuration={"source": "pretrained", "weights": str(weights)},
    )


def predict(trained: TrainedModel, folder: Path) -> Predictions:
    """Classify every image of `folder`, which has one sub-folder a class.

    Raises:
        UserError: the folder's classes are not the model's, or an image cannot be read.
    """
    images = _images(folder, trained.preprocessing)
    if images.classes != trained.classes:
        raise UserError(f"the classes in {folder} are not those that the model was trained on")
    logits = _logits(trained.model, images, torch.device("cpu"))
    confidence, predicted = logits.softmax(1).max(1)
    labels = torch.tensor(images.targets)
    return Predictions(
        classes=trained.classes,
        paths=[Path(path) for path, _ in images.samples],
        labels=labels.numpy(),
        predicted=predicted.numpy(),
        confidence=confidence.numpy(),
        loss=nn.functional.cross_entropy(logits, labels).item(),
    )


def fit(
    model: nn.Module,
    train: ImageFolder,
    val: ImageFolder,
    *,
    epochs: int,
    seed: int,
    device: torch.device,
) -> list[dict]:
    """Train `model` in place and leave it with the weights of its best epoch on `val`.

    AdamW with a one-cycle schedule (Smith and Topin, arXiv:1708.07120). The same seed, machine and
    number of threads give the same weights.

    Returns:
        One dict an epoch, as in `TrainedModel.history`.
    """
    model.to(device)
    shuffle = torch.Generator().manual_seed(seed)
    # A last batch of one image cannot be normalised (batch norm), so an incomplete one is left out.
    size = min(BATCH_SIZE, len(train))
    loader = DataLoader(train, size, shuffle=True, drop_last=True, generator=shuffle)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * len(loader)
    )
    history, best = [], None
    with tqdm(total=epochs * len(loader), unit="batch", desc="training") as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            total_loss = right = seen = 0
            for images, labels in loader:
                images, labels = images.to(device), labels.to(device)
                logits = model(images)
                loss = nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                seen += len(labels)
                total_loss += loss.item() * len(labels)
                right += (logits.argmax(1) == labels).sum().item()
                bar.update()
                bar.set_postfix(epoch=f"{epoch}/{epochs}", loss=total_loss / seen, acc=right / seen)
            logits = _logits(model, val, device)
            labels = torch.tensor(val.targets)
            history.append(
                {
                    "epoch": epoch,
                    "train_loss": total_loss / seen,
                    "train_accuracy": right / seen,
                    "val_loss": nn.functional.cross_entropy(logits, labels).item(),
                    "val_accuracy": (logits.argmax(1) == labels).double().mean().item(),
                }
            )
            if best is None or _rank(history[-1]) > _rank(history[best[0]]):
                best = epoch - 1, copy.deepcopy(model.state_dict())
    model.load_state_dict(best[1])
    return history


def best_epoch(history: list[dict]) -> int:
    """The epoch of highest accuracy on the validation split, of lowest loss where several tie."""
    return max(history, key=_rank)["epoch"]


def _rank(entry: dict) -> tuple[float, float]:
    return entry["val_accuracy"], -entry["val_loss"]


def _train(
    architecture: str,
    data: Path | None,
    epochs: int,
    seed: int,
    preprocessing: Preprocessing,
    saved: Path,
    force: bool,
) -> tuple[TrainedModel, bool]:
    """Train, or take the model in `saved` if it came of the same; the bool says which (reused)."""
    check_architecture(architecture)
    if epochs < 1:
        raise UserError("epochs must be at least 1")
    data = write_digits(DIGITS) if data is None else data
    splits = {name: _images(data / name, preprocessing) for name in ("train", "val", "test")}
    classes = splits["train"].classes
    for name, images in splits.items():
        if images.classes != classes:
            raise UserError(f"{data / name} has other classes than {data / 'train'}")
    configuration = {
        "source": "digits" if data == DIGITS else "folder",
        "architecture": architecture,
        "epochs": epochs,
        "seed": seed,
        "preprocessing": preprocessing.to_json(),
        "data": _hash_files(
            data, [path for images in splits.values() for path, _ in images.samples]
        ),
        "code": _hash_files(Path(), [__file__, preprocessing_module.__file__]),
        **library_versions(),
    }
    if saved.exists() and not force:
        try:
            earlier = TrainedModel.load(saved)
        except UserError as error:
            print(f"{error}; training again")
        else:
            if earlier.configuration == configuration:
                print(f"{shown(saved)} is of the same configuration, data and code: reused")
                return earlier, True

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = WITHOUT_AUXILIARY.get(architecture, {})
    started = time.monotonic()
    torch.manual_seed(seed)
    model = build(architecture, len(classes), options)
    history = fit(model, splits["train"], splits["val"], epochs=epochs, seed=seed, device=device)
    seconds = time.monotonic() - started
    trained = TrainedModel(
        architecture=architecture,
        options=options,
        classes=classes,
        preprocessing=preprocessing,
        model=model.cpu().eval(),
        history=history,
        configuration=configuration,
        versions=library_versions() | {"python": platform.python_version(), "device": device.type},
    )
    test = predict(trained, data / "test")
    trained.metrics = {
        "best_epoch": best_epoch(history),
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_images": len(test.labels),
        "seconds": round(seconds, 1),
    }
    return trained, False


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _images(folder: Path, preprocessing: Preprocessing) -> ImageFolder:
    def load(path: str) -> Image.Image:
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} cannot be read as an image") from error

    try:
        return ImageFolder(
            folder, transform=lambda image: torch.from_numpy(preprocessing(image)), loader=load
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} must have a sub-folder of images for each class") from error


@torch.inference_mode()
def _logits(model: nn.Module, images: ImageFolder, device: torch.device) -> torch.Tensor:
    model.eval()
    return torch.cat([model(batch.to(device)).cpu() for batch, _ in DataLoader(images, 128)])


def _preprocessing_of(transforms: nn.Module) -> Preprocessing:
    """The settings of torchvision's ImageClassification preset."""
    return Preprocessing(
        resize=transforms.resize_size[0],
        crop=transforms.crop_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )


def _hash_files(root: Path, paths: list[str | Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        name = os.path.relpath(path, root) if root != Path() else Path(path).name
        digest.update(name.encode() + b"\0" + hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--source", choices=SOURCES, default="digits", help="default: %(default)s")
    parser.add_argument("--architecture", default="resnet18", help="torchvision's name for it")
    parser.add_argument(
        "--data", type=Path, help="folder with train, val and test (default: digits)"
    )
    parser.add_argument("--checkpoint", type=Path, help="file for --source checkpoint")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=SMALL.crop, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="train even if nothing has changed")
    args = parser.parse_args()
    try:
        preprocessing = Preprocessing(args.image_size, args.image_size, SMALL.mean, SMALL.std)
    except ValueError as error:
        raise UserError(f"--image-size: {error}") from error
    trained = get_model(
        args.source,
        architecture=args.architecture,
        data=args.data,
        checkpoint=args.checkpoint,
        epochs=args.epochs,
        seed=args.seed,
        preprocessing=preprocessing,
        output=args.output,
        force=args.force,
    )
    print(
        f"{args.output / 'checkpoint.pt'}: {trained.architecture}, {len(trained.classes)} classes"
    )
    if trained.metrics:
        print(json.dumps(trained.metrics))


if __name__ == "__main__":
    run(main)
