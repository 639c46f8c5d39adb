"""Get a classifier from wherever it comes: `python -m training.train --help`.

Whatever the source, the result is `checkpoint.pt` with `classes.txt`, `preprocessing.json` and
`MODEL_CARD.md` beside it, and the next steps (trace, bundle) do not ask where it came from.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

import preprocessing as preprocessing_module
from local.atomic import replacing
from local.cli import UserError, run, shown
from local.paths import BUILD, ROOT
from preprocessing import IMAGENET, Preprocessing
from training import evaluate, model_card
from training import fit as fit_module
from training.checks import Checked, list_images, table
from training.data import DIGITS, from_folder, from_torchvision, read_images, write_digits
from training.evaluate import Predictions, assess, predict
from training.fit import (
    FINE_TUNING,
    FROM_SCRATCH,
    FROM_SCRATCH_ON_PHOTOGRAPHS,
    Augmentation,
    Recipe,
    best_epoch,
    fit,
)
from training.model import TrainedModel, check_architecture, library_versions
from training.sources import (
    fine_tunable,
    from_checkpoint,
    from_module,
    from_torchscript,
    head_of,
    pretrained,
    read_preprocessing,
)

__all__ = ["OUTPUT", "SOURCES", "Predictions", "best_epoch", "find_data", "get_model", "predict"]

SOURCES = ("digits", "folder", "dataset", "pretrained", "checkpoint", "torchscript", "module")
TRAINED = SOURCES[:3]  # here; the others come as they are
OUTPUT = BUILD / "model"
# The scans have 8 x 8 pixels; at 32 x 32 a ResNet, which divides a side by 32, keeps one cell.
SMALL = Preprocessing(32, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def get_model(
    source: str = "digits",
    *,
    architecture: str = "resnet18",
    data: str | Path | None = None,
    weights: str | Path | None = None,
    model_file: str | Path | None = None,
    classes_file: str | Path | None = None,
    preprocessing: Preprocessing | str | dict | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    augment: bool | None = None,
    skip_bad: bool = False,
    output: Path = OUTPUT,
    force: bool = False,
    on_epoch: Callable[[list[dict]], None] | None = None,
) -> TrainedModel:
    """Get a model from `source` and leave it in `output`.

    | source | what it takes |
    | --- | --- |
    | digits | nothing; trains from scratch on scikit-learn's digits |
    | folder | `data`: a folder with one sub-folder of images a class; fine-tunes on it |
    | dataset | `data`: a data set of torchvision by name; fine-tunes on it |
    | pretrained | `architecture`, `weights`: torchvision's ImageNet weights |
    | checkpoint | `model_file`: what this function has saved (default: that in `output`); or a |
    |            | state_dict of `architecture`, with `classes_file` |
    | torchscript | `model_file`, `classes_file`, `preprocessing` |
    | module | `model_file`: "file.py:function"; `weights` (a file), `classes_file`, ... |

    Args:
        data: for the sources that do not train: a folder of images with the model's classes, to
            calibrate and measure it on.
        weights: what fine-tuning starts from: a name of torchvision's (`DEFAULT` if None), a file,
            or `random`.
        preprocessing: `imagenet`, a dict, JSON or a file; if None, what belongs to the source.
        image_size: side in pixels of what the model sees, in place of the source's own.
        epochs: at most so many; the recipe's if None.
        augment: the recipe's if None.
        skip_bad: leave out images that would be refused.
        force: train even if `output` holds the result of the same configuration, data and code.
        on_epoch: is handed the history after each epoch, and once if nothing had to be trained.

    Raises:
        UserError: an argument, a file or the network is not what it has to be.
    """
    if source not in SOURCES:
        raise UserError(f"unknown source {source!r}; it must be one of {', '.join(SOURCES)}")
    saved = output / "checkpoint.pt"
    preprocessing = read_preprocessing(preprocessing)
    # Building and training draw random numbers; in a fork, the caller keeps his own.
    with torch.random.fork_rng():
        if source in TRAINED:
            trained, reused = _train(
                source,
                find_data(source, data, skip_bad),
                architecture,
                str(weights or ("random" if source == "digits" else "DEFAULT")),
                _recipe(source, weights, epochs, augment),
                seed,
                preprocessing,
                image_size,
                saved,
                force,
                on_epoch,
            )
        else:
            wanted = sized(preprocessing or IMAGENET, image_size)
            if model_file is None and source == "checkpoint":
                model_file = saved
            trained = _load(source, architecture, weights, model_file, classes_file, wanted)
            if preprocessing or image_size:
                trained.preprocessing = sized(preprocessing or trained.preprocessing, image_size)
            if folder := find_data(source, data, skip_bad):
                trained.configuration["data_folder"] = _relative(folder)
                assess(trained, folder)
            reused = False
    _write(output / "classes.txt", "".join(f"{name}\n" for name in trained.classes))
    _write(output / "preprocessing.json", trained.preprocessing.to_json())
    _write(output / "MODEL_CARD.md", model_card.write(trained))
    if not reused:
        trained.save(saved)
    (output / "training.pt").unlink(missing_ok=True)
    return trained


def find_data(source: str, data: str | Path | None, skip_bad: bool = False) -> Path | None:
    """The images that belong to a source, as a folder with train, val and test; checked and split.

    Args:
        source, data, skip_bad: as for `get_model`.

    Returns:
        The folder; None for a model from elsewhere without `data`.

    Raises:
        UserError: the images are missing or not usable.
    """
    if source == "digits":
        parts, notes = list_images(write_digits(DIGITS))
        print(table(Checked(parts, notes)))
        return DIGITS
    if not data and source in TRAINED:
        example = "a folder" if source == "folder" else "a name such as oxford_iiit_pet"
        raise UserError(f"the source {source} needs the data to learn from: {example}")
    if not data:
        return None
    parts = [Path(data, part) for part in ("train", "val", "test")]
    if Path(data).parent == BUILD / "data" and all(part.is_dir() for part in parts):
        return Path(data)  # what this function has returned before
    if source == "dataset":
        return from_torchvision(str(data))
    return from_folder(Path(data).expanduser(), skip_bad)


def sized(preprocessing: Preprocessing, size: int | None) -> Preprocessing:
    """The same for another input size; the margin that is cut off keeps its share.

    Raises:
        UserError: the size is out of bounds.
    """
    if size is None:
        return preprocessing
    try:
        resize = round(size * preprocessing.resize / preprocessing.crop)
        return replace(preprocessing, resize=resize, crop=size)
    except (ValueError, TypeError) as error:
        raise UserError(f"the image size {size!r} cannot be used: {error}") from error


def _recipe(
    source: str, weights: str | Path | None, epochs: int | None, augment: bool | None
) -> Recipe:
    recipe = FROM_SCRATCH if source == "digits" else FINE_TUNING
    if source != "digits" and str(weights) == "random":
        recipe = FROM_SCRATCH_ON_PHOTOGRAPHS
    if epochs is not None:
        if type(epochs) is not int or epochs < 1:
            raise UserError(f"epochs must be a whole number, at least 1, not {epochs!r}")
        # A short training keeps at least as many epochs for all layers.
        recipe = replace(
            recipe, epochs=epochs, frozen_epochs=min(recipe.frozen_epochs, epochs // 2)
        )
    return recipe if augment is None else replace(recipe, augment=augment)


def _load(
    source: str,
    architecture: str,
    weights: str | Path | None,
    model_file: str | Path | None,
    classes_file: str | Path | None,
    preprocessing: Preprocessing,
) -> TrainedModel:
    if source == "pretrained":
        return pretrained(architecture, str(weights or "DEFAULT"))
    if model_file is None:
        form = "path/to/file.py:function" if source == "module" else "a TorchScript file"
        raise UserError(f"the source {source} needs the model: {form}")
    classes = Path(classes_file).expanduser() if classes_file else None
    if source == "checkpoint":
        return from_checkpoint(Path(model_file).expanduser(), architecture, classes)
    if classes is None:
        raise UserError(
            f"the source {source} needs a file with the names of the classes, one a line, in the "
            "order of the model's outputs"
        )
    if source == "torchscript":
        return from_torchscript(Path(model_file).expanduser(), classes, preprocessing)
    file = Path(weights).expanduser() if weights else None
    return from_module(str(model_file), file, classes, preprocessing)


def _train(
    source: str,
    data: Path,
    architecture: str,
    weights: str,
    recipe: Recipe,
    seed: int,
    preprocessing: Preprocessing | None,
    image_size: int | None,
    saved: Path,
    force: bool,
    on_epoch: Callable[[list[dict]], None] | None,
) -> tuple[TrainedModel, bool]:
    """Train, or take the model in `saved` if it came of the same; the bool says which (reused)."""
    check_architecture(architecture)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes = sorted(path.name for path in (data / "train").iterdir())
    torch.manual_seed(seed)
    model, options, own = fine_tunable(architecture, classes, weights)
    default = SMALL if source == "digits" else own or IMAGENET
    preprocessing = sized(preprocessing or default, image_size)
    plain = {part: read_images(data / part, preprocessing) for part in ("train", "val", "test")}
    configuration = {
        "source": source,
        "architecture": architecture,
        "weights": weights,
        "weights_sha256": _hash_files(Path(), [weights]) if Path(weights).is_file() else None,
        "recipe": asdict(recipe),
        "seed": seed,
        "preprocessing": preprocessing.to_json(),
        "data_folder": _relative(data),
        "data": _hash_files(
            data, [path for images in plain.values() for path, _ in images.samples]
        ),
        "images": {part: len(images) for part, images in plain.items()},
        "code": _hash_files(
            Path(),
            [__file__, fit_module.__file__, evaluate.__file__, preprocessing_module.__file__],
        ),
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
                if on_epoch:
                    on_epoch(earlier.history)
                return earlier, True

    images = plain["train"]
    if recipe.augment:
        images = read_images(data / "train", Augmentation(preprocessing))
    progress = saved.with_name("training.pt")
    if force:
        progress.unlink(missing_ok=True)
    started = time.monotonic()
    head = head_of(architecture, len(classes)) if weights != "random" else frozenset()
    key = json.dumps([configuration, device.type, torch.get_num_threads()])
    history = fit(
        model,
        images,
        plain["val"],
        recipe,
        seed=seed,
        device=device,
        head=head,
        progress=progress,
        key=hashlib.sha256(key.encode()).hexdigest(),
        on_epoch=on_epoch,
    )
    seconds = time.monotonic() - started
    trained = TrainedModel(
        architecture=architecture,
        options=options,
        classes=classes,
        preprocessing=preprocessing,
        model=model.cpu().eval(),
        history=history,
        metrics={"best_epoch": best_epoch(history), "seconds": round(seconds, 1)},
        configuration=configuration,
        versions=library_versions() | {"python": platform.python_version(), "device": device.type},
    )
    assess(trained, data)
    return trained, False


def _relative(folder: Path) -> str:
    """Relative to the repository if it is inside: a checkpoint may travel to another machine."""
    return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _hash_files(root: Path, paths: list[str | Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        name = os.path.relpath(path, root) if root != Path() else Path(path).name
        digest.update(os.fsencode(name) + b"\0" + hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Get a classifier: train one, fine-tune one, or take one from elsewhere.",
        epilog="docs/models.md shows each source with an example.",
    )
    parser.add_argument("--source", choices=SOURCES, default="digits", help="default: %(default)s")
    parser.add_argument("--architecture", default="resnet18", help="torchvision's name for it")
    parser.add_argument(
        "--data",
        help="folder of images, one sub-folder a class; for `dataset` a name in torchvision; for "
        "a model from elsewhere: images to calibrate and measure it on",
    )
    parser.add_argument(
        "--weights",
        help="name in torchvision, such as IMAGENET1K_V2, file, or `random` (default: digits "
        "from random ones, the others from torchvision's best)",
    )
    parser.add_argument(
        "--model", help="file for checkpoint and torchscript, file.py:function for module"
    )
    parser.add_argument("--classes", type=Path, help="the names, one a line, in the outputs' order")
    parser.add_argument(
        "--preprocessing", help="imagenet, JSON, or a JSON file (default: the source's)"
    )
    parser.add_argument("--image-size", type=int, help="pixels (default: the source's)")
    parser.add_argument(
        "--epochs",
        type=int,
        help="at most; default: digits 6, fine-tuning 12, photographs from scratch 30",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="vary the images; the default for photographs, not for digits",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad images, and say so")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="train even if nothing has changed")
    args = parser.parse_args()
    trained = get_model(
        args.source,
        architecture=args.architecture,
        data=args.data,
        weights=args.weights,
        model_file=args.model,
        classes_file=args.classes,
        preprocessing=args.preprocessing,
        image_size=args.image_size,
        epochs=args.epochs,
        seed=args.seed,
        augment=args.augment,
        skip_bad=args.skip_bad,
        output=args.output,
        force=args.force,
    )
    print(
        f"{args.output / 'checkpoint.pt'}: {trained.architecture}, {len(trained.classes)} classes"
    )
    if trained.metrics:
        print(json.dumps({k: v for k, v in trained.metrics.items() if k != "per_class"}))


if __name__ == "__main__":
    run(main)
