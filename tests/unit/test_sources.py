"""Models from elsewhere: torchvision's, state_dicts, TorchScript files, modules of one's own."""

import copy
import io
import json
import sys
from types import SimpleNamespace
from typing import NamedTuple

import photographs
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from local.cli import UserError
from preprocessing import IMAGENET, Preprocessing
from training import model_card
from training.convert import to_module
from training.model import TrainedModel, build
from training.sources import fine_tunable, read_class_names, read_preprocessing
from training.train import get_model

ARCHITECTURE = "squeezenet1_1"
SIZE = Preprocessing(36, 32, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torchvision's, empty; a proxy on a port where nothing listens: nothing leaves the machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "torch"


@pytest.fixture
def weights_file(cache):
    url = torchvision.models.get_model_weights(ARCHITECTURE).DEFAULT.url
    return cache / "hub" / "checkpoints" / url.split("/")[-1]


@pytest.fixture
def classes(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    return tmp_path / "names.txt"


@pytest.fixture
def network():
    torch.manual_seed(3)
    return build(ARCHITECTURE, 3).eval()


def script(module: nn.Module, path, size=32):
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(module.eval(), torch.rand(1, 3, size, size)), path)
    return path


def test_pretrained_weights_come_through_torchvisions_cache(weights_file, tmp_path):
    network = build(ARCHITECTURE, 1000).eval()
    torch.save(network.state_dict(), weights_file)
    trained = get_model("pretrained", architecture=ARCHITECTURE, output=tmp_path / "out")
    assert len(trained.classes) == 1000 and trained.classes[0] == "tench"
    assert trained.preprocessing == IMAGENET
    image = torch.rand(1, 3, 224, 224)
    assert torch.equal(trained.model(image), network(image))
    assert TrainedModel.load(tmp_path / "out/checkpoint.pt").fingerprint() == trained.fingerprint()


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", "resnet50"])
def test_weights_are_chosen_by_name_with_their_own_preprocessing(cache, architecture, tmp_path):
    for weights in torchvision.models.get_model_weights(architecture):
        file = cache / "hub" / "checkpoints" / weights.url.split("/")[-1]
        torch.save(build(architecture, 1000).state_dict(), file)
        trained = get_model(
            "pretrained", architecture=architecture, weights=weights.name, output=tmp_path / "out"
        )
        assert trained.preprocessing.resize == weights.transforms().resize_size[0]
        assert trained.configuration["weights"] == str(weights)


def test_pretrained_without_a_network_says_where_to_put_the_file(weights_file, tmp_path):
    with pytest.raises(UserError, match="could not be fetched") as error:
        get_model("pretrained", architecture=ARCHITECTURE, output=tmp_path / "out")
    assert str(weights_file) in str(error.value)
    assert not weights_file.exists()


def test_damaged_or_unknown_pretrained_weights_are_named(weights_file, tmp_path):
    weights_file.write_bytes(b"half a download")
    with pytest.raises(UserError, match=weights_file.name):
        get_model("pretrained", architecture=ARCHITECTURE, output=tmp_path / "out")
    with pytest.raises(UserError, match="IMAGENET1K_V1"):
        get_model("pretrained", architecture="resnet18", weights="V9", output=tmp_path / "out")


def test_fine_tuning_starts_from_pretrained_weights(weights_file, tmp_path):
    torch.manual_seed(5)
    taken = build(ARCHITECTURE, 1000).state_dict()
    torch.save(taken, weights_file)
    model, _, preprocessing = fine_tunable(ARCHITECTURE, ["a", "b"], "DEFAULT")
    own = model.state_dict()
    assert preprocessing == IMAGENET
    assert own["classifier.1.weight"].shape[0] == 2
    assert all(torch.equal(own[n], taken[n]) for n in own if not n.startswith("classifier.1"))
    assert fine_tunable(ARCHITECTURE, ["a", "b"], str(weights_file))[2] is None
    with pytest.raises(UserError, match="do not fit resnet18"):
        fine_tunable("resnet18", ["a", "b"], str(weights_file))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    ],
    ids=["bare", "state_dict", "DataParallel"],
)
def test_a_state_dict_with_a_classes_file(network, classes, tmp_path, wrap):
    torch.save(wrap(network.state_dict()), tmp_path / "weights.pth")
    trained = get_model(
        "checkpoint",
        architecture=ARCHITECTURE,
        model_file=tmp_path / "weights.pth",
        classes_file=classes,
        preprocessing={"resize": 36, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
        output=tmp_path / "out",
    )
    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(trained.model(image), network(image))
    assert trained.classes == ["cat", "dog", "bird"] and trained.preprocessing == SIZE


def test_weights_that_do_not_fit_get_a_sentence(network, classes, tmp_path):
    def take(content, names=classes, architecture=ARCHITECTURE):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(UserError) as error:
            get_model(
                "checkpoint",
                architecture=architecture,
                model_file=tmp_path / "weights.pth",
                classes_file=names,
                output=tmp_path / "out",
            )
        return str(error.value)

    assert "do not fit resnet18 with 3 classes" in take(
        network.state_dict(), architecture="resnet18"
    )
    assert "file of class names" in take(network.state_dict(), None)
    assert "execute code" in take(network)
    assert "does not hold a state_dict" in take({"a": 1})
    assert "does not hold a state_dict" in take([1, 2])


def test_a_torchscript_file_answers_as_before_from_file_to_checkpoint(network, classes, tmp_path):
    path = script(network, tmp_path / "My Model.v2.pt")
    trained = get_model(
        "torchscript",
        model_file=path,
        classes_file=classes,
        preprocessing=SIZE,
        output=tmp_path / "out",
    )
    assert trained.architecture == "my_model_v2"
    assert trained.archive == path.read_bytes()
    loaded = TrainedModel.load(tmp_path / "out" / "checkpoint.pt")
    assert isinstance(loaded.model, torch.jit.ScriptModule)
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["classes"]
    image = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded.model(image), network(image))
    assert loaded.fingerprint() == trained.fingerprint()
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\nbird\n"


@pytest.mark.parametrize("source", ["torchscript", "module"])
def test_probabilities_are_served_as_such(source, network, classes, tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "from torch import nn\nfrom training.model import build\n"
        f"make = lambda: nn.Sequential(build('{ARCHITECTURE}', 3), nn.Softmax(1))\n"
    )
    torch.manual_seed(3)
    module = nn.Sequential(build(ARCHITECTURE, 3), nn.Softmax(1)).eval()
    script(module, tmp_path / "model.pt")
    torch.save(module.state_dict(), tmp_path / "weights.pth")
    trained = get_model(
        source,
        model_file=tmp_path / "model.pt" if source == "torchscript" else f"{tmp_path}/own.py:make",
        weights=tmp_path / "weights.pth" if source == "module" else None,
        classes_file=classes,
        preprocessing=SIZE,
        output=tmp_path / "out",
    )
    assert "logarithms" in capsys.readouterr().out
    image = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(trained.model(image).softmax(1), module(image), atol=1e-5)


class Answering(nn.Module):
    """A network's logits, in the forms in which they come."""

    def __init__(self, network: nn.Module, form: str):
        super().__init__()
        self.network, self.form = network, form

    def forward(self, x):
        if self.form == "half":
            return self.network(x)
        if self.form == "tuple":
            return self.network(x), x
        return {"hidden": x, "logits": self.network(x)}


@pytest.mark.parametrize("source", ["torchscript", "module"])
@pytest.mark.parametrize(
    ("form", "sentence"),
    [("half", "half precision"), ("tuple", "more than logits"), ("dict", "more than logits")],
)
def test_logits_are_found(source, form, sentence, network, classes, tmp_path, capsys, monkeypatch):
    model = Answering(copy.deepcopy(network), form)
    if form == "half":
        model = model.half()
    monkeypatch.setitem(sys.modules, "somebodys", SimpleNamespace(make=lambda: model))
    if source == "torchscript":
        example = torch.rand(1, 3, 32, 32, dtype=torch.half if form == "half" else None)
        torch.jit.save(torch.jit.trace(model, example, strict=False), tmp_path / "model.pt")
    trained = get_model(
        source,
        model_file=tmp_path / "model.pt" if source == "torchscript" else "somebodys:make",
        classes_file=classes,
        preprocessing=SIZE,
        output=tmp_path / "out",
    )
    assert sentence in capsys.readouterr().out
    image = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(trained.model(image), network(image), atol=1e-2)


class Auxiliary(NamedTuple):
    logits: torch.Tensor
    auxiliary: torch.Tensor | None


class Scripted(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x):
        return Auxiliary(self.network(x), None)


def test_a_scripted_tuple_with_nothing_in_it(network, classes, tmp_path):
    torch.jit.save(torch.jit.script(Scripted(network)), tmp_path / "model.pt")
    trained = get_model(
        "torchscript",
        model_file=tmp_path / "model.pt",
        classes_file=classes,
        preprocessing=SIZE,
        output=tmp_path / "out",
    )
    image = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(trained.model(image), network(image), atol=1e-5)
        assert torch.allclose(to_module(trained.model, image)(image), network(image), atol=1e-5)


def test_torchscript_files_that_cannot_be_served(network, classes, tmp_path):
    def take(path, names=classes, preprocessing=SIZE):
        with pytest.raises(UserError) as error:
            get_model(
                "torchscript",
                model_file=path,
                classes_file=names,
                preprocessing=preprocessing,
                output=tmp_path / "out",
            )
        return str(error.value)

    (tmp_path / "text.pt").write_text("no model")
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    good = script(network, tmp_path / "good.pt")
    assert "no file" in take(tmp_path / "none.pt")
    assert "not a TorchScript file" in take(tmp_path / "text.pt")
    assert "3 outputs, but there are 2 classes" in take(good, tmp_path / "two.txt")
    assert "names of the classes" in take(good, None)
    assert "one row of numbers" in take(script(nn.Flatten(0), tmp_path / "flat.pt"))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    assert "fails on images of 3 x 224 x 224" in take(
        script(flat, tmp_path / "flat.pt"), preprocessing=None
    )


def test_the_image_size_alone_is_enough(classes, tmp_path):
    """A network that takes nothing but 48 x 48 pixels."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 3))
    path = script(network, tmp_path / "flat.pt", size=48)
    trained = get_model(
        "torchscript",
        model_file=path,
        classes_file=classes,
        image_size=48,
        output=tmp_path / "out",
    )
    assert trained.preprocessing == Preprocessing(55, 48, IMAGENET.mean, IMAGENET.std)


OWN = """
from pathlib import Path
import torch
from torch import nn
import beside

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, beside.CLASSES)
    def forward(self, x):
        return self.layer(x.mean((2, 3)))

class Branching(Net):
    def forward(self, x):
        return self.layer(x.mean((2, 3))) * (1 if x.mean() > 0.01 else -5)

def fails():
    raise ValueError("no disk")

def gives_text():
    return "model"
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("CLASSES = 3\n")
    return tmp_path / "own.py"


def test_a_module_of_ones_own_with_weights(own, classes, tmp_path):
    torch.manual_seed(1)
    layer = nn.Linear(3, 3)
    state = {f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    trained = get_model(
        "module",
        model_file=f"{own}:Net",
        weights=tmp_path / "weights.pth",
        classes_file=classes,
        preprocessing=SIZE,
        output=tmp_path / "out",
    )
    assert trained.architecture == "net"
    own.unlink()  # the checkpoint does not need the code any more
    loaded = TrainedModel.load(tmp_path / "out" / "checkpoint.pt")
    image = torch.rand(2, 3, 32, 32)
    assert torch.allclose(loaded.model(image), layer(image.mean((2, 3))))


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("own.py", "must look like"),
        ("none.py:Net", "there is no file"),
        ("own.py:Nothing", "has no function Nothing"),
        ("own.py:fails", r"own\.py:\d+: ValueError: no disk"),
        ("own.py:gives_text", "returned str"),
        ("own.py:Branching", "does not record"),
        ("no_such_package:make", "No module named 'no_such_package'"),
    ],
)
def test_modules_that_cannot_be_taken(own, classes, tmp_path, reference, sentence, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.warns() if "Branching" in reference else pytest.MonkeyPatch.context(),
        pytest.raises(UserError, match=sentence),
    ):
        get_model(
            "module",
            model_file=reference,
            classes_file=classes,
            preprocessing=SIZE,
            output=tmp_path / "out",
        )


def test_class_names_in_the_forms_in_which_they_come(tmp_path, capsys):
    def read(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_class_names(tmp_path / name)

    assert read("a.txt", "\ufeffcat\r\ndog \r\n\r\n") == ["cat", "dog"]
    assert read("a.json", '["cat", "dog"]') == ["cat", "dog"]
    assert read("f.json", '{"dog": 1, "cat": 0}') == ["cat", "dog"]
    keras = {str(i): [f"n{i}", name] for i, name in enumerate(["cat", "dog"])}
    assert read("b.json", json.dumps(keras)) == ["cat", "dog"]
    assert read("c.txt", "crane\ndog\ncrane\n") == ["crane", "dog", "crane (2)"]
    assert "there twice" in capsys.readouterr().out
    for name, text in (
        ("d.txt", ""),
        ("e.txt", "cat\n\ndog\n"),
        ("d.json", "{1"),
        ("e.json", "[1]"),
    ):
        with pytest.raises(UserError, match="class"):
            read(name, text)
    with pytest.raises(UserError, match="cannot be read"):
        read_class_names(tmp_path / "none.txt")


def test_preprocessing_in_the_forms_in_which_it_is_given(tmp_path):
    (tmp_path / "p.json").write_text(SIZE.to_json())
    assert read_preprocessing(None) is None
    assert read_preprocessing("imagenet") == IMAGENET
    assert read_preprocessing(SIZE.to_json()) == SIZE
    assert read_preprocessing(str(tmp_path / "p.json")) == SIZE
    for wrong in ("none.json", "{", {"resize": 1}, {"resize": object()}):
        with pytest.raises(UserError, match="preprocessing"):
            read_preprocessing(wrong)


def test_images_calibrate_and_measure_a_model_from_elsewhere(tmp_path):
    """Colours are told apart by their channel; the classes are not in the folders' order."""
    for name, colour in (("blue", 2), ("green", 1), ("red", 0)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            pixel = [20 + i] * 3
            pixel[colour] = 200
            Image.new("RGB", (40, 40), tuple(pixel)).save(tmp_path / "data" / name / f"{i}.png")

    class Brightest(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    script(Brightest(), tmp_path / "brightest.pt")
    (tmp_path / "rgb.txt").write_text("red\ngreen\nblue\n")
    arguments = {
        "model_file": tmp_path / "brightest.pt",
        "classes_file": tmp_path / "rgb.txt",
        "preprocessing": SIZE,
        "output": tmp_path / "out",
    }
    trained = get_model("torchscript", data=tmp_path / "data", **arguments)
    assert trained.metrics["test_accuracy"] == 1.0 and trained.metrics["test_images"] == 3
    assert "Accuracy 100.0%" in (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert (trained.data_folder / "test" / "red").is_dir()
    (tmp_path / "data" / "red").rename(tmp_path / "data" / "rouge")
    with pytest.raises(UserError, match="class 'rouge', which the model does not know"):
        get_model("torchscript", data=tmp_path / "data", **arguments)


def test_the_card_tells_the_whole_story(tmp_path):
    folder = photographs.write(tmp_path / "photos", 12)
    trained = get_model(
        "folder",
        architecture=ARCHITECTURE,
        data=folder,
        weights="random",
        epochs=2,
        image_size=32,
        output=tmp_path / "out",
    )
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert card == model_card.write(TrainedModel.load(tmp_path / "out" / "checkpoint.pt"))
    assert trained.fingerprint() in card
    for fact in ("95 % interval", "china", "flower", "calibration error", "37 pixels"):
        assert fact in card
    low, high = (trained.metrics[f"test_accuracy_{end}"] for end in ("low", "high"))
    assert low <= trained.metrics["test_accuracy"] <= high


def test_sources_that_lack_what_they_need(tmp_path):
    for source in ("folder", "dataset"):
        with pytest.raises(UserError, match="needs the data"):
            get_model(source, output=tmp_path)
    for source in ("torchscript", "module"):
        with pytest.raises(UserError, match="needs the model"):
            get_model(source, classes_file=tmp_path / "names.txt", output=tmp_path)
    for epochs in (0, 1.5, "3"):
        with pytest.raises(UserError, match="epochs"):
            get_model("digits", epochs=epochs, output=tmp_path)


def test_weights_that_are_no_zip_are_not_loaded(tmp_path, classes):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1)}, buffer)
    (tmp_path / "half.pth").write_bytes(buffer.getvalue()[:100])
    with pytest.raises(UserError, match="damaged or not a file of torch"):
        get_model(
            "checkpoint",
            model_file=tmp_path / "half.pth",
            classes_file=classes,
            output=tmp_path / "out",
        )
