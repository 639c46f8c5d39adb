"""Folders of real photographs: cuts from the two that scikit-learn ships."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def cuts(count: int, seed: int = 0, size: int = 40) -> dict[str, list[Image.Image]]:
    """`count` different cuts, scaled to `size` pixels, of `china` (a temple) and of `flower`."""
    rng = np.random.default_rng(seed)
    pictures = {}
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        pictures[name] = []
        for _ in range(count):
            side = int(rng.integers(100, 300))
            top, left = (int(rng.integers(0, length - side)) for length in pixels.shape[:2])
            cut = Image.fromarray(pixels[top : top + side, left : left + side])
            pictures[name].append(cut.resize((size, size)))
    return pictures


def write(root: Path, count: int, seed: int = 0) -> Path:
    """A folder with one sub-folder a class, of JPEG files."""
    for name, pictures in cuts(count, seed).items():
        (root / name).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            picture.save(root / name / f"{i:03}.jpg")
    return root
