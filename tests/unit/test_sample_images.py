"""Which images the notebooks send when nobody has named any."""

import photographs
import pytest

from local import notebook
from local.cli import UserError
from preprocessing import IMAGENET
from training.data import from_folder
from training.model import TrainedModel, build


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Put a model, made of the images in a folder, where notebook 01 puts it."""
    monkeypatch.setattr(notebook, "BUILD", tmp_path)

    def save(data_folder):
        model = build("squeezenet1_1", 2).eval()
        facts = {"data_folder": data_folder}
        trained = TrainedModel(
            "squeezenet1_1", {}, ["a", "b"], IMAGENET, model, configuration=facts
        )
        trained.save(tmp_path / "model" / "checkpoint.pt")

    return save


def test_they_are_the_test_images_of_the_models_data(save, tmp_path):
    layout = from_folder(photographs.write(tmp_path / "photos", 10))
    save(str(layout))
    images = notebook.sample_images()
    assert len(images) == 4
    assert all(path.is_relative_to(layout / "test") for path in images)


@pytest.mark.parametrize("data_folder", [None, "build/data/of-another-machine"])
def test_a_model_without_data_gets_two_photographs(save, data_folder):
    save(data_folder)
    assert {path.name for path in notebook.sample_images()} == {"china.jpg", "flower.jpg"}


def test_a_folder_that_is_named_is_taken_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook, "ROOT", tmp_path / "root")
    photographs.write(tmp_path / "root" / "mine", 10)
    assert len(notebook.sample_images("mine", limit=6)) == 6
    assert len(notebook.sample_images(tmp_path / "root" / "mine" / "china")) == 10


def test_without_a_model_notebook_01_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "BUILD", tmp_path)
    with pytest.raises(UserError, match="01_train"):
        notebook.sample_images()
