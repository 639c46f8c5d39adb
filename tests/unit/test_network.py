"""Networks as pytorch/network.py and pytorch/exported.py load them, friendly and hostile."""

import contextlib
import io
import json
import pickle
import tempfile
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from networks import small
from torch import nn

import exported
import network
from errors import ModelError
from network import load
from training.export import export_module
from training.model import build
from training.quantize import quantize_module
from training.trace import freeze, serialize, trace_module

SIZE = 32


@pytest.fixture(scope="module")
def model():
    return small(5, SIZE)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((6, 3, SIZE, SIZE), np.float32)


@pytest.fixture(scope="module")
def files(model, images):
    example = torch.from_numpy(images[:1])
    return {
        "torchscript": serialize(trace_module(model, example)),
        "export": export_module(model, images[:1]),
    }


def replaced(archive: bytes, suffix: str, edit) -> io.BytesIO:
    """A copy of a zip archive in which `edit` has changed the member that ends with `suffix`."""
    copy = memory(b"")
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, edit(data) if name.endswith(suffix) else data)
    copy.flush()
    return copy


def memory(data: bytes):
    """A file with a descriptor, as the function gets it."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller's)
    file.write(data)
    file.flush()
    return file


@pytest.mark.parametrize("kind", ["torchscript", "export"])
@pytest.mark.parametrize("fuse", [True, False])
def test_both_kinds_answer_as_the_model_does_fused_or_not(model, files, images, kind, fuse):
    loaded = load(memory(files[kind]), kind, SIZE, fuse)
    assert loaded.engine == ("oneDNN fusion" if fuse and network.FUSES else "plain")
    assert loaded.outputs == (1, 5)
    for image in images:  # image[None] has the stride 0, with which oneDNN would go wrong
        batch = torch.from_numpy(image[None])
        with torch.inference_mode():
            assert torch.allclose(loaded(batch), model(batch), atol=1e-5)


def test_a_frozen_model_is_not_frozen_again(images, monkeypatch):
    traced = trace_module(nn.Conv2d(3, 4, 3).eval(), torch.from_numpy(images[:1]))
    frozen = io.BytesIO(serialize(freeze(traced)))
    calls, original = [], torch.jit.freeze
    monkeypatch.setattr(torch.jit, "freeze", lambda module: calls.append(1) or original(module))
    for data, expected in [(io.BytesIO(serialize(traced)), 1), (frozen, 1)]:
        with tempfile.TemporaryFile() as file:
            file.write(data.getvalue())
            file.flush()
            load(file, "torchscript", images.shape[2])
        assert len(calls) == expected


def test_a_fused_network_that_disagrees_is_not_used(files, monkeypatch):
    monkeypatch.setattr(network, "TOLERANCE", -1.0)
    for kind, data in files.items():
        assert load(memory(data), kind, SIZE, True).engine == "plain"


def test_a_fusion_that_fails_is_not_used(files, monkeypatch):
    def fuse(program):
        def run(image):
            raise RuntimeError("could not create a primitive")

        return run

    monkeypatch.setattr(exported, "fuse", fuse)
    assert load(memory(files["export"]), "export", SIZE, True).engine == "plain"


def test_fusion_leaves_only_what_cannot_be_fused(files):
    fused = exported.fuse(exported.load(memory(files["export"])))
    assert [step.kind for step in fused.steps] == ["convolution"] * 3 + ["mean", "linear"]


class Added(nn.Module):
    """An addition in place, to the convolution or to its input, which is read later."""

    def __init__(self, to: str):
        super().__init__()
        self.conv, self.to = nn.Conv2d(3, 3, 1), to

    def forward(self, x):
        x = x * 1
        y = x.add_(self.conv(x)) if self.to == "input" else self.conv(x).add_(x)
        return (x + y).mean((2, 3))


@pytest.mark.parametrize(("to", "fuses"), [("input", False), ("convolution", True)])
def test_what_an_addition_changes_in_place_is_seen_later(images, to, fuses):
    model = Added(to).eval()
    data = export_module(model, images[:1])
    batch = torch.from_numpy(images[1:2])
    fused = exported.fuse(exported.load(memory(data)))
    assert torch.allclose(fused(batch), model(batch.clone()), atol=1e-6)
    additions = [step for step in fused.steps if step.kind == "add"]
    assert len(additions) == (1 if fuses else 2)


ARCHITECTURES = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5"]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "a small DenseNet"])
def test_torchvisions_architectures_export(architecture):
    torch.manual_seed(0)
    if architecture in ARCHITECTURES:
        model = build(architecture, 7).eval()
    else:
        model = torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=7).eval()
    batch = torch.rand(2, 3, 64, 64)
    loaded = load(memory(export_module(model, batch[:1].numpy())), "export", 64, True)
    with torch.no_grad():
        assert torch.allclose(loaded(batch[1:]), model(batch[1:]), atol=1e-4)


def test_pytorchs_own_loader_reads_our_archive_too(model, files, images):
    batch = torch.from_numpy(images[:1].copy())
    program = torch.export.load(io.BytesIO(files["export"]))
    assert torch.allclose(program.module()(batch), model(batch), atol=1e-6)


def test_no_file_of_this_machine_is_in_an_archive(files):
    for data in files.values():
        assert b"/tests/unit" not in data and b"site-packages" not in data


def test_int8_is_small_and_close(model, images):
    data = serialize(quantize_module(model, images))
    loaded = load(memory(data), "torchscript", SIZE)
    assert loaded.engine == "int8"
    batch = torch.from_numpy(images[2:3].copy())
    with torch.inference_mode():
        assert torch.allclose(loaded(batch), model(batch), atol=0.05)


# Hostile files


class Canary:
    """Pickled, it is a call that makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "executed"


def hostile(canary) -> bytes:
    file = io.BytesIO()
    torch.save(Canary(canary), file)
    return file.getvalue()


def test_pickles_in_an_export_archive_are_not_executed(files, canary):
    """PyTorch's own loader does execute this one, or the test would prove nothing."""
    data = replaced(files["export"], "sample_inputs/model.pt", lambda _: hostile(canary))
    loaded = load(data, "export", SIZE)
    assert loaded.outputs == (1, 5) and not canary.exists()
    data.seek(0)
    with contextlib.suppress(Exception):  # after the deed: no tuple came out of the pickle
        torch.export.load(data)
    assert canary.exists()


def test_pickled_weights_are_refused(files, canary):
    def pickled(config):
        config = json.loads(config)
        next(iter(config["config"].values()))["use_pickle"] = True
        return json.dumps(config).encode()

    data = replaced(files["export"], "model_weights_config.json", pickled)
    with pytest.raises(ModelError, match="pickled"):
        load(data, "export", SIZE)


def test_pickles_in_a_torchscript_archive_are_not_executed(files, canary):
    data = replaced(files["torchscript"], "/data.pkl", lambda _: pickle.dumps(Canary(canary)))
    with pytest.raises(ModelError) as refused:
        load(data, "torchscript", SIZE)
    assert refused.value.code == "model_archive_invalid"
    assert not canary.exists()


def test_a_script_that_opens_files_is_refused():
    class Thief(nn.Module):
        def forward(self, x):
            return torch.from_file("/etc/hostname", False, 5, dtype=torch.uint8).reshape(1, 5)

    class Vandal(nn.Module):
        def forward(self, x):
            torch.save(x, "/tmp/vandal")
            return x.mean((2, 3))

    for module in (Thief(), Vandal()):
        with pytest.raises(ModelError, match="which no classifier of images needs"):
            load(memory(serialize(torch.jit.script(module))), "torchscript", SIZE)


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.inductor.open.default",
        "torch.ops.aten.relu.default; import os",
        "builtins.eval",
        "torch.ops.aten.as_strided.default",
    ],
)
def test_operators_that_a_classifier_does_not_need_are_refused(files, target):
    def edited(document):
        document = json.loads(document)
        document["graph_module"]["graph"]["nodes"][0]["target"] = target
        return json.dumps(document).encode()

    with pytest.raises(ModelError, match="is not allowed"):
        load(replaced(files["export"], "models/model.json", edited), "export", SIZE)


def test_a_weight_beyond_its_file_is_refused(files):
    def larger(config):
        config = json.loads(config)
        meta = next(iter(config["config"].values()))["tensor_meta"]
        meta["storage_offset"]["as_int"] = 10**9
        return json.dumps(config).encode()

    with pytest.raises(ModelError, match="not a usable torch"):
        load(replaced(files["export"], "model_weights_config.json", larger), "export", SIZE)


@pytest.mark.parametrize("kind", ["torchscript", "export"])
def test_damage_has_a_code_and_a_sentence(files, kind):
    data = files[kind]
    for broken in (b"", b"no archive", data[:-100], data[: len(data) // 2]):
        with pytest.raises(ModelError) as refused:
            load(memory(broken), kind, SIZE)
        assert refused.value.code == "model_archive_invalid"
