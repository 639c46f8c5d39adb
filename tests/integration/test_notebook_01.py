"""Notebook 01 from its parameters alone, once for each source that needs no network."""

import json
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from torch import nn

from local.paths import ROOT
from training.model import TrainedModel, build

sys.path.append(str(ROOT / "tests" / "unit"))
import photographs

ARCHITECTURE = "squeezenet1_1"
SETTINGS = {"resize": 36, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
TRAINING = {"ARCHITECTURE": ARCHITECTURE, "IMAGE_SIZE": 32, "EPOCHS": 1, "WEIGHTS": "random"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Execute the notebook with a build folder of its own; gives the model and what was printed."""
    monkeypatch.setenv("BUILD_DIR", str(tmp_path / "build"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def run(**parameters) -> tuple[TrainedModel, str]:
        papermill.execute_notebook(
            ROOT / "notebooks" / "01_train.ipynb",
            tmp_path / "executed.ipynb",
            json.loads(json.dumps(parameters, default=str)),
            cwd=ROOT / "notebooks",
            progress_bar=False,
        )
        executed = nbformat.read(tmp_path / "executed.ipynb", as_version=4)
        outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
        assert any("Not measured" in str(o) or "Accuracy" in str(o) for o in outputs)
        printed = "".join(output.get("text", "") for output in outputs)
        return TrainedModel.load(tmp_path / "build" / "model" / "checkpoint.pt"), printed

    return run


@pytest.fixture
def classes(tmp_path) -> Path:
    (tmp_path / "names.txt").write_text("temple\nblossom\nbridge\n")
    return tmp_path / "names.txt"


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return build(ARCHITECTURE, 3).eval()


def test_a_folder_of_photographs(run, tmp_path):
    folder = photographs.write(tmp_path / "photos", 12)
    trained, printed = run(MODEL_SOURCE="folder", DATA=folder, **TRAINING)
    assert trained.classes == ["china", "flower"]
    assert trained.metrics["test_images"] == 4 and len(trained.history) == 1
    assert "95 % confidence interval" in printed
    _, printed = run(MODEL_SOURCE="folder", DATA=folder, **TRAINING)
    assert "reused" in printed


def test_a_data_set_of_torchvision(run, tmp_path):
    photographs.write(tmp_path / "torch" / "datasets" / "EuroSAT" / "eurosat" / "2750", 12)
    trained, _ = run(MODEL_SOURCE="dataset", DATA="eurosat", **TRAINING)
    assert trained.classes == ["china", "flower"] and trained.configuration["source"] == "dataset"


def test_torchvisions_pretrained_weights(run, tmp_path):
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(build("resnet18", 1000).state_dict(), cache / "resnet18-f37072fd.pth")
    trained, printed = run(MODEL_SOURCE="pretrained", ARCHITECTURE="resnet18")
    assert trained.classes[:2] == ["tench", "goldfish"] and "not measured" in printed


def test_a_state_dict(run, tmp_path, classes, network):
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    trained, _ = run(
        MODEL_SOURCE="checkpoint",
        ARCHITECTURE=ARCHITECTURE,
        MODEL_FILE=tmp_path / "weights.pth",
        CLASSES_FILE=classes,
        PREPROCESSING=SETTINGS,
    )
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(trained.model(image), network(image))
    assert trained.preprocessing.crop == 32


def test_a_torchscript_file_measured_on_images(run, tmp_path, network):
    folder = photographs.write(tmp_path / "photos", 8)
    (tmp_path / "names.txt").write_text("flower\nchina\nbridge\n")
    with torch.no_grad():
        torch.jit.trace(network, torch.rand(1, 3, 32, 32)).save(str(tmp_path / "theirs.pt"))
    trained, printed = run(
        MODEL_SOURCE="torchscript",
        MODEL_FILE=tmp_path / "theirs.pt",
        CLASSES_FILE=tmp_path / "names.txt",
        PREPROCESSING=SETTINGS,
        DATA=folder,
    )
    assert trained.architecture == "theirs" and trained.archive
    assert "test images are right" in printed and trained.metrics["test_images"] == 2


def test_a_module_of_ones_own(run, tmp_path, classes):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))\n"
    )
    trained, _ = run(
        MODEL_SOURCE="module", MODEL_FILE=f"{tmp_path}/own.py:make", CLASSES_FILE=classes
    )
    assert trained.classes == ["temple", "blossom", "bridge"]
    assert trained.model(torch.rand(2, 3, 224, 224)).shape == (2, 3)


def test_a_mistake_is_a_sentence(run, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="there is no folder") as error:
        run(MODEL_SOURCE="folder", DATA=tmp_path / "nowhere")
    assert error.value.ename == "UserError"
