import gzip
import tarfile

import pytest
import torch

from local.cli import UserError
from preprocessing import IMAGENET, Preprocessing
from training.bundle import create
from training.model import build
from training.trace import serialize, trace_module

SMALL = Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3)
CLASSES = ["naïve", "two words", "three"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "squeezenet1_1.pt"
    network = build("squeezenet1_1", 3)
    path.write_bytes(serialize(trace_module(network, torch.rand(1, 3, 32, 32))))
    return path


def members(path) -> dict[str, bytes]:
    with tarfile.open(path, "r:gz") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_the_bundle_has_the_model_the_classes_and_the_preprocessing(model, tmp_path):
    content = members(create(model, CLASSES, SMALL, tmp_path / "model.tar.gz"))
    assert list(content) == ["squeezenet1_1.pt", "classes.txt", "preprocessing.json", "model.json"]
    assert content["squeezenet1_1.pt"] == model.read_bytes()
    assert content["classes.txt"].decode().splitlines() == CLASSES
    assert Preprocessing.from_json(content["preprocessing.json"].decode()) == SMALL


def test_without_preprocessing_it_is_left_out(model, tmp_path):
    content = members(create(model, CLASSES, None, tmp_path / "model.tar.gz"))
    assert list(content) == ["squeezenet1_1.pt", "classes.txt", "model.json"]


def test_the_same_inputs_give_the_same_bytes(model, tmp_path):
    first = create(model, CLASSES, SMALL, tmp_path / "one.tar.gz").read_bytes()
    model.touch()
    assert create(model, CLASSES, SMALL, tmp_path / "other.tgz").read_bytes() == first
    assert create(model, CLASSES, IMAGENET, tmp_path / "third.tgz").read_bytes() != first


def test_damage_is_found_by_the_checksum(model, tmp_path):
    data = bytearray(create(model, CLASSES, SMALL, tmp_path / "model.tar.gz").read_bytes())
    data[len(data) // 2] ^= 1
    with pytest.raises(gzip.BadGzipFile):
        gzip.decompress(data)


@pytest.mark.parametrize(
    ("classes", "sentence"),
    [
        ([], "no classes"),
        (["a", "b"], "3 outputs, but there are 2"),
        (["a", "b", "a"], "'a' is there twice"),
        (["a", "", "c"], "class 2"),
        (["a", "b\nc", "d"], "class 2"),
        (["a", "b", " c"], "class 3"),
    ],
)
def test_unusable_classes_are_refused(model, classes, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        create(model, classes, SMALL, tmp_path / "model.tar.gz")
    assert list(tmp_path.iterdir()) == []


def test_unusable_models_are_refused(model, tmp_path):
    output = tmp_path / "out" / "model.tar.gz"
    broken = tmp_path / "broken.pth"
    with pytest.raises(UserError, match="there is no model"):
        create(broken, CLASSES, SMALL, output)
    broken.write_bytes(model.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a TorchScript archive"):
        create(broken, CLASSES, SMALL, output)
    with pytest.raises(UserError, match=r"\*\.pt, \*\.pth or \*\.pt2"):
        create(model.with_suffix(".onnx"), CLASSES, SMALL, output)
    with pytest.raises(UserError, match="fails on an image of 2 x 2"):
        create(model, CLASSES, Preprocessing(2, 2, (0.5,) * 3, (0.5,) * 3), output)
    assert not output.exists()
