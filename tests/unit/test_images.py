"""Images, broken, malicious and merely unusual, as pytorch/images.py decodes them."""
# ruff: noqa: E501

import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import images
from benchmarks.hostile_images import chunk, encoded, huge_tile, interlaced_png, many_scans, png
from errors import RequestError
from images import load_image
from preprocessing import IMAGENET, to_rgb

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

RGB = Image.new("RGB", (40, 30), (200, 100, 50))
FORMS = {
    "JPEG": encoded(RGB, "JPEG", quality=95),
    "progressive JPEG": encoded(RGB, "JPEG", progressive=True),
    "PNG": encoded(RGB, "PNG"),
    "interlaced PNG": interlaced_png(37),
    "WebP": encoded(RGB, "WEBP"),
    "lossless WebP": encoded(RGB.convert("RGBA"), "WEBP", lossless=True),
    "GIF": encoded(RGB.quantize(8), "GIF"),
    "BMP": encoded(RGB, "BMP"),
}


def refusal(data: bytes) -> RequestError:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        load_image(data)
    assert time.monotonic() - started < 2
    return caught.value


def status(data: bytes) -> int:
    """What a client is told about an image: 200, or the status of the error."""
    try:
        array = IMAGENET(load_image(data))
    except RequestError as error:
        return error.status
    except ValueError:  # app.prepare answers it with 422
        return 422
    assert array.shape == (3, 224, 224) and np.isfinite(array).all()
    return 200


@pytest.mark.parametrize("form", FORMS)
def test_allowed_formats_are_read(form):
    assert status(FORMS[form]) == 200


@pytest.mark.parametrize(
    "form", ["TIFF", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "EPS", "PDF", "XBM"]
)
def test_other_formats_are_a_415(form):
    image = Image.new("1", (8, 8)) if form == "XBM" else Image.new("RGB", (32, 32))
    assert refusal(encoded(image, form)).status == 415


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\0", b"a", b"<html></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        *(b"{}", b"%PDF-1.7\n", b"PK\3\4" + bytes(100), b"\x7fELF" + bytes(100), b"%!PS-Adobe-3.0"),
        *(b"\x89PNG", b"\x89PNG\r\n\x1a\n", b"GIF8", b"\xff\xd8", b"RIFF\0\0\0\0WEBP"),
        *(b"BM", b"II*\0", b"MM\0*", bytes(10_000), b"\xff" * 10_000, random.Random(1).randbytes(9999)),
        b"\0\0\0\x1cftypavif" + bytes(100),
        b"\0\0\0\x18ftypheic" + bytes(100),
        b"P6\n1 1\n255\nabc",
        b"/* XPM */",
        FORMS["JPEG"].hex().encode(),
    ],
)  # fmt: skip
def test_what_is_no_image_is_a_415_or_422(data):
    assert refusal(data).status in (415, 422)


@pytest.mark.parametrize("form", FORMS)
def test_every_truncation_is_a_4xx_or_an_image(form):
    data = FORMS[form]
    for length in {int(len(data) * part / 40) for part in range(40)}:
        assert status(data[:length]) in (200, 415, 422), (form, length)
    assert status(data[: len(data) // 2]) in (415, 422)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_are_a_4xx_or_an_image(form):
    rng = random.Random(form)
    for _ in range(150):
        data = bytearray(FORMS[form])
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        assert status(bytes(data)) in (200, 413, 415, 422), data.hex()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(FORMS)), st.binary(max_size=64), st.integers(0, 3000))
def test_any_bytes_anywhere_are_a_4xx_or_an_image(form, junk, at):
    data = FORMS[form]
    at %= len(data)
    assert status(data[:at] + junk + data[at + len(junk) :]) in (200, 413, 415, 422)


def text_bomb(kind: bytes) -> bytes:
    packed = zlib.compress(bytes(30_000_000), 9)
    extra = {
        b"zTXt": b"a\0\0" + packed,
        b"iTXt": b"a\0\1\0\0\0" + packed,
        b"iCCP": b"a\0\0" + packed,
        b"eXIf": bytes(5_000_000),
    }[kind]
    whole = FORMS["PNG"]
    return whole[:33] + chunk(kind, extra) + whole[33:]


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"eXIf"])
def test_bombs_in_a_pngs_other_chunks_do_not_explode(kind):
    data = text_bomb(kind)
    tracemalloc.start()
    try:
        assert status(data) in (200, 415, 422)
        assert tracemalloc.get_traced_memory()[1] < 16_000_000
    finally:
        tracemalloc.stop()


def rle_bmp(width: int, height: int, bits: int) -> bytes:
    """A run-length encoded BMP with empty lines."""
    head = struct.pack("<IIIIiiHH", 1078, 0, 1078, 40, width, height, 1, bits)
    head += struct.pack("<IIiiII", {8: 1, 4: 2}[bits], 0, 0, 0, 0, 0)
    return b"BM" + head + bytes(1024) + b"\1\0\0\0" * height


def test_run_lengths_which_are_decoded_in_python_have_a_lower_limit():
    for bits in (4, 8):
        assert status(rle_bmp(40, 30, bits)) == 200
        assert refusal(rle_bmp(2000, 1001, bits)).status == 413


def in_parts(form: str, part: bytes, count: int) -> bytes:
    """An image with `count` times the same part in front of the others."""
    head = {"PNG": 33, "JPEG": 2, "GIF": 13 + 3 * 4}[form]
    return FORMS[form][:head] + part * count + FORMS[form][head:]


@pytest.mark.parametrize(
    "data",
    [  # Pillow alone takes 60, 8, 4 and 3 s for as much of it as 10 MB hold
        in_parts("JPEG", b"\xff\xe1\0\x12Exif\0\0" + bytes(10), 101),
        in_parts("PNG", chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000), 9)), 101),
        in_parts("PNG", chunk(b"abCd", b""), 800_000),
        in_parts("JPEG", b"\xff\xe5\0\2", 2_400_000),
        in_parts("GIF", b"!\xfe\1a\0", 1_900_000),
    ],
    ids=["JPEG, EXIF", "PNG, profiles", "PNG, chunks", "JPEG, segments", "GIF, comments"],
)
def test_a_file_of_too_many_parts_is_a_413(data):
    failure = refusal(data)
    assert (failure.status, failure.code) == (413, "too_large")
    assert "too many parts" in str(failure)


@pytest.mark.parametrize(
    "data",
    [
        in_parts("JPEG", b"\xff\xe1\0\x12Exif\0\0" + bytes(10), 99),
        in_parts("PNG", chunk(b"abCd", b""), 10_000),
        in_parts("GIF", b"!\xfe\1a\0", 10_000),
    ],
    ids=["JPEG, EXIF", "PNG, chunks", "GIF, comments"],
)
def test_a_file_of_many_parts_is_read(data):
    assert status(data) == 200


def test_many_text_chunks_do_not_add_up():
    info = PngImagePlugin.PngInfo()
    for i in range(200):
        info.add_text(f"key{i}", "a" * 900_000, zip=True)
    assert status(encoded(RGB, "PNG", pnginfo=info)) in (200, 415, 422)


@pytest.mark.parametrize(
    "data",
    [
        png(100_000, 100_000, zlib.compress(b"")),
        png(2**31 - 1, 2**31 - 1, b""),
        png(1, 50_000_001, zlib.compress(b"")),
        png(50_000_001, 1, zlib.compress(b"")),
        png(1, 65_536, zlib.compress(b"")),
        b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x44\x01\0;",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        encoded(RGB, "JPEG").replace(b"\0\x1e\0\x28", b"\xff\xff\xff\xff", 1),
    ],
    ids=["png", "png, largest", "png, high", "png, wide", "png, narrow", "gif", "bmp", "jpeg"],
)  # fmt: skip
def test_too_many_pixels_are_a_413_before_they_are_decoded(data):
    tracemalloc.start()
    try:
        assert refusal(data).status == 413
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_more_pixels_than_its_decoder_can_hold_are_a_413_for_webp(monkeypatch):
    monkeypatch.setattr(images, "MAX_WEBP_PIXELS", 40 * 30 - 1)
    assert refusal(FORMS["WebP"]).status == 413
    assert load_image(FORMS["JPEG"]).size == (40, 30)


@pytest.mark.parametrize(
    ("size", "bits", "colour"), [((0, 5), 8, 2), ((5, 0), 8, 2), ((5, 5), 8, 5)]
)
def test_impossible_headers_are_a_4xx(size, bits, colour):
    assert status(png(*size, zlib.compress(b""), bits, colour)) in (415, 422)


def test_a_narrow_image_that_would_be_gigabytes_when_scaled_is_a_422():
    assert status(encoded(Image.new("L", (1, 60_000)), "PNG")) == 422


def test_a_jpeg_of_many_scans_is_a_413_at_once():
    assert refusal(many_scans(2000, 500)).status == 413
    assert status(many_scans(64, 20)) == 200


def test_a_tile_larger_than_the_image_is_never_allocated():
    assert refusal(huge_tile(2048)).status == 415


def test_a_webp_with_trailing_junk_and_a_polyglot_are_images_all_the_same():
    assert status(FORMS["PNG"] + b"<script>alert(1)</script>") == 200
    assert status(FORMS["JPEG"] + b"PK\3\4" + bytes(1000)) == 200


def frames(form: str) -> bytes:
    pictures = [Image.new("RGB", (20, 20), colour) for colour in ("red", "lime", "blue")]
    return encoded(pictures[0], form, save_all=True, append_images=pictures[1:] * 50, duration=10)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame(form):
    red, green, blue = to_rgb(load_image(frames(form))).getpixel((10, 10))
    assert red > 240 and green < 15 and blue < 15


ADOBE = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG")
OPAQUE, CLEAR = (10, 20, 30, 255), (10, 20, 30, 0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.new("L", (32, 32), 100), "JPEG"), (100, 100, 100)),
        (encoded(Image.new("L", (32, 32), 100), "PNG"), (100, 100, 100)),
        (encoded(Image.new("1", (32, 32), 1), "PNG"), (255, 255, 255)),
        (encoded(Image.new("LA", (32, 32), (100, 0)), "PNG"), (255, 255, 255)),
        (encoded(Image.new("RGBA", (32, 32), OPAQUE), "PNG"), (10, 20, 30)),
        (encoded(Image.new("RGBA", (32, 32), CLEAR), "PNG"), (255, 255, 255)),
        (encoded(Image.new("RGBA", (32, 32), OPAQUE), "WEBP", lossless=True), (10, 20, 30)),
        (encoded(Image.new("RGBA", (32, 32), CLEAR), "WEBP", lossless=True), (255, 255, 255)),
        (encoded(Image.fromarray(np.full((8, 8), 257 * 9, np.uint16)), "PNG"), (9, 9, 9)),
        (encoded(Image.new("RGB", (32, 32), (10, 20, 30)).quantize(2), "PNG"), (10, 20, 30)),
        (encoded(Image.new("RGB", (32, 32), (10, 20, 30)).quantize(2), "GIF"), (10, 20, 30)),
        (encoded(Image.new("RGB", (32, 32), (10, 20, 30)).quantize(2), "BMP"), (10, 20, 30)),
        (ADOBE, (255, 0, 0)),
        (encoded(Image.new("RGB", (8, 8), (9, 9, 9)), "PNG", transparency=(9, 9, 9)), (255,) * 3),
        (encoded(Image.new("L", (8, 8), 9), "PNG", transparency=9), (255, 255, 255)),
        (png(4, 4, zlib.compress((b"\0" + struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC) * 4) * 4), 16),
         (0x12, 0x56, 0x9A)),
    ],
)  # fmt: skip
def test_every_kind_becomes_the_right_rgb(data, expected):
    pixel = to_rgb(load_image(data)).getpixel((3, 3))
    assert max(abs(a - b) for a, b in zip(pixel, expected, strict=True)) <= 2
