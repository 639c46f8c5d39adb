"""INIT of the real function, and its first requests: `make bench-init`.

pytorch/ runs with the layer under AWS's runtime emulator, in a fresh process with an empty /tmp
each time, and takes its bundle from a stand-in for S3 (benchmarks/s3.py). In turn:

- `overlapped`: as it is; the bundle is downloaded while torch is unpacked and imported;
- `one by one`: the same without the line that begins the download before that;
- `not fused`: without oneDNN fusion, whose compilation INIT pays for.

`first answer` counts from the start of the environment to the answer to the first request, `second`
and `warm` (the median of the later ones) are what the function's own log says of a request.
Writes BUILD/bench/init.json with all rounds and medians.
"""

import argparse
import base64
import io
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import requests
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks import results, s3
from local.atomic import replacing
from local.cli import UserError, run, shown
from local.invoke import LAYER, TIMEOUT, running, unpacked
from local.paths import BUILD, ROOT
from preprocessing import IMAGENET

FOLDER = BUILD / "bench" / "bundles"
BEGINS = 'download.begin(os.environ.get("MODEL_BUCKET"), os.environ.get("MODEL_KEY"))'
FUSES = "FUSES = platform"
# What is changed in which file of pytorch/.
WITHOUT = {
    "overlapped": {},
    "one by one": {"app.py": (BEGINS, "pass")},
    "not fused": {"network.py": (FUSES, "FUSES = False and platform")},
}
MODELS = ["resnet18", "resnet18.int8"]
PHOTOGRAPHS = ["china.jpg", "flower.jpg"]  # of scikit-learn
REQUESTS = 30
WARM_AFTER = 5


def bundles(names: list[str]) -> Path:
    """A folder with NAME.pt and its bundle NAME.tar.gz, random weights, for 224x224 images."""
    import torch

    from training.bundle import create
    from training.model import build
    from training.quantize import quantize_module
    from training.trace import freeze, serialize, trace_module

    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = FOLDER / f"{name}.pt"
        if not path.exists():
            architecture, _, variant = name.partition(".")
            torch.manual_seed(0)
            model = build(architecture, 1000).eval()
            images = np.stack(
                [IMAGENET(photograph(PHOTOGRAPHS[0])), IMAGENET(photograph("flower.jpg"))]
            )
            if variant == "int8":
                made = quantize_module(model, images)
            else:
                made = freeze(trace_module(model, torch.from_numpy(images[:1])))
            with replacing(path) as partial:
                partial.write_bytes(serialize(made))
        bundle = FOLDER / f"{name}.tar.gz"
        if not bundle.exists():
            create(path, [f"class {i}" for i in range(1000)], output=bundle)
    return FOLDER


def task(variant: str, place: Path) -> Path:
    """The function's folder for a variant. Raises UserError if there is nothing to change."""
    folder = place / variant
    shutil.copytree(ROOT / "pytorch", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (old, new) in WITHOUT[variant].items():
        text = (folder / name).read_text()
        if text.count(old) != 1:
            raise UserError(f"{name} has not one {old!r}: the benchmark is out of date.")
        (folder / name).write_text(text.replace(old, new))
    return folder


def photograph(name: str) -> Image.Image:
    return Image.fromarray(load_sample_image(name))


def image_event() -> dict:
    file = io.BytesIO()
    photograph(PHOTOGRAPHS[0]).resize((256, 256)).save(file, "JPEG")
    return {"image": base64.b64encode(file.getvalue()).decode()}


def measure(folder: Path, layer: Path, variables: dict[str, str], cores: set[int]) -> dict:
    """A fresh environment and its first requests. Raises UserError if one fails."""
    event = image_event()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as log:
        with (
            running(folder, layer, Path(scratch), variables, log, cores) as address,
            requests.Session() as session,
        ):
            started = time.perf_counter()
            for number in range(REQUESTS):
                answer = session.post(address, json=event, timeout=TIMEOUT).json()
                if number == 0:
                    first = time.perf_counter() - started
                if answer.get("statusCode") != 200:
                    raise UserError(f"The function failed: {answer}")
        log.seek(0)
        text = log.read().decode()
    # The emulator's own lines may stand before the function's.
    lines = [
        json.JSONDecoder().raw_decode(text, found.start())[0]
        for found in re.finditer(r'\{"timestamp"', text)
    ]
    loaded = [line for line in lines if line["message"] == "model loaded"]
    if len(loaded) != 1:
        raise UserError(f"The function's log is not as expected:\n{text}")
    taken = [line["latency_ms"] for line in lines if line["message"] == "request"]
    return {
        "first_answer_s": first,
        "load_ms": loaded[0]["load_ms"],
        "first_ms": taken[0],
        "second_ms": taken[1],
        "warm_ms": statistics.median(taken[WARM_AFTER:]),
        "engine": loaded[0]["model"].rpartition(", ")[2],
    }


def compare(options: argparse.Namespace) -> list[dict]:
    """All rounds; those of the first turn, which fills the page cache, are not among them."""
    layer = unpacked(LAYER)
    available = sorted(os.sched_getaffinity(0))
    rounds = []
    with (
        tempfile.TemporaryDirectory() as place,
        s3.running(bundles(options.models), options.latency, options.rate * 1e6) as variables,
    ):
        folders = {variant: task(variant, Path(place)) for variant in options.variants}
        for number in range(options.rounds + 1):
            for cores in (n for n in options.cores if n <= len(available)):
                for model in options.models:
                    for variant in options.variants:
                        row = {"cores": cores, "model": model, "variant": variant} | measure(
                            folders[variant],
                            layer,
                            variables
                            | {
                                "MODEL_BUCKET": s3.BUCKET,
                                "MODEL_KEY": f"{model}.tar.gz",
                                # As on Lambda, where the function's folder is read-only.
                                "PYTHONDONTWRITEBYTECODE": "1",
                            },
                            set(available[:cores]),
                        )
                        print(
                            f"round {number}/{options.rounds}, {cores} core{'s'[: cores - 1]}, "
                            f"{model}, {variant}: {row['first_answer_s']:.2f} s"
                            + ("" if number else " (warm-up, not counted)"),
                            file=sys.stderr, flush=True,
                        )  # fmt: skip
                        if number:
                            rounds.append({"round": number} | row)
    return rounds


def summarise(rounds: list[dict]) -> list[dict]:
    """Medians for each number of cores, model and variant, in the order in which they ran."""
    groups: dict[tuple, list[dict]] = {}
    for row in rounds:
        groups.setdefault((row["cores"], row["model"], row["variant"]), []).append(row)
    medians = []
    for (cores, model, variant), rows in groups.items():
        median = {"cores": cores, "model": model, "variant": variant, "engine": rows[0]["engine"]}
        for name in ("first_answer_s", "load_ms", "first_ms", "second_ms", "warm_ms"):
            median[name] = statistics.median(row[name] for row in rows)
        median["second_to_warm"] = statistics.median(r["second_ms"] / r["warm_ms"] for r in rows)
        medians.append(median)
    return medians


def table(result: dict) -> str:
    """Markdown, a row for each number of cores, model and variant."""
    lines = [
        "| cores | model | variant | engine | first answer s | load ms | first ms | second ms "
        "| warm ms | second / warm |",
        "| --- | --- | --- | --- |" + " ---: |" * 6,
    ]
    for row in result["median"]:
        lines.append(
            f"| {row['cores']} | {row['model']} | {row['variant']} | {row['engine']} "
            f"| {row['first_answer_s']:.2f} | {row['load_ms']:.0f} | {row['first_ms']:.1f} "
            f"| {row['second_ms']:.1f} | {row['warm_ms']:.1f} | {row['second_to_warm']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.init",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--variants", nargs="+", choices=list(WITHOUT), default=list(WITHOUT))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--cores", nargs="+", type=int, choices=[1, 2], default=[2, 1])
    parser.add_argument("--latency", type=float, default=0.03, help="of S3, seconds")
    parser.add_argument("--rate", type=float, default=80, help="of S3, MB/s; 0: no limit")
    parser.add_argument("--output", type=Path, help="default: build/bench/init.json")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    rounds = compare(options)
    settings = {"latency_s": options.latency, "rate_mb_s": options.rate}
    result = {"median": summarise(rounds), "rounds": rounds, "s3": settings}
    output = results.write("init", result, options.output)
    print(table(result))
    print(shown(output))


if __name__ == "__main__":
    run(main)
