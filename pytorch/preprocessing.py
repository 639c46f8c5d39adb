"""From an image to the array that the model takes.

The training and the Lambda function use this one class, and its settings travel in the model's
bundle as `preprocessing.json`, so that what a model sees in service is what it was trained on.
It needs Pillow and numpy only: torchvision stays out of the Lambda layer.
"""

import json
from dataclasses import asdict, dataclass, fields

import numpy as np
from PIL import Image

# A bundle may come from anywhere; a larger input would be a mistake or an attack on the memory.
MAX_SIZE = 2048
# 80 MB. Scaling the short side of 1 x 60,000 pixels to 256 would take 16 GB.
MAX_SCALED_PIXELS = 20_000_000
STRIP = 1_000_000  # pixels that are converted at a time
GREY_8_BIT = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 65,535 to 255, rounded

ORIENTATION_TAG = 0x0112
# EXIF 2.3, table 4.6.4 A: how the stored picture has to be turned to be seen upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Preprocessing:
    """Scale the short side to `resize`, cut out the centre, scale to 0..1, normalise each channel.

    Attributes:
        resize: length of the image's short side after scaling, in pixels, at least `crop`.
        crop: side of the square cut from the centre, in pixels: the model's input size.
        mean, std: per channel (red, green, blue), for values in 0..1.
        interpolation: `bilinear`, `bicubic` or `lanczos`, each antialiased as Pillow does it.

    Raises:
        ValueError: a field has a wrong type or value; the sentence names it.
    """

    resize: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_SIZE:
                raise ValueError(f"preprocessing: {name} must be an integer in 1..{MAX_SIZE}")
        if self.crop > self.resize:
            raise ValueError(
                f"preprocessing: crop ({self.crop}) must not exceed resize ({self.resize})"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            three = isinstance(values, list | tuple) and len(values) == 3
            if not (three and all(map(_moderate, values))):
                raise ValueError(f"preprocessing: {name} must be three numbers up to 1e6")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if min(self.std) < 1e-6:
            raise ValueError("preprocessing: std must be at least 1e-6 for each channel")
        if not isinstance(self.interpolation, str) or self.interpolation not in RESAMPLING:
            raise ValueError(f"preprocessing: interpolation must be one of {', '.join(RESAMPLING)}")

    @classmethod
    def from_json(cls, text: str) -> "Preprocessing":
        """Read what `to_json` wrote. Raises ValueError with a sentence for anything else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"preprocessing: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError("preprocessing: must be a JSON object")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"preprocessing: unknown field {unknown[0]!r}")
        if missing := sorted(known - {"interpolation"} - values.keys()):
            raise ValueError(f"preprocessing: field {missing[0]!r} is missing")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Turn a Pillow image of any size and mode into a float32 array of (3, crop, crop).

        The result is that of torchvision's Resize, CenterCrop, ToTensor and Normalize, to within
        one of 255 grey levels.

        Raises:
            ValueError: the image is empty, so narrow that scaling would take too much memory, or of
                a colour mode that cannot be turned into RGB.
            OSError: the image's data are damaged (Pillow decodes lazily).
        """
        pixels = np.asarray(self._centre(to_rgb(image))).transpose(2, 0, 1)
        scale = np.float32(1 / (255 * np.array(self.std)))[:, None, None]
        offset = np.float32(np.array(self.mean) / self.std)[:, None, None]
        result = np.multiply(pixels, scale, dtype=np.float32, order="C")
        return np.subtract(result, offset, out=result)

    def _centre(self, image: Image.Image) -> Image.Image:
        """Scale and crop; sizes and offsets are rounded as in torchvision."""
        short = min(image.size)
        width, height = (int(self.resize * side / short) for side in image.size)
        if width * height > MAX_SCALED_PIXELS:
            raise ValueError(f"the image is too narrow ({image.width} x {image.height} pixels)")
        image = image.resize((width, height), RESAMPLING[self.interpolation])
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        return image.crop((left, top, left + self.crop, top + self.crop))


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any Pillow image upright and into 8-bit RGB; what is transparent becomes white.

    16-bit grey is scaled (65,535 is white), not cut off at 255 as `convert` would do.

    Raises:
        ValueError: the image is empty, or Pillow cannot turn its mode (such as LAB) into RGB.
        OSError: the image's data are damaged.
    """
    if min(image.size) < 1:
        raise ValueError("the image is empty")
    image.load()  # while its file is open: an RGB image is returned as it is
    upright = UPRIGHT.get(_orientation(image))
    if upright is not None:
        image = image.transpose(upright)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):  # so that no third copy of the whole is needed
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_strip_to_rgb(strip), (0, top))
    return rgb


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).clip(0, 65535)
        return Image.fromarray(GREY_8_BIT[grey]).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    try:
        return image.convert("RGB")
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"the image's colour mode {image.mode} cannot be turned into RGB"
        ) from error


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ORIENTATION_TAG)
    except Exception:  # damaged metadata, in many ways; the pixels may well be intact
        return None


def _moderate(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e6  # False for NaN too


IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What torchvision's ImageNet weights expect, and what a bundle without preprocessing.json gets."""
