"""Run by build.py in a clean interpreter (`python -I -S smoke_test.py LAYER`) before a layer
is written: imports what the layer is for and predicts, with the layer alone on the path.

Prints JSON: the versions, and the modules that were imported without bytecode.
"""

import io
import json
import os
import sys

layer = sys.argv[1]
sys.path.insert(0, layer)

import unzip_requirements  # noqa: E402, F401, I001, RUF100  # before torch
import certifi  # noqa: E402
import numpy as np  # noqa: E402
import requests  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402


def main() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 10),
    ).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("JPEG", "PNG", "WEBP"):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, name)
        image = Image.open(io.BytesIO(stream.getvalue())).convert("RGB").resize((32, 32))
        batch = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        traced = torch.jit.trace(model, batch)
        archive = io.BytesIO()
        torch.jit.save(traced, archive)
        archive.seek(0)
        loaded = torch.jit.freeze(torch.jit.load(archive).eval())
        with torch.inference_mode():
            expected, actual = model(batch), loaded(batch)
        if not torch.allclose(expected, actual, atol=1e-5):
            raise SystemExit(f"the traced model answers {actual}, the eager one {expected}")
    requests.Session().close()
    if not os.path.isfile(certifi.where()):
        raise SystemExit("the certificate authorities of certifi are missing")

    sources = []
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        in_place = file.startswith(layer) and file.endswith(".py") and "archive.zip" not in file
        if in_place and not os.path.exists(getattr(module, "__cached__", None) or ""):
            sources.append(module.__name__)
    print(
        json.dumps(
            {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "numpy": np.__version__,
                "without_bytecode": sorted(sources),
            }
        )
    )


main()
