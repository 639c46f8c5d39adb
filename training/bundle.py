"""Pack a traced model and what it needs into `model.tar.gz`: `python -m training.bundle`.

The archive holds the TorchScript file, `classes.txt` (one name a line, in the order of the outputs)
and `preprocessing.json`. The Lambda function downloads it from S3; `training.upload` puts it there.
"""

import argparse
import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch

from local.atomic import replacing
from local.cli import UserError, run
from local.paths import BUILD
from preprocessing import IMAGENET, Preprocessing
from training.model import check_classes, read_classes
from training.trace import load_archive

DIRECTORY = BUILD / "model"
# Trained weights are noise to a compressor: level 6 makes a ResNet-18 7 % smaller, and every cold
# start inflate it. At level 0 the archive is a valid gzip file all the same, with its checksum.
COMPRESSION = 0


def create(
    model_path: Path,
    classes: Sequence[str],
    preprocessing: Preprocessing | None = None,
    output: Path = DIRECTORY / "model.tar.gz",
) -> Path:
    """Write the bundle to `output`, byte for byte the same for the same inputs, and return it.

    Args:
        model_path: TorchScript archive, named *.pt or *.pth, of a model for the CPU.
        classes: names in the order of the model's outputs.
        preprocessing: left out of the bundle if None; the function then uses ImageNet's preset.

    Raises:
        UserError: the names are not usable, or the model does not run or has another number of
            outputs.
    """
    if model_path.suffix not in (".pt", ".pth"):
        raise UserError(f"the model {model_path.name} must be named *.pt or *.pth")
    check_classes(classes)
    _check_outputs(model_path, len(classes), preprocessing or IMAGENET)
    members = {
        model_path.name: model_path.read_bytes(),
        "classes.txt": "".join(f"{name}\n" for name in classes).encode(),
    }
    if preprocessing is not None:
        members["preprocessing.json"] = preprocessing.to_json().encode()
    with (
        replacing(output) as partial,
        partial.open("wb") as file,
        # The file's name and time would be part of the archive, and differ each time.
        gzip.GzipFile("", "wb", COMPRESSION, file, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, content in members.items():
            member = tarfile.TarInfo(name)  # time, owner and group are 0 already
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    return output


def read_preprocessing(path: Path) -> Preprocessing:
    """The settings in a `preprocessing.json`. Raises UserError if they cannot be read."""
    try:
        return Preprocessing.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the preprocessing cannot be read from {path}: {error}") from error


def _check_outputs(model_path: Path, classes: int, preprocessing: Preprocessing) -> None:
    """Run the model once, as only that shows what it takes and gives."""
    model = load_archive(model_path)
    size = preprocessing.crop
    try:
        with torch.inference_mode():
            outputs = model(torch.zeros(1, 3, size, size))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{model_path} fails on an image of {size} x {size}: {reason}") from error
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        raise UserError(f"{model_path} does not answer with one row of numbers for one image")
    if outputs.shape[1] != classes:
        raise UserError(
            f"{model_path} has {outputs.shape[1]} outputs, but there are {classes} classes"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.bundle", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--model", type=Path, default=DIRECTORY / "resnet18.pt", help="TorchScript file"
    )
    parser.add_argument("--classes", type=Path, help="default: classes.txt beside the model")
    parser.add_argument(
        "--preprocessing",
        help="default: preprocessing.json beside the model if there; `imagenet` leaves it out",
    )
    parser.add_argument("--output", type=Path, help="default: model.tar.gz beside the model")
    args = parser.parse_args()
    settings = Path(args.preprocessing or args.model.with_name("preprocessing.json"))
    if args.preprocessing == "imagenet" or (args.preprocessing is None and not settings.exists()):
        preprocessing = None
    else:
        preprocessing = read_preprocessing(settings)
    classes = read_classes(args.classes or args.model.with_name("classes.txt"))
    output = args.output or args.model.with_name("model.tar.gz")
    create(args.model, classes, preprocessing, output)
    print(f"{output}: {output.stat().st_size:,} bytes, {len(classes)} classes")


if __name__ == "__main__":
    run(main)
