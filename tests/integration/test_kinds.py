"""Every kind of model under AWS's runtime emulator, with the real layer."""

import io
import json

import pytest
import torch
from PIL import Image
from test_deploy import BUCKET
from test_invoke import files, invoke  # noqa: F401 (a fixture)

from model import Model
from preprocessing import Preprocessing
from training import optimize
from training.bundle import create, settings_of
from training.model import TrainedModel, build
from training.upload import upload

SMALL = Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3)
CLASSES = ["first", "second", "third"]


@pytest.mark.parametrize("variant", list(optimize.SUFFIXES))
def test_the_layer_answers_as_this_environment_does(files, variant, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    trained = TrainedModel("resnet18", {}, CLASSES, SMALL, build("resnet18", 3).eval())
    images = [files / "red.png"]
    made = optimize.make(trained, variant, images, tmp_path, images, 1.0)
    assert made.bytes < (12e6 if variant == "int8" else 50e6)
    optimize.choose(trained, made)
    bundle = create(made.path, CLASSES, SMALL, tmp_path / "b.tar.gz", settings_of(made.path))
    here = Model.from_archive(io.BytesIO(bundle.read_bytes()), "here")
    (expected,) = here.predict([Image.open(images[0])])
    key = f"models/{variant}.tar.gz"
    upload(bundle, BUCKET, key)
    variables = json.loads((files / "env.json").read_text())
    variables["PyTorchFunction"]["MODEL_KEY"] = key
    (files / "env.json").write_text(json.dumps(variables))
    done = invoke(files)
    body = json.loads(json.loads(done.stdout)["body"])
    assert body["class"] == CLASSES[expected.argmax()], done.stderr
    assert body["confidence"] == pytest.approx(float(expected.max()), abs=1e-3)
    assert here.network.engine in done.stderr
