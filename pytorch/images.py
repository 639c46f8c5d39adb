"""Decodes the image of a request without trusting it. Called by app.py.

What may be large is known and refused before it is decoded: pixels, and the passes over them that
a progressive JPEG asks for. TIFF is not read: its tiles have a size of their own, which Pillow
allocates whatever the image's size says.
"""

import io
import warnings

from PIL import Image, WebPImagePlugin  # noqa: F401 - Pillow looks for WebP only when it is imported

from errors import RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
MAX_WEBP_PIXELS = 25_000_000  # its decoder holds four copies beside the image
MAX_SCANS = 30  # of a JPEG; a usual progressive one has 10, and 10 MB have room for 300,000

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # load_image asks itself


def load_image(data: bytes) -> Image.Image:
    """Decode an image; of an animation the first frame.

    Raises RequestError: 413 too many pixels, 415 no image or of another format, 422 a broken one.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large(MAX_PIXELS) from None
    except Image.UnidentifiedImageError:
        sentence = "This is no JPEG, PNG, WebP, GIF or BMP image."
        raise RequestError(415, "not_an_image", sentence) from None
    except Exception as error:  # Pillow reports damage in many ways
        raise _broken(error) from None
    limit = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
    if image.width * image.height > limit:
        raise _too_large(limit)
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise RequestError(413, "too_large", f"The image has more than {MAX_SCANS} scans.")
    try:
        image.load()
    except Image.DecompressionBombError:
        raise _too_large(MAX_PIXELS) from None
    except Exception as error:
        raise _broken(error) from None
    return image


def _too_large(limit: int) -> RequestError:
    return RequestError(413, "too_large", f"The image has more than {limit:,} pixels.")


def _broken(error: Exception) -> RequestError:
    return RequestError(422, "broken_image", "The image cannot be decoded.", type(error).__name__)
