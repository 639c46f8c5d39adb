"""Bundles, good and bad, as pytorch/model.py reads them."""

import gzip
import hashlib
import io
import json
import tarfile

import pytest
import torch
from conftest import CLASSES, archive, png, script

from errors import ModelError
from images import load_image
from model import Model
from preprocessing import IMAGENET

SMALL = {"resize": 32, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}


def load(data: bytes) -> Model:
    return Model.from_archive(io.BytesIO(data), "the bundle")


def test_a_bundle_of_two_files_gets_imagenets_preprocessing(members):
    model = load(archive(members))
    assert model.classes == CLASSES
    assert model.preprocessing == IMAGENET


def test_preprocessing_travels_with_the_bundle(members):
    text = json.dumps(SMALL).encode()
    assert load(archive(members | {"preprocessing.json": text})).preprocessing.crop == 32


def test_names_of_the_reference_are_accepted(members):
    renamed = {"./resnet50_jit.pth": members["brightest.pt"], "./classes.txt": b"a\r\nb\r\nc\r\n"}
    assert load(archive(renamed)).classes == ["a", "b", "c"]


def test_predicts_what_the_image_shows(members):
    model = load(archive(members))
    (probabilities,) = model.predict([load_image(png("blue"))])
    assert model.classes[probabilities.argmax()] == "blue"
    assert probabilities.max() > 0.9


def test_the_bundles_hash_is_that_of_all_its_bytes(members):
    data = archive(members)
    assert load(data).sha256 == hashlib.sha256(data).hexdigest()


def test_a_class_name_may_be_in_any_script(members):
    named = archive(members | {"classes.txt": "猫\nchien\nネコ".encode()})
    assert load(named).classes == ["猫", "chien", "ネコ"]


class Crooked(torch.nn.Module):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 3, 2)


class Failing(torch.nn.Module):
    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.reshape(7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes.txt": b"a\nb"}, "2 names"),
        ({"classes.txt": b""}, "0 names"),
        ({"classes.txt": b"\xff\xfe"}, "utf-8"),
        ({"brightest.pt": b"no model"}, "the bundle"),
        ({"brightest.pt": script(Crooked())}, "shape (1, 3, 2)"),
        ({"brightest.pt": script(Failing())}, "fails on an image"),
        ({"preprocessing.json": b"{"}, "preprocessing"),
        ({"preprocessing.json": json.dumps(SMALL | {"crop": -1}).encode()}, "crop"),
        ({"other.txt": b""}, "unexpected member 'other.txt'"),
        ({"../classes.txt": b""}, "unexpected member '../classes.txt'"),
        ({"/tmp/evil.pt": b""}, "not a plain file"),
        ({"second.pth": b""}, "more than one model"),
    ],
)
def test_a_bad_bundle_is_refused_by_name(members, change, words):
    with pytest.raises(ModelError, match="the bundle") as refused:
        load(archive(members | change))
    assert words in str(refused.value)


@pytest.mark.parametrize("missing", ["brightest.pt", "classes.txt"])
def test_an_incomplete_bundle_is_refused(members, missing):
    with pytest.raises(ModelError, match="the bundle has no"):
        load(archive({name: data for name, data in members.items() if name != missing}))


def test_a_link_is_refused(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        info = tarfile.TarInfo("classes.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ModelError, match="not a plain file"):
        load(file.getvalue())


@pytest.mark.parametrize("keep", [0, 10, 500, -10])
def test_a_truncated_bundle_is_refused(members, keep):
    with pytest.raises(ModelError, match="the bundle"):
        load(archive(members)[:keep])


def test_what_is_no_archive_is_refused():
    for data in (b"no archive", gzip.compress(b"no tar"), bytes(1024)):
        with pytest.raises(ModelError, match="the bundle"):
            load(data)


def test_flipped_bytes_never_pass_unnoticed(members):
    data = bytearray(archive(members))
    whole = load(bytes(data))
    for position in range(20, len(data) - 8, len(data) // 40):
        broken = bytearray(data)
        broken[position] ^= 0xFF
        try:
            model = load(bytes(broken))
        except ModelError:
            continue
        assert model.classes == whole.classes
        assert torch.equal(
            model.network(torch.ones(1, 3, 4, 4)), whole.network(torch.ones(1, 3, 4, 4))
        )


def test_missing_settings_are_named():
    with pytest.raises(ModelError, match="MODEL_BUCKET and MODEL_KEY"):
        Model.from_s3(None, "key")
