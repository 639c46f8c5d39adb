"""What the handler's care costs, and what it bounds: `make bench-handler`.

- guards: a fetch with all checks against a plain `requests.get`, from a server on this machine;
- preprocessing: the handler's against torchvision's transforms, on photographs of each mode;
- memory: the peak of decoding and preprocessing the images that are worst for it;
- log: the start-up time of our log lines against Powertools for AWS Lambda.

Each comparison runs both ways in turn, in one run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import requests
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2
from tqdm import tqdm

from benchmarks.hostile_images import SIDE, encoded, large, many_scans
from fetch import fetch
from images import MAX_SCANS, MAX_WEBP_PIXELS
from local.atomic import replacing
from local.cli import UserError, run
from local.paths import BUILD, ROOT
from preprocessing import IMAGENET, to_rgb

POWERTOOLS = "aws-lambda-powertools==3.37.0"
PARTS = ["guards", "preprocessing", "memory", "log"]


def in_turn(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each way, run in turn; a round before is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if number:
                taken[name].append((time.perf_counter() - started) * 1000)
    return {name: statistics.median(times) for name, times in taken.items()}


def guards(rounds: int) -> dict:
    """Milliseconds of one download, and their difference, for a small and a large image."""
    contents = {"/10 kB": bytes(10_000), "/2 MB": bytes(2_000_000)}

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(contents[self.path.replace("%20", " ")])))
            self.end_headers()
            self.wfile.write(contents[self.path.replace("%20", " ")])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"127.0.0.1:{server.server_port}"
    os.environ["ALLOW_PRIVATE_HOSTS"] = place
    result = {}
    for path in contents:
        url = f"http://{place}{path}"
        medians = in_turn(
            {
                "requests.get": lambda url=url: requests.get(url, timeout=10).content,
                "fetch": lambda url=url: fetch(url, time.monotonic() + 10),
            },
            rounds,
        )
        result[path[1:]] = medians | {"cost": medians["fetch"] - medians["requests.get"]}
    server.shutdown()
    return result


def photographs() -> dict[str, Image.Image]:
    """Photographs in each mode, decoded; scikit-learn brings two of 640 x 427 pixels."""
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    big = china.resize((4032, 2690), Image.Resampling.LANCZOS)  # the size of a telephone's
    grey = np.asarray(flower.convert("L"))
    alpha = flower.copy()
    alpha.putalpha(Image.fromarray(grey))
    return {
        "RGB": china,
        "RGB, 11 megapixels": big,
        "RGB, upright": flower.rotate(90, expand=True),
        "L": flower.convert("L"),
        "P": china.quantize(256),
        "RGBA": alpha,
        "LA": alpha.convert("LA"),
        "CMYK": china.convert("CMYK"),
        "16 bit": Image.fromarray(grey.astype(np.uint16) * 257),
        "1": china.convert("1"),
    }


def preprocessing(rounds: int) -> dict:
    """Milliseconds for each mode, ours and torchvision's, and the largest difference in levels."""
    transforms = v2.Compose(
        [
            v2.Resize(IMAGENET.resize),
            v2.CenterCrop(IMAGENET.crop),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET.mean, IMAGENET.std),
        ]
    )
    std = np.array(IMAGENET.std).reshape(3, 1, 1)
    result = {}
    for mode, image in photographs().items():
        # torchvision has no way of its own to RGB for these; both get the same.
        special = image.has_transparency_data or image.mode.startswith("I;16")
        rgb = to_rgb if special else lambda image: image.convert("RGB")
        theirs = lambda image=image, rgb=rgb: transforms(rgb(image))  # noqa: E731
        ours = lambda image=image: IMAGENET(image)  # noqa: E731
        medians = in_turn({"torchvision": theirs, "ours": ours}, rounds)
        difference = np.abs((ours() - theirs().numpy()) * std).max() * 255
        if difference > 1.001:
            raise UserError(f"{mode}: {difference:.2f} levels between ours and torchvision's.")
        result[mode] = medians | {
            "ratio": medians["ours"] / medians["torchvision"],
            "levels": float(difference),
        }
    return result


MEASURE = """
import json, sys, time
from images import load_image
from preprocessing import IMAGENET
from PIL import Image
def megabytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith(name)).split()[1]) * 1024 / 1e6
data = open(sys.argv[1], "rb").read()
IMAGENET(Image.new("RGB", (300, 300)))
before = megabytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
started = time.perf_counter()
IMAGENET(load_image(data))
seconds = time.perf_counter() - started
print(json.dumps({"peak_mb": megabytes("VmHWM") - before, "seconds": seconds}))
"""


def memory() -> dict:
    """Peak resident megabytes and seconds for each image, in a process of its own."""
    worst = large() | {
        "webp": large(int(MAX_WEBP_PIXELS**0.5))["webp"],
        f"jpeg, {MAX_SCANS} scans": many_scans(SIDE, MAX_SCANS - 10),
        "png, 1 : 300": encoded(Image.new("L", (256, 76_800)), "PNG"),
    }
    result = {}
    for name, data in tqdm(worst.items(), unit="image"):
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            command = [sys.executable, "-c", MEASURE, file.name]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        result[name] = {"sent_kb": len(data) / 1000} | json.loads(done.stdout)
    return result


IMPORTS = {
    "ours": "import telemetry; telemetry.configure()",
    "Powertools, Logger and Metrics": (
        "from aws_lambda_powertools import Logger, Metrics; Logger(service='a');"
        "Metrics(namespace='a', service='a')"
    ),
}
TIMED = """
import sys, time
import boto3, logging, json, traceback, PIL.Image, numpy
started = time.perf_counter()
exec(sys.argv[1])
print((time.perf_counter() - started) * 1000)
"""


def log(rounds: int) -> dict:
    """Milliseconds to import each, after what the handler imports anyway; and its size."""
    folder = BUILD / "bench" / POWERTOOLS
    if not folder.exists():
        with replacing(folder) as partial:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--target",
                partial,
                POWERTOOLS,
            ]
            if subprocess.run(pip).returncode:
                raise UserError(f"{POWERTOOLS} cannot be installed.")
    path = os.pathsep.join([str(ROOT / "pytorch"), *sys.path, str(folder)])
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in tqdm(range(rounds), unit="round"):
        for name, code in IMPORTS.items():
            done = subprocess.run(
                [sys.executable, "-c", TIMED, code],
                env=os.environ | {"PYTHONPATH": path, "AWS_DEFAULT_REGION": "us-east-1"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise UserError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            taken[name].append(float(done.stdout))
    package = folder / "aws_lambda_powertools"
    files = [file for file in package.rglob("*.py") if file.is_file()]
    return {name: {"import_ms": statistics.median(times)} for name, times in taken.items()} | {
        "Powertools' sources": {"mb": sum(file.stat().st_size for file in files) / 1e6}
    }


def table(name: str, rows: dict[str, dict]) -> str:
    """Markdown, one row an entry."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| {name} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for key, row in rows.items():
        cells = (f"{row[column]:.2f}" if column in row else "" for column in columns)
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.handler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=100, help="of each comparison (default 100)")
    parser.add_argument("--output", type=Path, default=BUILD / "bench" / "handler.json")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    measure = {
        "guards": lambda: guards(options.rounds),
        "preprocessing": lambda: preprocessing(options.rounds),
        "memory": memory,
        "log": lambda: log(max(3, options.rounds // 5)),
    }
    result = {}
    for part in options.parts:
        result[part] = measure[part]()
        print(table(part, result[part]), end="\n\n", flush=True)
    with replacing(options.output) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    run(main)
