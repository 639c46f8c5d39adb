"""Images in the one layout that everything here reads: `python -m training.data --help`.

    FOLDER/train/seven/0042.png     learned from
    FOLDER/val/...                  chooses the best epoch, fits the temperature
    FOLDER/test/...                 seen once, after training

`write_digits` makes it of scikit-learn's handwritten digits (1,797 scans of 8 x 8 pixels,
https://archive.ics.uci.edu/dataset/80, shipped inside scikit-learn, so that nothing is downloaded),
`from_folder` of a folder of one's own, `from_torchvision` of a data set in torchvision.
"""

import argparse
import difflib
import hashlib
import inspect
import os
import re
import socket
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder, VisionDataset
from tqdm import tqdm

from local.atomic import replacing
from local.cli import UserError, run, shown
from local.paths import BUILD
from training.checks import SUFFIXES, WHOLE, Checked, Parts, check_folder, check_images, table

# ImageFolder sorts the classes by name, so a digit's index is not the digit: classes.txt tells.
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = BUILD / "data" / "digits"
PHOTOGRAPHS = BUILD / "data" / "photographs"
# Not the seed of the training: whoever tries several seeds has one test split for all of them.
SPLIT_SEED = 0
VAL_SHARE = TEST_SHARE = 0.15
NETWORK_TIMEOUT = 30  # seconds without an answer or a byte


def write_digits(output: Path = DIGITS) -> Path:
    """Write the digits to `output`, or keep them if they are there already, and return `output`.

    The split is stratified and always the same; the directory appears complete or not at all.

    Raises:
        UserError: `output` exists and holds something else.
    """
    # scikit-learn takes a second to import; whoever only wants DIGITS does not wait for it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    everything = np.arange(len(digits.target))
    train, rest = train_test_split(
        everything, test_size=0.4, stratify=digits.target, random_state=SPLIT_SEED
    )
    val, test = train_test_split(
        rest, test_size=0.5, stratify=digits.target[rest], random_state=SPLIT_SEED
    )
    files = {
        f"{split}/{NAMES[digits.target[i]]}/{i:04}.png": i
        for split, indices in (("train", train), ("val", val), ("test", test))
        for i in indices
    }
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        found = {path.relative_to(output).as_posix() for path in output.rglob("*.png")}
        if found == files.keys():
            return output
        raise UserError(f"{output} exists but does not hold the digits; remove it or name another")
    with replacing(output) as partial:
        for name, i in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)
            Image.fromarray(grey).save(path)
    return output


def write_photographs(output: Path = PHOTOGRAPHS) -> Path:
    """The two photographs that scikit-learn ships, a temple and a flower, as JPEG files, for models
    that come without images. Kept if they are there already; returns `output`."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images()
    for name, pixels in zip(pictures.filenames, pictures.images, strict=True):
        path = output / Path(name).name
        if not path.exists():
            with replacing(path) as partial:
                Image.fromarray(pixels).save(partial, "jpeg", quality=95)
    return output


def from_folder(folder: Path, skip_bad: bool = False) -> Path:
    """Check a folder of images, split it where it is not split, and return it in the layout above.

    Nothing is copied: the layout, below build/data, is made of links. It is named after what is in
    it, so the same images give the same folder and other ones another.

    Raises:
        UserError: names what is wrong with the folder, and the files (`check_folder`).
    """
    return _lay_out(check_folder(folder, skip_bad), folder.resolve().name)


def from_torchvision(name: str) -> Path:
    """A classification data set of torchvision by name, such as `oxford_iiit_pet`, in the layout.

    torchvision downloads and reads it, below TORCH_HOME/datasets/OxfordIIITPet (the name of its
    class); what is there already is not fetched again. Class names are written as in
    `english_cocker_spaniel`.

    Raises:
        UserError: there is no such data set, it has no classes, or it cannot be fetched.
    """
    kind = _data_set(name)
    name = kind.__name__
    root = Path(torch.hub.get_dir()).parent / "datasets" / name
    parts: Parts = {}
    for part, arguments in _splits(kind):
        data = _open(kind, root, arguments)
        if data is not None:
            parts[part] = _by_class(data, BUILD / "data" / f"{name}-images" / part)
    if set(parts) == {"val"} or not parts:
        raise UserError(f"torchvision's {kind.__name__} has no part to learn from")
    if len(parts) == 1:
        parts = {WHOLE: parts.popitem()[1]}
    # Public data sets have their duplicates; they are left out and noted, nobody can edit them.
    return _lay_out(check_images(parts, [], root, skip_bad=True), name)


def split(parts: Parts) -> Parts:
    """Cut what is missing of `val` and `test` from the images to learn from: of each class the same
    share, at least one image, always the same ones."""
    parts = dict(parts)
    parts["train"] = whole = parts.pop(WHOLE, None) or parts["train"]
    for part, share in (("test", TEST_SHARE), ("val", VAL_SHARE)):
        if part in parts:
            continue
        parts[part], rest = {}, {}
        for number, (name, paths) in enumerate(sorted(parts["train"].items())):
            order = np.random.default_rng([SPLIT_SEED, number]).permutation(len(paths))
            count = max(1, round(share * len(whole[name])))
            parts[part][name] = sorted(paths[i] for i in order[:count])
            rest[name] = sorted(paths[i] for i in order[count:])
        parts["train"] = rest
    return parts


@dataclass(frozen=True)
class Loader:
    """Reads an image file and transforms it into an array of (3, height, width)."""

    transform: Callable[[Image.Image], np.ndarray]

    def __call__(self, path: str) -> torch.Tensor:
        try:
            with Image.open(path) as image:
                return torch.from_numpy(self.transform(image))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} cannot be read as an image: {error}") from error


def read_images(folder: Path, transform: Callable[[Image.Image], np.ndarray]) -> ImageFolder:
    """The images of a folder with one sub-folder a class, as pairs of tensor and class index.

    Raises:
        UserError: there is no such folder, or an image, once it is asked for, cannot be read.
    """
    try:
        return ImageFolder(folder, loader=Loader(transform), is_valid_file=_is_image)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} must have a sub-folder of images for each class") from error


def _is_image(path: str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES


def _lay_out(checked: Checked, name: str) -> Path:
    """Links to the images in the layout above, complete or not at all."""
    print(table(Checked(parts := split(checked.parts), [])))
    for note in checked.notes:
        print(f"note: {note}")
    links = {
        # The name will be part of an address on S3: plain, and not longer than a file's may be.
        f"{part}/{label}/{i:05}-{slug(path.stem)[:80]}{path.suffix.lower()}": path.resolve()
        for part, classes in sorted(parts.items())
        for label, paths in sorted(classes.items())
        for i, path in enumerate(paths)
    }
    content = "\0".join(f"{link}\0{path}" for link, path in links.items())
    digest = hashlib.sha256(os.fsencode(content)).hexdigest()[:12]
    output = BUILD / "data" / f"{name}-{digest}"
    if not output.exists():
        with replacing(output) as partial:
            for link, path in links.items():
                (partial / link).parent.mkdir(parents=True, exist_ok=True)
                (partial / link).symlink_to(path)
    print(f"as train, val and test: {shown(output)}")
    return output


def _data_set(name: str) -> type[VisionDataset]:
    """torchvision's class for `oxford_iiit_pet`, `OxfordIIITPet` and the like."""
    known = {
        kind.__name__.lower(): kind
        for kind in vars(torchvision.datasets).values()
        if inspect.isclass(kind)
        and issubclass(kind, VisionDataset)
        and {"root", "download"} <= _parameters(kind).keys()
    }
    key = re.sub(r"[^a-z0-9]", "", str(name).lower())
    if key not in known:
        close = difflib.get_close_matches(key, known, n=3) or ["oxfordiiitpet"]
        names = ", ".join(known[match].__name__ for match in close)
        raise UserError(f"torchvision cannot fetch a data set {name!r}; try {names}")
    return known[key]


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Those of the constructor, and of its base class where the rest is handed on."""
    found = dict(inspect.signature(kind.__init__).parameters)
    if "kwargs" in found:
        found = _parameters(kind.__mro__[1]) | found
    return found


def _splits(kind: type) -> list[tuple[str, dict]]:
    """What to call the constructor with for each part; a value that it refuses is not there."""
    parameters = _parameters(kind)
    if kind.__name__ == "EMNIST":
        letters = {"split": "letters"}
        return [("train", {**letters, "train": True}), ("test", {**letters, "train": False})]
    if kind.__name__ == "OxfordIIITPet":
        return [("train", {"split": "trainval"}), ("test", {"split": "test"})]
    if "split" in parameters:
        values = [("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test")]
        return [(part, {"split": value}) for part, value in values]
    if "train" in parameters:
        return [("train", {"train": True}), ("test", {"train": False})]
    return [("train", {})]


def _open(kind: type, root: Path, arguments: dict) -> VisionDataset | None:
    """The data set from disk, else from the network; None if it has no such split."""
    if "loader" in _parameters(kind):
        arguments = {**arguments, "loader": Path}  # so that it gives files instead of pictures
    try:
        return kind(root=root, download=False, **arguments)
    except ValueError:
        return None
    except (RuntimeError, FileNotFoundError):
        pass  # not there yet
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)  # torchvision would wait without end
    try:
        if root.exists():  # with archives that somebody has put there, perhaps
            kind(root=root, download=True, **arguments)
        else:  # torchvision takes a half unpacked archive for a whole one
            with replacing(root) as partial:
                kind(root=partial, download=True, **arguments)
        return kind(root=root, download=False, **arguments)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"torchvision's {kind.__name__} could not be fetched "
            f"({getattr(error, 'reason', error)}); connect to the network, or put its files below "
            f"{root}, as torchvision lays them out"
        ) from error
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"torchvision's {kind.__name__} below {root}: {error}; "
            "remove that folder to fetch it again"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _by_class(data: VisionDataset, images: Path) -> dict[str, list[Path]]:
    """The files of a data set by class; one that comes in an array is written to `images`."""
    classes = getattr(data, "classes", None) or getattr(data, "categories", None)
    if not classes or not all(isinstance(name, str) for name in classes):
        raise UserError(
            f"torchvision's {type(data).__name__} does not say what its classes are called; "
            "take a folder with one sub-folder a class instead"
        )
    names = [slug(name) for name in classes]
    if len(set(names)) < len(names):
        names = [f"{number:03}_{name}" for number, name in enumerate(names)]
    files = getattr(data, "_images", None)  # OxfordIIITPet: has no `loader`, but a list of files
    found: dict[str, list[Path]] = {name: [] for name in names}
    for i in tqdm(range(len(data)), f"reading {type(data).__name__}", unit="image"):
        if files is not None:
            path, label = Path(files[i]), data._labels[i]
        else:
            path, label = data[i]
        if isinstance(path, Image.Image):
            picture, path = path, images / names[label] / f"{i:06}.png"
            if not path.exists():
                with replacing(path) as partial:
                    picture.save(partial, "png")
        found[names[label]].append(path)
    return found


def slug(name: str) -> str:
    """`English Cocker Spaniel` → `english_cocker_spaniel`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "_"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data",
        description="Bring images into the layout that training reads: train, val, test.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--folder", type=Path, help="images of your own, one sub-folder a class")
    source.add_argument("--dataset", help="a data set of torchvision, such as oxford_iiit_pet")
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad images, and say so")
    parser.add_argument(
        "--output", type=Path, default=DIGITS, help="of the digits (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.folder:
        from_folder(args.folder, args.skip_bad)
    elif args.dataset:
        from_torchvision(args.dataset)
    else:
        output = write_digits(args.output)
        for part in ("train", "val", "test"):
            print(f"{output / part}: {sum(1 for _ in (output / part).glob('*/*.png'))} images")


if __name__ == "__main__":
    run(main)
