"""torchvision's data sets by name, from small files in the layouts that torchvision writes."""

import pickle

import numpy as np
import photographs
import pytest
import scipy.io

from local.cli import UserError
from training import data as data_module
from training.data import from_torchvision, slug, write_photographs


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Where torchvision's files lie; no request leaves the machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(data_module, "BUILD", tmp_path / "build")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "torch" / "datasets"


def counts(layout) -> dict:
    return {
        part.name: {c.name: len(list(c.iterdir())) for c in sorted(part.iterdir())}
        for part in sorted(layout.iterdir())
    }


def test_oxford_iiit_pet_has_the_names_of_its_breeds(root):
    base = root / "OxfordIIITPet" / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    pictures = photographs.cuts(10)
    breeds = {"english_cocker_spaniel": pictures["china"], "Abyssinian": pictures["flower"]}
    lines = {"trainval": [], "test": []}
    for label, (breed, cuts) in enumerate(sorted(breeds.items()), start=1):
        for i, picture in enumerate(cuts):
            picture.save(base / "images" / f"{breed}_{i}.jpg")
            lines["trainval" if i < 7 else "test"].append(f"{breed}_{i} {label} 1 1")
    for part, entries in lines.items():
        (base / "annotations" / f"{part}.txt").write_text("\n".join(entries) + "\n")
    layout = from_torchvision("oxford_iiit_pet")
    assert counts(layout) == {
        "test": {"abyssinian": 3, "english_cocker_spaniel": 3},
        "train": {"abyssinian": 6, "english_cocker_spaniel": 6},
        "val": {"abyssinian": 1, "english_cocker_spaniel": 1},
    }
    link = next((layout / "test" / "english_cocker_spaniel").iterdir())
    assert link.resolve().name.startswith("english_cocker_spaniel_")
    assert from_torchvision("OxfordIIITPet") == layout


def test_eurosat_comes_whole_and_is_split_here(root):
    photographs.write(root / "EuroSAT" / "eurosat" / "2750", 20)
    layout = from_torchvision("eurosat")
    assert counts(layout) == {
        part: {"china": n, "flower": n} for part, n in (("test", 3), ("train", 14), ("val", 3))
    }


def test_flowers102_keeps_its_own_three_parts(root):
    base = root / "Flowers102" / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    cuts = [p for pictures in photographs.cuts(153).values() for p in pictures]
    labels = np.arange(306) % 102 + 1
    for i, picture in enumerate(cuts, start=1):
        picture.save(base / "jpg" / f"image_{i:05}.jpg")
    scipy.io.savemat(base / "imagelabels.mat", {"labels": labels})
    ids = {"trnid": range(1, 103), "valid": range(103, 205), "tstid": range(205, 307)}
    scipy.io.savemat(base / "setid.mat", {name: list(part) for name, part in ids.items()})
    names = data_module.torchvision.datasets.Flowers102.classes
    for file in ("imagelabels.mat", "setid.mat"):
        assert (base / file).exists()
    with pytest.MonkeyPatch.context() as patch:  # the files' published checksums are not ours
        patch.setattr(data_module.torchvision.datasets.flowers102, "check_integrity", _exists)
        layout = from_torchvision("flowers102")
    assert all(sum(classes.values()) == 102 for classes in counts(layout).values())
    assert set(counts(layout)["train"]) == {slug(name) for name in names}


def test_cifar10_comes_in_an_array_and_is_written_as_images(root):
    base = root / "CIFAR10" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    kind = data_module.torchvision.datasets.CIFAR10
    for name, _ in (*kind.train_list, *kind.test_list):
        batch = {
            "data": rng.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(20)],
        }
        (base / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": ["airplane", "automobile", *"abcdefgh"]}
    (base / "batches.meta").write_bytes(pickle.dumps(meta))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module.torchvision.datasets.cifar, "check_integrity", _exists)
        layout = from_torchvision("cifar10")
    assert counts(layout)["test"]["airplane"] == 2
    assert counts(layout)["train"]["automobile"] == 8 and counts(layout)["val"]["automobile"] == 2


def _exists(path, md5=None) -> bool:
    return bool(path) and data_module.Path(path).exists()


def test_without_a_network_it_says_where_to_put_the_files(root):
    with pytest.raises(UserError, match="could not be fetched") as error:
        from_torchvision("oxford_iiit_pet")
    assert str(root / "OxfordIIITPet") in str(error.value)
    assert not (root / "OxfordIIITPet").exists()  # nothing half there


def test_names_that_are_no_data_set(root):
    with pytest.raises(UserError, match="try OxfordIIITPet"):
        from_torchvision("oxford_pets_iiit")
    with pytest.raises(UserError, match="cannot fetch a data set"):
        from_torchvision("CocoDetection")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("English Cocker Spaniel", "english_cocker_spaniel"),
        ("707-320", "707_320"),
        ("  ", "_"),
    ],
)
def test_slugs(name, expected):
    assert slug(name) == expected


def test_the_photographs_are_two(tmp_path):
    assert {path.name for path in write_photographs(tmp_path).iterdir()} == {
        "china.jpg",
        "flower.jpg",
    }
