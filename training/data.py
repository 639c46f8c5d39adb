"""scikit-learn's handwritten digits as a folder of images: `python -m training.data`.

1,797 scans of 8 x 8 pixels (https://archive.ics.uci.edu/dataset/80), shipped inside scikit-learn,
so nothing is downloaded. They are written in the layout that torchvision's ImageFolder reads, as
images of any other origin would be:

    digits/train/seven/0042.png     60 %
    digits/val/...                  20 %: chooses the best epoch
    digits/test/...                 20 %: seen once, after training
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from local.atomic import replacing
from local.cli import UserError, run
from local.paths import BUILD

# ImageFolder sorts the classes by name, so a digit's index is not the digit: classes.txt tells.
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = BUILD / "data" / "digits"
SPLIT_SEED = 0


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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.data", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=DIGITS, help="default: %(default)s")
    output = write_digits(parser.parse_args().output)
    for split in ("train", "val", "test"):
        print(f"{output / split}: {sum(1 for _ in (output / split).glob('*/*.png'))} images")


if __name__ == "__main__":
    run(main)
