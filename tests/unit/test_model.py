"""Bundles, good and bad, as pytorch/model.py reads them."""

import gzip
import hashlib
import io
import json
import tarfile

import numpy as np
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
        ({"model.json": b"[]"}, "not a JSON object"),
        ({"model.json": b'{"format": 2}'}, "format"),
        ({"model.json": b'{"format": 1, "kind": "export"}'}, "kind"),
        ({"model.json": b'{"format": 1, "name": "../x"}'}, "name"),
        ({"model.json": b'{"format": 1, "temperature": 0}'}, "temperature"),
        ({"model.json": b'{"format": 1, "temperature": NaN}'}, "temperature"),
        ({"MODEL_CARD.md": bytes(1_000_001)}, "too large"),
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
    with pytest.raises(ModelError, match="MODEL_BUCKET and MODEL_KEY") as refused:
        Model.from_s3(None, "key")
    assert refused.value.code == "model_not_configured"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"classes.txt": b"a\nb"}, "model_classes_mismatch"),
        ({"preprocessing.json": b"{"}, "model_preprocessing_invalid"),
        ({"brightest.pt": script(Failing())}, "model_failed"),
        ({"brightest.pt": b"no model"}, "model_archive_invalid"),
        ({"other.txt": b""}, "model_archive_invalid"),
    ],
)
def test_each_failure_has_its_code(members, change, code):
    with pytest.raises(ModelError) as refused:
        load(archive(members | change))
    assert refused.value.code == code


def test_the_temperature_softens_the_confidence(members):
    image = load_image(png("blue"))
    card = {"MODEL_CARD.md": b"# For people"}
    sharp = load(archive(members | card))
    assert (sharp.kind, sharp.name, sharp.temperature) == ("torchscript", "brightest", 1.0)
    settings = json.dumps({"format": 1, "name": "soft", "temperature": 2.0, "more": 1}).encode()
    soft = load(archive(members | {"model.json": settings}))
    assert soft.name == "soft"
    logits = np.log(sharp.predict([image])[0])
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum()
    assert np.allclose(soft.predict([image])[0], expected, atol=1e-6)


def test_many_images_are_answered_in_order(members):
    model = load(archive(members))
    colours = ["blue", "red", "green", "red"]
    answers = model.predict([load_image(png(colour)) for colour in colours])
    assert [model.classes[i] for i in answers.argmax(1)] == colours


def test_only_the_bundle_with_the_demanded_hash_is_loaded(members):
    data = archive(members)
    digest = hashlib.sha256(data).hexdigest()
    assert Model.from_archive(io.BytesIO(data), "the bundle", digest.upper()).sha256 == digest
    with pytest.raises(ModelError, match="MODEL_SHA256 demands") as refused:
        Model.from_archive(io.BytesIO(data), "the bundle", "0" * 64)
    assert refused.value.code == "model_archive_invalid"


def test_a_gzip_file_may_have_parts_of_any_size(members):
    data = archive(members | {"MODEL_CARD.md": bytes(900_000)})  # long runs, which inflate buffers
    tar = gzip.decompress(data)
    parts = [tar[:700], b"", tar[700:-1], tar[-1:]]
    joined = b"".join(gzip.compress(part) for part in parts)
    assert load(joined).sha256 == hashlib.sha256(joined).hexdigest()
    assert load(data).classes == load(joined).classes == CLASSES


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"more", lambda d: d + d[:9]])
def test_what_does_not_end_like_a_gzip_file_is_refused(members, change):
    with pytest.raises(ModelError, match=r"not a complete tar.gz archive") as refused:
        load(change(archive(members)))
    assert refused.value.code == "model_archive_invalid"


def test_a_bomb_behind_the_last_member_is_not_unpacked(members):
    tar = gzip.decompress(archive(members))
    with pytest.raises(ModelError, match="after the last member"):
        load(gzip.compress(tar + bytes(50_000_000)))


def test_a_model_that_claims_to_be_huge_is_refused_before_it_is_read(members):
    file = io.BytesIO()
    info = tarfile.TarInfo("huge.pt")
    info.size = 10**12
    file.write(info.tobuf() + bytes(10_000))
    with pytest.raises(ModelError, match="too large"):
        load(gzip.compress(file.getvalue()))
