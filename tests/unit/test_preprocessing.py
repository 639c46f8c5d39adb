"""Preprocessing against torchvision's, and against every mode and size an image may come in."""

import io
import json
import random
import sys
from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

import preprocessing as preprocessing_module
from preprocessing import IMAGENET, MAX_SIZE, Preprocessing, to_rgb

INTERPOLATION = {
    "bilinear": v2.InterpolationMode.BILINEAR,
    "bicubic": v2.InterpolationMode.BICUBIC,
    "lanczos": v2.InterpolationMode.LANCZOS,
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.frombytes(
        "RGB", (width, height), random.Random(seed).randbytes(3 * width * height)
    )


def torchvision_result(preprocessing: Preprocessing, image: Image.Image) -> np.ndarray:
    return v2.Compose(
        [
            v2.Resize(preprocessing.resize, INTERPOLATION[preprocessing.interpolation]),
            v2.CenterCrop(preprocessing.crop),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )(image).numpy()


def assert_same(preprocessing: Preprocessing, image: Image.Image) -> None:
    ours, theirs = preprocessing(image), torchvision_result(preprocessing, image)
    assert ours.shape == theirs.shape == (3, preprocessing.crop, preprocessing.crop)
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    std = np.array(preprocessing.std).reshape(3, 1, 1)
    assert np.abs((ours - theirs) * std).max() <= 1.001 / 255


@pytest.mark.parametrize(
    "size",
    [
        *[(640, 480), (480, 640), (256, 256), (224, 224), (300, 257), (257, 1000), (100, 80)],
        *[(8, 8), (1, 1), (1, 40), (37, 2), (1023, 767), (255, 4000)],
    ],
)
@pytest.mark.parametrize("interpolation", INTERPOLATION)
def test_equals_torchvision(size, interpolation):
    assert_same(replace(IMAGENET, interpolation=interpolation), noise(*size))


def test_equals_torchvision_for_any_size():
    rng = random.Random(0)
    for _ in range(300):
        width, height, crop = rng.randint(1, 300), rng.randint(1, 300), rng.randint(1, 120)
        interpolation = rng.choice(list(INTERPOLATION))
        resize = crop + rng.randint(0, 80)
        mean, std = (0.1, 0.5, 0.9), (1.0, 0.5, 0.25)
        assert_same(Preprocessing(resize, crop, mean, std, interpolation), noise(width, height))


def test_an_image_that_would_take_gigabytes_to_scale_is_refused():
    with pytest.raises(ValueError, match="narrow"):
        IMAGENET(Image.new("RGB", (1, 60_000)))


GREY = 100


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), GREY), (GREY,) * 3),
        (Image.new("1", (4, 4), 1), (255,) * 3),
        (Image.new("RGB", (4, 4), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGB", (4, 4), (10, 20, 30)).quantize(2), (10, 20, 30)),
        (Image.new("LA", (4, 4), (GREY, 255)), (GREY,) * 3),
        (Image.new("LA", (4, 4), (GREY, 0)), (255,) * 3),
        (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255,) * 3),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), (204,) * 3),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("I;16", (4, 4), 65535), (255,) * 3),
        (Image.new("I;16", (4, 4), 257 * GREY), (GREY,) * 3),
        (Image.new("I", (4, 4), 257 * GREY), (GREY,) * 3),
        (Image.new("F", (4, 4), GREY), (GREY,) * 3),
        (Image.new("HSV", (4, 4), (0, 255, 255)), (255, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb(image, expected):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.getpixel((1, 1)) == expected


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30])
    file = io.BytesIO()
    image.save(file, "GIF", transparency=0)
    assert to_rgb(Image.open(file)).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("big_endian", [False, True])
def test_16_bit_files_are_scaled(big_endian):
    values = np.full((3, 3), 0x8080, ">u2" if big_endian else "<u2")
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    assert to_rgb(Image.open(file)).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_what_is_rgb_already_is_loaded_before_its_file_is_closed(tmp_path, form):
    Image.new("RGB", (4, 3), "red").save(tmp_path / "image", form)
    with Image.open(tmp_path / "image") as image:
        rgb = to_rgb(image)
    assert len(rgb.tobytes()) == 36


def test_a_mode_without_a_way_to_rgb_is_refused(monkeypatch):
    # LAB needs Pillow's colour management, which not every build of Pillow has.
    monkeypatch.delattr(PIL, "ImageCms", raising=False)
    monkeypatch.setitem(sys.modules, "PIL.ImageCms", None)
    with pytest.raises(ValueError, match="LAB"):
        to_rgb(Image.new("LAB", (4, 4)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    corner = Image.new("RGB", (16, 8), "black")
    corner.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    corner.save(file, "PNG", exif=exif)
    seen = np.asarray(to_rgb(Image.open(file)))
    # Where the corner has to be, by the standard: (bottom?, right?), sides exchanged from 5 on.
    bottom, right = {
        1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0),
    }[orientation]  # fmt: skip
    assert seen.shape == ((8, 16, 3) if orientation < 5 else (16, 8, 3))
    assert seen[-1 if bottom else 0, -1 if right else 0].tolist() == [255] * 3
    assert (seen > 0).mean() == 0.25


def test_damaged_exif_does_not_hide_the_pixels():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff")
    assert to_rgb(Image.open(file)).getpixel((0, 0)) == (255, 0, 0)


def test_an_empty_image_is_refused():
    with pytest.raises(ValueError, match="empty"):
        IMAGENET(Image.new("RGB", (0, 5)))


def test_a_truncated_file_raises_oserror():
    file = io.BytesIO()
    noise(64, 64).save(file, "PNG")
    with pytest.raises(OSError):
        IMAGENET(Image.open(io.BytesIO(file.getvalue()[:2000])))


def test_json_round_trip():
    preprocessing = Preprocessing(40, 32, (0.1, 0.2, 0.3), (1, 1, 1), "bicubic")
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    assert Preprocessing.from_json(IMAGENET.to_json()) == IMAGENET


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"resize": 0}, "resize"),
        ({"resize": True}, "resize"),
        ({"resize": "256"}, "resize"),
        ({"resize": MAX_SIZE + 1}, "resize"),
        ({"crop": 224.0}, "crop"),
        ({"crop": 257}, "crop"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": 0.5}, "mean"),
        ({"mean": [0.5, 0.5, None]}, "mean"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean"),
        ({"mean": [0.5, 0.5, 10**400]}, "mean"),
        ({"std": [0.5, 0.5, 0]}, "std"),
        ({"std": [0.5, 0.5, float("inf")]}, "std"),
        ({"interpolation": "nearest-ish"}, "interpolation"),
        ({"interpolation": ["bilinear"]}, "interpolation"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_bad_field_is_named(change, named):
    with pytest.raises(ValueError, match=named):
        Preprocessing.from_json(json.dumps(json.loads(IMAGENET.to_json()) | change))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"crop": 224}'])
def test_what_is_not_preprocessing_is_refused(text):
    with pytest.raises(ValueError, match="preprocessing: "):
        Preprocessing.from_json(text)


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0])


@pytest.mark.parametrize("interpolation", INTERPOLATION)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_a_photograph_in_any_mode_equals_torchvision(photograph, mode, interpolation):
    preprocessing = replace(IMAGENET, interpolation=interpolation)
    image = photograph.quantize(256) if mode == "P" else photograph.convert(mode)
    theirs = torchvision_result(preprocessing, image.convert("RGB"))
    std = np.array(IMAGENET.std).reshape(3, 1, 1)
    assert np.abs((preprocessing(image) - theirs) * std).max() <= 1.001 / 255


def test_a_photograph_of_16_bits_equals_the_one_of_8(photograph):
    grey = np.asarray(photograph.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(IMAGENET(deep), IMAGENET(Image.fromarray(grey)))


def test_a_photograph_that_is_opaque_equals_the_one_without_alpha(photograph):
    assert np.array_equal(IMAGENET(photograph.convert("RGBA")), IMAGENET(photograph))


def test_strips_do_not_show(photograph, monkeypatch):
    image = photograph.convert("CMYK")
    whole = np.asarray(image.convert("RGB"))
    for pixels in (1, 1000, 64_000, 10**9):
        monkeypatch.setattr(preprocessing_module, "STRIP", pixels)
        assert np.array_equal(np.asarray(to_rgb(image)), whole)
