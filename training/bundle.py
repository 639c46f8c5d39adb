"""Pack a model and what it needs into `model.tar.gz`: `python -m training.bundle`.

The archive holds the model's file, `classes.txt` (one name a line, in the order of the outputs),
`preprocessing.json`, `model.json` (kind, name and temperature) and, if there is one,
`MODEL_CARD.md`. The Lambda function downloads it from S3; `training.upload` puts it there.
"""

import argparse
import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from archive import KINDS
from local.atomic import replacing
from local.cli import UserError, run
from local.paths import BUILD
from preprocessing import IMAGENET, Preprocessing
from training.model import check_classes, read_classes
from training.trace import load_network

DIRECTORY = BUILD / "model"
# Trained weights are noise to a compressor: level 6 makes a ResNet-18 7 % smaller, and every cold
# start inflate it. At level 0 the archive is a valid gzip file all the same, with its checksum.
COMPRESSION = 0


@dataclass(frozen=True)
class Settings:
    """What `model.json` says: the model's file and name, and what its logits are divided by before
    the softmax (at least 0.01, at most 100)."""

    file: str
    name: str
    temperature: float = 1.0


def create(
    model_path: Path,
    classes: Sequence[str],
    preprocessing: Preprocessing | None = None,
    output: Path = DIRECTORY / "model.tar.gz",
    settings: Settings | None = None,
    card: Path | None = None,
) -> Path:
    """Write the bundle to `output`, byte for byte the same for the same inputs, and return it.

    Args:
        model_path: a model for the CPU: TorchScript, named *.pt or *.pth, or an archive of
            torch.export, named *.pt2.
        classes: names in the order of the model's outputs.
        preprocessing: left out of the bundle if None; the function then uses ImageNet's preset.
        settings: without them the model is named like its file and has the temperature 1.
        card: MODEL_CARD.md, for people; nobody reads it when serving.

    Raises:
        UserError: the names are not usable, or the model does not run or has another number of
            outputs.
    """
    settings = settings or Settings(model_path.name, model_path.name.split(".")[0])
    if not 0.01 <= settings.temperature <= 100:
        raise UserError(f"the temperature {settings.temperature} is not in 0.01..100")
    check_classes(classes)
    _check_outputs(model_path, len(classes), preprocessing or IMAGENET)
    members = {
        model_path.name: model_path.read_bytes(),
        "classes.txt": "".join(f"{name}\n" for name in classes).encode(),
    }
    if preprocessing is not None:
        members["preprocessing.json"] = preprocessing.to_json().encode()
    record = {"format": 1, "kind": KINDS[model_path.suffix]} | asdict(settings)
    record["file"] = model_path.name
    members["model.json"] = (json.dumps(record, indent=2) + "\n").encode()
    if card is not None:
        members["MODEL_CARD.md"] = card.read_bytes()
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


def read_settings(path: Path) -> Settings:
    """The settings in a `model.json`. Raises UserError if they cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings(*(record[key] for key in ("file", "name", "temperature")))
        if record["format"] != 1 or Path(settings.file).name != settings.file:
            raise ValueError("not of format 1")
        if not isinstance(settings.name, str) or type(settings.temperature) not in (int, float):
            raise TypeError("name must be a text, and temperature a number")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the settings cannot be read from {path}: {error!r}") from error
    return settings


def settings_of(model_path: Path) -> Settings | None:
    """The settings beside a model's file, if they are about that file."""
    path = model_path.with_name("model.json")
    settings = read_settings(path) if path.exists() else None
    return settings if settings and settings.file == model_path.name else None


def chosen_model(folder: Path = DIRECTORY) -> Path:
    """The file that `training.optimize` chose last. Raises UserError if it is not there."""
    path = folder / read_settings(folder / "model.json").file
    if not path.is_file():
        raise UserError(f"there is no {path}; run training.optimize again")
    return path


def _check_outputs(model_path: Path, classes: int, preprocessing: Preprocessing) -> None:
    """Run the model once, as only that shows what it takes and gives."""
    outputs = load_network(model_path, preprocessing.crop).outputs
    if len(outputs) != 2 or outputs[0] != 1:
        raise UserError(f"{model_path} does not answer with one row of numbers for one image")
    if outputs[1] != classes:
        raise UserError(f"{model_path} has {outputs[1]} outputs, but there are {classes} classes")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.bundle", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--model", type=Path, help="*.pt, *.pth or *.pt2 (default: what training.optimize made)"
    )
    parser.add_argument("--classes", type=Path, help="default: classes.txt beside the model")
    parser.add_argument(
        "--preprocessing",
        help="default: preprocessing.json beside the model if there; `imagenet` leaves it out",
    )
    parser.add_argument("--output", type=Path, help="default: model.tar.gz beside the model")
    args = parser.parse_args()
    args.model = args.model or chosen_model()
    settings = Path(args.preprocessing or args.model.with_name("preprocessing.json"))
    if args.preprocessing == "imagenet" or (args.preprocessing is None and not settings.exists()):
        preprocessing = None
    else:
        preprocessing = read_preprocessing(settings)
    classes = read_classes(args.classes or args.model.with_name("classes.txt"))
    output = args.output or args.model.with_name("model.tar.gz")
    card = args.model.with_name("MODEL_CARD.md")
    create(
        args.model,
        classes,
        preprocessing,
        output,
        settings_of(args.model),
        card if card.exists() else None,
    )
    print(f"{output}: {output.stat().st_size:,} bytes, {len(classes)} classes")


if __name__ == "__main__":
    run(main)
