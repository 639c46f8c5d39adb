"""The variants of a small model that could be served, on a small folder of images.

The serving environment is this process here; tests/integration/test_kinds.py has the layer's.
"""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import small
from PIL import Image
from torch import nn

from local.cli import UserError
from model import Model
from preprocessing import Preprocessing
from training import optimize
from training.bundle import chosen_model, create, read_settings, settings_of
from training.model import TrainedModel
from training.trace import (
    compare,
    freeze,
    load_images,
    load_network,
    run_model,
    serialize,
    trace_module,
)

CLASSES = ["dark", "light", "other"]
SMALL = Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3)


def check_in_process(path, preprocessing, images, packages, expected):
    """What `training.trace.check_in_serving` answers, without another interpreter."""
    inputs = load_images(images, preprocessing)
    loaded = load_network(path, preprocessing.crop)
    comparison = compare(expected, run_model(loaded, inputs), {})
    return replace(comparison, engine=loaded.engine, milliseconds=1.0)


@pytest.fixture(autouse=True)
def serving(monkeypatch):
    monkeypatch.setattr(optimize, "check_in_serving", check_in_process)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    chance = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (folder / name).mkdir()
        for i in range(4):
            pixels = chance.integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return sorted(folder.rglob("*.png"))


@pytest.fixture(scope="module")
def trained():
    return TrainedModel("small", {}, CLASSES, SMALL, small(3, SMALL.crop))


@pytest.mark.parametrize("name", list(optimize.SUFFIXES))
def test_each_variant_is_served_as_it_was_measured(name, trained, images, tmp_path):
    made = optimize.make(trained, name, images, tmp_path, images, 1.0)
    optimize.choose(trained, made)
    path = chosen_model(tmp_path)
    bundle = create(path, CLASSES, SMALL, tmp_path / "model.tar.gz", settings_of(path))
    model = Model.from_archive(io.BytesIO(bundle.read_bytes()), "the bundle")
    assert (model.kind, model.name) == ("export" if name == "export" else "torchscript", "small")
    assert model.network.engine == made.engine
    pictures = [Image.open(path) for path in images]
    expected = trained.model(torch.stack([torch.from_numpy(SMALL(p)) for p in pictures]))
    difference = np.abs(model.predict(pictures) - expected.softmax(1).detach().numpy()).max()
    assert difference < (0.05 if name == "int8" else 1e-4)
    first = path.read_bytes()
    optimize.make(trained, name, images, tmp_path, images, 1.0)
    assert path.read_bytes() == first


def test_a_variant_that_loses_too_much_is_refused_and_removed(trained, images, tmp_path):
    with pytest.raises(UserError, match=r"loses .* more than the accepted -100\.0"):
        optimize.make(trained, "int8", images, tmp_path, images, -1.0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_differently_is_refused_and_removed(
    trained, images, tmp_path, monkeypatch
):
    def another(_trained, _images, path):
        torch.manual_seed(1)
        other = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).eval()
        path.write_bytes(serialize(freeze(trace_module(other, torch.zeros(1, 3, 32, 32)))))

    monkeypatch.setattr(optimize, "trace", another)
    with pytest.raises(UserError, match="fp32 answers differently"):
        optimize.make(trained, "fp32", images, tmp_path, None, 1.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "difference"), [("fp32", 1e-5), ("int8", 0.1), ("export", 1e-5)])
def test_a_torchscript_file_has_all_variants_too(name, difference, trained, images, tmp_path):
    script = trace_module(trained.model, torch.zeros(1, 3, 32, 32))
    own = TrainedModel("own", {}, CLASSES, SMALL, script)
    made = optimize.make(own, name, images, tmp_path, images, 1.0)
    assert made.max_difference < difference
    expected = optimize.make(trained, name, images, tmp_path, images, 1.0)
    assert made.engine == expected.engine
    assert abs(made.bytes - expected.bytes) < 0.1 * expected.bytes


def test_freezing_twice_is_freezing(trained):
    assert freeze(freeze(trace_module(trained.model, torch.zeros(1, 3, 32, 32))))


def test_int8_without_images_names_what_it_needs(trained, images, tmp_path):
    with pytest.raises(UserError, match="name a folder"):
        optimize.make(trained, "int8", images, tmp_path)
    with pytest.raises(UserError, match="no variant 'int4'"):
        optimize.make(trained, "int4", images, tmp_path)


def test_labels_are_the_names_of_folders(images):
    assert optimize.labels_of(images, CLASSES).tolist() == [0] * 4 + [1] * 4
    assert optimize.labels_of(images, ["dark"]) is None


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"file": "../x.pt"}, {"name": 3}, {"temperature": "1"}, {"file": None}],
)
def test_unusable_settings_are_named(change, tmp_path):
    good = {"format": 1, "file": "x.pt", "name": "x", "temperature": 1.5}
    path = tmp_path / "model.json"
    path.write_text(json.dumps(good))
    assert read_settings(path).temperature == 1.5
    path.write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=r"model\.json"):
        read_settings(path)
