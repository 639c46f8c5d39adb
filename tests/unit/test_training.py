"""Training, checkpoints, tracing: a small network on a handful of generated images."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from local.cli import UserError
from preprocessing import Preprocessing
from training import plots
from training.model import TrainedModel, build
from training.trace import (
    Comparison,
    check_in_serving,
    compare,
    find_images,
    load_archive,
    load_images,
    run_model,
    serialize,
    trace,
    trace_module,
)
from training.train import best_epoch, get_model, predict

matplotlib.use("agg")
ARCHITECTURE = "squeezenet1_1"
SIZE = Preprocessing(36, 32, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Dark and light noise: two classes that a network tells apart after an epoch."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        for name, low in (("dark", 0), ("light", 155)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 100, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def train(folder, output, **changes) -> TrainedModel:
    arguments = {
        "architecture": ARCHITECTURE,
        "weights": "random",
        "data": folder,
        "epochs": 1,
        "preprocessing": SIZE,
        "augment": False,
    }
    return get_model("folder", output=output, **(arguments | changes))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> TrainedModel:
    return train(folder, tmp_path_factory.mktemp("model"), epochs=2)


def test_it_learns_and_records_what_it_did(folder, tmp_path):
    trained = train(folder, tmp_path, architecture="resnet18", epochs=4)
    assert trained.metrics["test_accuracy"] >= 0.9
    assert trained.metrics["test_images"] == 12
    assert trained.classes == ["dark", "light"]
    assert [entry["epoch"] for entry in trained.history] == [1, 2, 3, 4]
    assert (tmp_path / "classes.txt").read_text() == "dark\nlight\n"
    assert Preprocessing.from_json((tmp_path / "preprocessing.json").read_text()) == SIZE


def test_the_best_epoch_is_the_one_that_is_kept(folder, trained):
    val = predict(replace(trained, temperature=1.0), folder / "val")
    kept = trained.history[best_epoch(trained.history) - 1]
    assert val.accuracy == pytest.approx(kept["val_accuracy"])
    assert val.loss == pytest.approx(kept["val_loss"], rel=1e-4)


def test_best_epoch_prefers_accuracy_then_loss():
    history = [
        {"epoch": 1, "val_accuracy": 0.9, "val_loss": 0.1},
        {"epoch": 2, "val_accuracy": 0.95, "val_loss": 0.5},
        {"epoch": 3, "val_accuracy": 0.95, "val_loss": 0.4},
    ]
    assert best_epoch(history) == 3


def test_the_same_seed_gives_the_same_model_and_another_does_not(folder, tmp_path):
    first, second, other = (train(folder, tmp_path / str(i), seed=i // 2) for i in range(3))
    assert first.fingerprint() == second.fingerprint() != other.fingerprint()


def test_training_leaves_the_callers_random_numbers_alone(folder, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    train(folder, tmp_path)
    assert torch.rand(1) == expected


def test_a_second_run_reuses_and_any_change_trains_again(folder, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint.pt"
    train(folder, tmp_path)
    first = checkpoint.stat().st_mtime_ns
    train(folder, tmp_path)
    assert "reused" in capsys.readouterr().out
    assert checkpoint.stat().st_mtime_ns == first
    for changes in ({"force": True}, {"seed": 5}):
        train(folder, tmp_path, **changes)
        assert "reused" not in capsys.readouterr().out
        assert checkpoint.stat().st_mtime_ns > first


def test_an_interrupted_run_goes_on_and_ends_with_the_same_model(folder, trained, tmp_path, capsys):
    def stop(history):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path, epochs=2, on_epoch=stop)
    assert (tmp_path / "training.pt").exists() and not (tmp_path / "checkpoint.pt").exists()
    resumed = train(folder, tmp_path, epochs=2)
    assert "going on after epoch 1" in capsys.readouterr().out
    assert resumed.fingerprint() == trained.fingerprint()
    assert not (tmp_path / "training.pt").exists()


def test_a_damaged_checkpoint_is_trained_anew(folder, tmp_path, capsys):
    train(folder, tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    train(folder, tmp_path)
    assert "training again" in capsys.readouterr().out
    TrainedModel.load(checkpoint)


def test_a_checkpoint_round_trip_loads_without_pickled_code(trained, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trained.save(path)
    assert torch.load(path, weights_only=True)["architecture"] == ARCHITECTURE
    loaded = get_model("checkpoint", model_file=path, output=tmp_path / "again")
    assert loaded.fingerprint() == trained.fingerprint()
    assert (loaded.classes, loaded.preprocessing) == (trained.classes, trained.preprocessing)
    assert (loaded.history, loaded.metrics) == (trained.history, trained.metrics)
    assert (tmp_path / "again/checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no checkpoint"),
        (b"", "damaged"),
        (b"not a checkpoint", "damaged"),
        ({"weights": 1}, "not a checkpoint of"),
        ({"format": "image-classifier-checkpoint-1"}, "inconsistent"),
    ],
)
def test_bad_checkpoints_get_a_sentence(content, sentence, tmp_path):
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=sentence):
        get_model("checkpoint", model_file=path, output=tmp_path / "out")


def test_weights_of_another_architecture_get_a_sentence(trained, tmp_path):
    trained.save(tmp_path / "checkpoint.pt")
    record = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(record | {"architecture": "resnet18"}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="inconsistent"):
        TrainedModel.load(tmp_path / "checkpoint.pt")


def test_unknown_names_are_named(tmp_path):
    with pytest.raises(UserError, match="resnet18"):
        build("resnet-18", 10)
    with pytest.raises(UserError, match="unknown source 'magic'"):
        get_model("magic", output=tmp_path)


def test_trace_agrees_and_is_kept_when_nothing_changed(trained, folder, tmp_path):
    output, images = tmp_path / "model.pt", find_images(folder / "test", 4)
    comparison = trace(trained, images, output)
    assert comparison.agrees and comparison.images == comparison.same_class == 4
    inputs = load_images(images, SIZE)
    assert np.allclose(
        run_model(load_archive(output), inputs), run_model(trained.model, inputs), atol=1e-5
    )
    first = output.read_bytes()
    trace(trained, images, output)
    assert output.read_bytes() == first
    output.write_bytes(first[:1000])
    trace(trained, images, output)
    assert load_archive(output)


def test_a_trace_of_a_model_that_branches_is_refused(trained, folder, tmp_path):
    class Branching(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.mean() > 0 else -x.mean((2, 3))

    branching = TrainedModel(ARCHITECTURE, {}, ["a", "b", "c"], SIZE, Branching())
    images = [next((folder / "test" / name).iterdir()) for name in ("dark", "light")]
    with pytest.warns(torch.jit.TracerWarning), pytest.raises(UserError, match="differs"):
        trace(branching, images, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_archives_of_two_processes_are_identical_and_name_no_path():
    code = (
        "import sys, torch, hashlib; from training.trace import serialize, trace_module\n"
        "from training.model import build; torch.manual_seed(0)\n"
        f"data = serialize(trace_module(build('{ARCHITECTURE}', 3), torch.rand(1, 3, 32, 32)))\n"
        "assert b'site-packages' not in data; print(hashlib.sha256(data).hexdigest())"
    )
    run = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
    first, second = (subprocess.run(run, capture_output=True, text=True, check=True) for _ in "12")
    assert first.stdout == second.stdout
    assert "deprecated" not in first.stderr


def test_compare_does_not_accept_nan_or_another_class():
    first = np.array([[1.0, 2.0], [3.0, 1.0]], dtype=np.float32)
    assert compare(first, first, {}) == Comparison(2, 0.0, 2, True, {})
    assert compare(first, first + 1e-5, {}).agrees
    assert not compare(first, first + 0.01, {}).agrees
    assert not compare(first, first * np.nan, {}).agrees
    with pytest.raises(UserError, match="shapes"):
        compare(first, first[:, :1], {})


def test_the_check_in_serving_reports_what_fails_there(trained, folder, tmp_path):
    images = find_images(folder / "test", 2)
    trace(trained, images, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"does not run in the serving environment.*numpy"):
        check_in_serving(tmp_path / "model.pt", SIZE, images, packages=tmp_path / "empty")


def test_the_check_in_serving_runs_with_given_packages(trained, folder, tmp_path):
    images = find_images(folder / "test", 3)
    trace(trained, images, tmp_path / "model.pt")
    packages = Path(torch.__file__).parent.parent
    comparison = check_in_serving(tmp_path / "model.pt", SIZE, images, packages)
    assert comparison.agrees and comparison.images == 3
    assert comparison.versions["torch"] == torch.__version__


def test_find_images_is_bounded_and_spread(folder, tmp_path):
    assert {path.parent.name for path in find_images(folder / "test", 5)} == {"dark", "light"}
    assert len(find_images(folder / "test", 5)) == 5
    with pytest.raises(UserError, match="no images"):
        find_images(tmp_path)


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_other_architectures_trace(architecture):
    torch.manual_seed(0)
    example = torch.rand(1, 3, 64, 64)
    model = build(architecture, 7).eval()
    traced = trace_module(model, example)
    assert serialize(traced)
    assert run_model(traced, example.numpy()).shape == (1, 7)


def test_plots_show_what_they_are_given(trained, folder):
    predictions = predict(trained, folder / "test")
    wrong = int((predictions.labels != predictions.predicted).sum())
    assert len(plots.mistakes(predictions, limit=12).axes) >= min(wrong, 12)
    matrix = plots.confusion_matrix(predictions).axes[0]
    assert sum(int(text.get_text()) for text in matrix.texts) == 12
    assert len(plots.curves(trained.history).axes) == 2
    assert len(plots.samples(folder / "test").axes) == 6
    plots.plt.close("all")


def test_the_command_line_says_a_sentence_and_fails(tmp_path):
    code = f"import sys; sys.path[:0] = {sys.path!r}; import runpy; sys.argv = sys.argv[1:]\n"
    code += "runpy.run_module('training.train', run_name='__main__')"
    arguments = ["training.train", "--source", "checkpoint", "--model", str(tmp_path / "none")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no checkpoint")
    assert "Traceback" not in done.stderr
    assert json.dumps(done.stdout) == '""'
