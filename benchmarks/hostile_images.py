"""Images that are small to send and large to decode. Used by benchmarks.handler and the tests."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIDE = 7071  # pixels: the largest square below the handler's limit of 50,000,000


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def large(side: int = SIDE) -> dict[str, bytes]:
    """One image of `side` x `side` pixels for each way in which Pillow decodes."""
    size = (side, side)
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = Image.new("L", size, 7)
    palette = Image.new("P", size)
    palette.putpalette([10, 20, 30])
    return {
        "jpeg": encoded(Image.new("RGB", size, "red"), "JPEG"),
        "jpeg, turned": encoded(Image.new("RGB", size, "red"), "JPEG", exif=turned),
        "jpeg, progressive": encoded(
            Image.new("RGB", size, "red"), "JPEG", progressive=True, subsampling=0
        ),
        "jpeg, progressive, cmyk, turned": encoded(
            Image.new("CMYK", size), "JPEG", progressive=True, exif=turned
        ),
        "png": encoded(grey, "PNG"),
        "png, 16 bit": encoded(Image.fromarray(np.full(size, 40_000, np.uint16)), "PNG"),
        "png, 16 bit, turned": encoded(
            Image.fromarray(np.full(size, 40_000, np.uint16)), "PNG", exif=turned
        ),
        "png, alpha": encoded(Image.new("RGBA", size, (9, 8, 7, 6)), "PNG"),
        "png, alpha, turned": encoded(Image.new("RGBA", size, (9, 8, 7, 6)), "PNG", exif=turned),
        "png, grey with alpha": encoded(Image.new("LA", size, (9, 6)), "PNG"),
        "png, interlaced": interlaced_png(side),
        "png, transparent palette": encoded(palette, "PNG", transparency=0),
        "gif": encoded(palette, "GIF", transparency=0),
        "webp": encoded(Image.new("RGBA", size, (9, 8, 7, 6)), "WEBP", lossless=True, method=0),
        "bmp": encoded(Image.new("1", size), "BMP"),
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, bits: int = 8, colour: int = 2, adam7: int = 0):
    """A PNG file of a header, one IDAT chunk with `data`, whatever that is, and an end."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, adam7)
    parts = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def interlaced_png(side: int) -> bytes:
    rows = []
    for x0, y0, dx, dy in (
        *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
        *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
    ):
        width, height = len(range(x0, side, dx)), len(range(y0, side, dy))
        rows.append(bytes((width + 1) * height))
    return png(side, side, zlib.compress(b"".join(rows), 1), colour=0, adam7=1)


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG that asks the decoder to go over all its blocks `scans` times."""
    plain = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    start = plain.index(b"\xff\xda")
    end = plain.index(b"\xff", start + 2)
    while plain[end + 1] == 0 or 0xD0 <= plain[end + 1] <= 0xD7:
        end = plain.index(b"\xff", end + 2)
    last = plain.rindex(b"\xff\xda")
    return plain[:last] + plain[last:-2] * scans + b"\xff\xd9"


def huge_tile(tile: int) -> bytes:
    """A TIFF of one pixel, stored in one deflated tile of `tile` x `tile` bytes."""
    packer = zlib.compressobj(9)
    row = bytes(tile)
    data = b"".join(packer.compress(row) for _ in range(tile)) + packer.flush()
    tags = [
        (256, 4, 1), (257, 4, 1), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
        (322, 4, tile), (323, 4, tile), (324, 4, None), (325, 4, len(data)),
    ]  # fmt: skip
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", offset if value is None else value)
        for tag, kind, value in tags
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data
