"""Make the file that is served, in one of three variants: `python -m training.optimize`.

    fp32      TorchScript, frozen; oneDNN fuses it when it is loaded
    int8      TorchScript with 8-bit weights and activations, calibrated on images
    export    an archive of torch.export instead of TorchScript, otherwise as fp32

Each is compared with the trained model here, and then measured in the serving environment, the
packages of the Lambda layer: size, time of an image, right answers. What was chosen is written to
`model.json`, from which `training.bundle` takes it.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from archive import KINDS
from local.atomic import replacing
from local.cli import UserError, run
from local.paths import ROOT
from training.data import DIGITS, write_digits
from training.export import export
from training.model import TrainedModel
from training.quantize import quantize
from training.trace import (
    check_in_serving,
    compare,
    find_images,
    load_images,
    load_network,
    run_model,
    trace,
)
from training.train import OUTPUT

SUFFIXES = {"fp32": ".pt", "int8": ".int8.pt", "export": ".pt2"}
MAX_ACCURACY_LOSS = 0.005  # half a point
CALIBRATION_IMAGES = 128
PROVEN_AT_ONCE = 16  # images on which a file is compared before it is written


@dataclass(frozen=True)
class Variant:
    """One file that could be served, as measured in the serving environment.

    Attributes:
        name: a key of SUFFIXES.
        bytes: of the file.
        milliseconds: median time of an image.
        accuracy: share of right answers; None if the images' classes are not known.
        same_class: share of images for which the answer is the trained model's.
        max_difference: largest difference of a logit from the trained model's.
        engine: what computes it.
    """

    name: str
    path: Path
    bytes: int
    milliseconds: float
    accuracy: float | None
    same_class: float
    max_difference: float
    engine: str


def make(
    trained: TrainedModel,
    name: str,
    images: Sequence[Path],
    folder: Path = OUTPUT,
    calibration: Sequence[Path] | None = None,
    max_accuracy_loss: float = MAX_ACCURACY_LOSS,
    packages: Path | None = None,
) -> Variant:
    """Make a variant in `folder` and measure it on `images`.

    Args:
        calibration: images for int8, which are better not among `images`.
        max_accuracy_loss: largest accepted loss of accuracy by int8, as a share. If the images'
            classes are not known, each answer that differs from the trained model's counts as lost.
        packages: the serving packages; by default the layer's.

    Raises:
        UserError: the model cannot be had in this variant, answers differently here or in the
            serving environment, or loses more accuracy than accepted (the file is removed then).
    """
    if name not in SUFFIXES:
        raise UserError(f"there is no variant {name!r}; choose {', '.join(SUFFIXES)}")
    path = folder / f"{trained.architecture}{SUFFIXES[name]}"
    if name == "fp32":
        trace(trained, images[:PROVEN_AT_ONCE], path)
    elif name == "export":
        export(trained, images[:PROVEN_AT_ONCE], path)
    else:
        quantize(trained, calibration or calibration_images(trained), path)
    inputs = load_images(images, trained.preprocessing)
    expected = run_model(trained.model, inputs, "as trained")
    logits = run_model(load_network(path, trained.preprocessing.crop), inputs, name)
    comparison = compare(expected, logits, {})
    if name != "int8" and not comparison.agrees:
        path.unlink()
        raise UserError(f"{name} answers differently from the trained model: {comparison}")
    labels = labels_of(images, trained.classes)
    accuracy, before = (
        None if labels is None else float((answers.argmax(1) == labels).mean())
        for answers in (logits, expected)
    )
    same = comparison.same_class / len(images)
    loss = 1 - same if accuracy is None else before - accuracy
    if not loss <= max_accuracy_loss:
        path.unlink()
        raise UserError(
            f"{name} loses {100 * loss:.1f} points of accuracy on {len(images)} images, "
            f"more than the accepted {100 * max_accuracy_loss:.1f}"
        )
    serving = check_in_serving(path, trained.preprocessing, images, packages, logits)
    return Variant(
        name,
        path,
        path.stat().st_size,
        serving.milliseconds,
        accuracy,
        same,
        comparison.max_difference,
        serving.engine,
    )


def choose(trained: TrainedModel, variant: Variant) -> Path:
    """Write `model.json` beside the variant's file: this one goes into the bundle."""
    record = {
        "format": 1,
        "kind": KINDS[variant.path.suffix],
        "name": trained.architecture,
        "temperature": getattr(trained, "temperature", 1.0),
        "variant": variant.name,
        "file": variant.path.name,
    }
    output = variant.path.with_name("model.json")
    with replacing(output) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return output


def calibration_images(trained: TrainedModel, limit: int = CALIBRATION_IMAGES) -> list[Path]:
    """Images from the training split of the data that `trained` was trained on.

    Raises:
        UserError: it was not trained here, or the data are gone.
    """
    folder = trained.configuration.get("data_folder")
    if folder is not None:
        folder = ROOT / folder
    elif trained.configuration.get("source") == "digits":
        folder = write_digits(DIGITS)
    else:
        raise UserError("int8 needs images like those that the model will see: name a folder")
    train = folder / "train"
    return find_images(train if train.is_dir() else folder, limit)


def labels_of(images: Sequence[Path], classes: Sequence[str]) -> np.ndarray | None:
    """The classes of images whose folders are named after them; None if one is not."""
    index = {name: i for i, name in enumerate(classes)}
    labels = [index.get(path.parent.name) for path in images]
    return None if None in labels else np.array(labels)


def table(variants: Iterable[Variant]) -> str:
    """Markdown: a row for each variant."""
    lines = [
        "| variant | MB | ms an image | accuracy | as trained | largest difference | engine |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for v in variants:
        accuracy = "" if v.accuracy is None else f"{v.accuracy:.2%}"
        lines.append(
            f"| {v.name} | {v.bytes / 1e6:.1f} | {v.milliseconds:.1f} | {accuracy} "
            f"| {v.same_class:.2%} | {v.max_difference:.1e} | {v.engine} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.optimize", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--checkpoint", type=Path, default=OUTPUT / "checkpoint.pt")
    parser.add_argument("--variant", choices=SUFFIXES, default="fp32", help="default: %(default)s")
    parser.add_argument("--images", type=Path, help="folder to compare on (default: digits)")
    parser.add_argument("--limit", type=int, default=200, help="images (default: %(default)s)")
    parser.add_argument(
        "--calibration", type=Path, help="folder of images for int8 (default: the training split)"
    )
    parser.add_argument(
        "--max-accuracy-loss", type=float, default=MAX_ACCURACY_LOSS, help="default: %(default)s"
    )
    parser.add_argument("--packages", type=Path, help="the serving packages (default: the layer's)")
    args = parser.parse_args()
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    trained = TrainedModel.load(args.checkpoint)
    variant = make(
        trained,
        args.variant,
        find_images(args.images or write_digits(DIGITS) / "test", args.limit),
        args.checkpoint.parent,
        find_images(args.calibration, CALIBRATION_IMAGES) if args.calibration else None,
        args.max_accuracy_loss,
        args.packages,
    )
    choose(trained, variant)
    print(json.dumps(asdict(variant), default=str))


if __name__ == "__main__":
    run(main)
