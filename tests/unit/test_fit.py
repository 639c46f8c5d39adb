"""The training loop: interrupted and not, frozen, varied, stopped early."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import photographs
import pytest
import torch
from PIL import Image
from torch import nn

from preprocessing import IMAGENET, Preprocessing
from training.data import read_images
from training.fit import FINE_TUNING, Augmentation, Recipe, fit
from training.sources import head_of

SIZE = Preprocessing(32, 32, IMAGENET.mean, IMAGENET.std)
CPU = torch.device("cpu")
RECIPE = replace(FINE_TUNING, epochs=4, batch_size=8)  # frozen, then not, varied
HEAD = frozenset({"6.weight", "6.bias"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    photographs.write(root / "train", 12)
    photographs.write(root / "val", 6, seed=1)
    return root


def network() -> nn.Module:
    """Small, with what has state beside its weights: batch norm, and dropout's random numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(8, 2),
    )


def train(folder, recipe=RECIPE, head=HEAD, **options):
    torch.manual_seed(0)
    model = network()
    train = read_images(folder / "train", Augmentation(SIZE) if recipe.augment else SIZE)
    val = read_images(folder / "val", SIZE)
    with torch.random.fork_rng():
        history = fit(model, train, val, recipe, seed=0, device=CPU, head=head, **options)
    return model, history


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return train(folder)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_training_ends_with_the_same_weights(
    folder, uninterrupted, tmp_path, capsys, after
):
    def stop(history):
        if len(history) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(folder, progress=tmp_path / "training.pt", key="k", on_epoch=stop)
    model, history = train(folder, progress=tmp_path / "training.pt", key="k")
    assert f"after epoch {after}" in capsys.readouterr().out
    assert history == uninterrupted[1]
    assert same(model, uninterrupted[0])


def test_killed_at_any_moment_it_goes_on_with_the_same_result(folder, uninterrupted, tmp_path):
    """Real kills: the process dies without warning, twice, in the middle of an epoch."""
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import os, signal, test_fit, training.fit; from pathlib import Path\n"
        "step, left = training.fit.tqdm.update, [int(sys.argv[3])]\n"
        "def update(bar, n=1):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(bar, n)\n"
        "training.fit.tqdm.update = update\n"
        "test_fit.train(Path(sys.argv[1]), progress=Path(sys.argv[2]), key='k')\n"
    )
    progress = tmp_path / "training.pt"
    for batches in (4, 7):
        command = [sys.executable, "-c", code, str(folder), str(progress), str(batches)]
        killed = subprocess.run(command, capture_output=True, env=os.environ | _threads())
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    model, history = train(folder, progress=progress, key="k")
    assert history == uninterrupted[1] and same(model, uninterrupted[0])


def _threads() -> dict:
    """Sums are in another order with another number of threads."""
    return {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def test_progress_of_another_training_or_damaged_is_not_continued(
    folder, uninterrupted, tmp_path, capsys
):
    progress = tmp_path / "training.pt"
    train(folder, progress=progress, key="another")
    for content in (None, b"damaged"):
        if content:
            progress.write_bytes(content)
        model, _ = train(folder, progress=progress, key="k")
        assert same(model, uninterrupted[0])
    assert "going on" not in capsys.readouterr().out


def test_a_frozen_backbone_does_not_change_and_the_last_layer_does(folder):
    torch.manual_seed(0)
    before = network().state_dict()
    for frozen_epochs, expected in ((1, HEAD), (0, before.keys())):
        model, _ = train(folder, replace(RECIPE, epochs=1, frozen_epochs=frozen_epochs))
        after = model.state_dict()
        assert {name for name in after if not torch.equal(after[name], before[name])} == expected


def test_it_stops_when_no_epoch_is_better(folder):
    recipe = Recipe(epochs=30, batch_size=8, learning_rate=0.0, patience=2)
    _, history = train(folder, recipe, head=frozenset())
    assert len(history) <= 8  # batch norm's statistics alone do not help for long


def test_the_callers_hook_sees_every_epoch(folder):
    seen = []
    train(folder, replace(RECIPE, epochs=3), on_epoch=lambda history: seen.append(len(history)))
    assert seen == [1, 2, 3]


def test_augmentation_varies_within_the_values_of_the_plain_image():
    image = Image.fromarray(np.full((60, 90, 3), 128, np.uint8))
    torch.manual_seed(0)
    first, second = Augmentation(SIZE)(image), Augmentation(SIZE)(image)
    assert first.shape == (3, 32, 32) and first.dtype == np.float32
    assert not np.array_equal(first, second)
    assert np.abs(first - SIZE(image)).max() < 2.5


@pytest.mark.parametrize("architecture", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_the_last_layer_is_found_in_every_architecture(architecture):
    for classes in (2, 1000):
        assert len(head_of(architecture, classes)) == 2
