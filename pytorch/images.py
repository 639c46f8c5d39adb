"""Decodes the image of a request without trusting it. Called by app.py.

What may be large is known and refused before it is decoded: pixels, the passes over them that a
progressive JPEG asks for, and the parts that a file is made of. TIFF is not read: its tiles have a
size of their own, which Pillow allocates whatever the image's size says.
"""

import io
import warnings

from PIL import Image, WebPImagePlugin  # noqa: F401 - Pillow looks for WebP only when it is imported

from errors import RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
MAX_WEBP_PIXELS = 25_000_000  # its decoder holds four copies beside the image
MAX_RLE_PIXELS = 2_000_000  # Pillow decodes run lengths (BMP) in Python
MAX_SCANS = 30  # of a JPEG; a usual progressive one has 10, and 10 MB have room for 300,000
MAX_SIDE = 65_535  # pixels, as in a JPEG; for each row there is a pointer beside the pixels
MAX_READS = 200_000  # under a second; a 10 MB PNG in chunks of 8 kB takes 7,000
MAX_PROFILES = 100  # Pillow joins EXIF segments in quadratic time, and unpacks each colour profile
PROFILES = (b"Exif\0\0", b"iCCP")  # as they begin in a JPEG and in a PNG

Image.preinit()  # imports the formats' modules here and not in the first request, 10 ms
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # load_image asks itself


class Parts(io.BytesIO):
    """A file as Pillow reads it, in Python and a part at a time: not more than MAX_READS parts.

    A part is a header, a PNG's chunk, a JPEG's segment, a GIF's comment or a BMP's run of pixels.
    """

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise _too_many_parts()
        return super().read(size)


def load_image(data: bytes) -> Image.Image:
    """Decode an image; of an animation the first frame.

    Raises RequestError: 413 too many pixels, 415 no image or of another format, 422 a broken one.
    """
    if any(data.count(name) > MAX_PROFILES for name in PROFILES):
        raise _too_many_parts()
    try:
        image = Image.open(Parts(data), formats=FORMATS)
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(MAX_PIXELS) from None
    except Image.UnidentifiedImageError:
        sentence = "This is no JPEG, PNG, WebP, GIF or BMP image."
        raise RequestError(415, "not_an_image", sentence) from None
    except Exception as error:  # Pillow reports damage in many ways
        raise _broken(error) from None
    limit = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
    if image.format == "BMP" and image.info.get("compression") in (1, 2):
        limit = MAX_RLE_PIXELS
    if image.width * image.height > limit:
        raise _too_large(limit)
    if max(image.size) > MAX_SIDE:
        sentence = f"A side of the image is longer than {MAX_SIDE:,} pixels."
        raise RequestError(413, "too_large", sentence)
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise RequestError(413, "too_large", f"The image has more than {MAX_SCANS} scans.")
    try:
        image.load()
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(MAX_PIXELS) from None
    except Exception as error:
        raise _broken(error) from None
    return image


def _too_large(limit: int) -> RequestError:
    return RequestError(413, "too_large", f"The image has more than {limit:,} pixels.")


def _too_many_parts() -> RequestError:
    return RequestError(413, "too_large", "The image's file is made of too many parts.")


def _broken(error: Exception) -> RequestError:
    return RequestError(422, "broken_image", "The image cannot be decoded.", type(error).__name__)
