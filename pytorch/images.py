"""Decodes the image of a request without trusting it. Called by app.py."""

import io

from PIL import Image

from errors import RequestError

MAX_PIXELS = 50_000_000

Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def load_image(data: bytes) -> Image.Image:
    """Decode an image. Raises RequestError: 413 too many pixels, 415 no image, 422 a broken one."""
    too_large = RequestError(413, "too_large", f"The image has more than {MAX_PIXELS:,} pixels.")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise too_large from None
    except (OSError, ValueError, SyntaxError):
        raise RequestError(415, "not_an_image", "The address does not hold an image.") from None
    if image.width * image.height > MAX_PIXELS:  # known before anything is decoded
        raise too_large
    try:
        image.load()
    except Image.DecompressionBombError:
        raise too_large from None
    except (OSError, ValueError, SyntaxError):
        raise RequestError(422, "broken_image", "The image cannot be decoded.") from None
    return image
