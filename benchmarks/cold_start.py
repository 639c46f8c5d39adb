"""Cold start of a Lambda function: this project's layer against the usual method, side by side.

`python -m benchmarks.cold_start` (`make bench-cold-start`) runs the same handler under AWS's own
runtime emulator and Python runtime client, in fresh processes with an empty /tmp, in turn:

- `layer`: layer/pytorch-*-lambda-layer.zip as it would lie in /opt;
- `memory`: the same, unpacked to anonymous memory instead of /tmp;
- `whole zip`: the method that this project replaces: all packages of the same wheels in one
  deflated zip, which is extracted whole into /tmp before the first import.

Time counts from the start of the runtime's process to the end of the first prediction: ResNet-18
on a 224x224 JPEG. The files are in the page cache for all, as after a first run.
Writes BUILD/bench/cold-start.json with all rounds, medians, and the ratio layer / whole zip.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import requests
from matplotlib.figure import Figure

from layer.build import Target, build, read_manifest, serving_packages
from local.cli import UserError, run
from local.invoke import TIMEOUT, running, unpacked
from local.paths import BUILD

STAGES = ["runtime", "unpack", "other imports", "import torch", "model", "first prediction"]
VARIANTS = ["whole zip", "layer", "memory"]

HANDLER = """
import time
def now():
    return time.clock_gettime(time.CLOCK_BOOTTIME)
marks = [("runtime", now())]
import unzip_requirements
marks.append(("unpack", now()))
import io, os, resource
import boto3
import numpy as np
from PIL import Image
marks.append(("other imports", now()))
import torch
marks.append(("import torch", now()))

def lambda_handler(event, context):
    invoked = now()
    model = torch.jit.load(event["model"], map_location="cpu").eval()
    loaded = now()
    image = np.asarray(Image.open(event["image"]).convert("RGB"), dtype=np.float32) / 255
    image = (image - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    batch = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None].contiguous()
    with torch.inference_mode(), torch.jit.optimized_execution(False):
        answer = model(batch).softmax(1)[0]
    ended = now()
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    start = last = ticks / os.sysconf("SC_CLK_TCK")
    stages = {}
    for name, mark in marks:
        stages[name], last = mark - last, mark
    return {
        "stages": stages | {"model": loaded - invoked, "first prediction": ended - loaded},
        "total": ended - start,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "class": int(answer.argmax()),
        "confidence": float(answer.max()),
        "torch": torch.__version__,
    }
"""

# The baseline, in the few lines that everybody writes for it.
WHOLE_ZIP = """
import os, shutil, sys, tempfile, zipfile
target = os.path.join(tempfile.gettempdir(), "sls-py-req")
partial = target + "-partial"
if not os.path.exists(target):
    shutil.rmtree(partial, ignore_errors=True)
    source = os.path.join(os.path.dirname(__file__), ".requirements.zip")
    zipfile.ZipFile(source).extractall(partial)
    os.rename(partial, target)
sys.path.insert(0, target)
"""


def prepare(folder: Path) -> tuple[dict[str, Path], dict]:
    """Everything the rounds need, made once: the folders, and the budget of the layer."""
    zip_path = build(Target.create("local"))
    ours = unpacked(zip_path)
    packages = serving_packages(Target.create("local"))
    theirs = folder / f"whole-zip-{packages.name}"
    if not (theirs / "complete").exists():
        print("Making the baseline's zip …", file=sys.stderr)
        (theirs / "python").mkdir(parents=True, exist_ok=True)
        (theirs / "python" / "unzip_requirements.py").write_text(WHOLE_ZIP)
        with zipfile.ZipFile(
            theirs / "python" / ".requirements.zip", "w", zipfile.ZIP_DEFLATED
        ) as file:
            for path in sorted(packages.rglob("*")):
                parts = path.relative_to(packages).parts
                # What that method's scripts remove: metadata, tests, bytecode.
                dropped = {"tests", "__pycache__"} & set(parts) or ".dist-info" in parts[0]
                if path.is_file() and not dropped:
                    file.write(path, Path(*parts))
        (theirs / "complete").touch()
    task = folder / "task"
    task.mkdir(exist_ok=True)
    (task / "app.py").write_text(HANDLER)
    if not (task / "model.pt").exists():
        make_model(task)
    paths = {"whole zip": theirs, "layer": ours, "memory": ours, "task": task}
    return paths, read_manifest(zip_path)["budget"]


def make_model(task: Path) -> None:
    import numpy as np
    import torch
    import torchvision
    from PIL import Image

    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(task / "image.jpg", quality=90)
    model = torchvision.models.resnet18().eval()
    traced = torch.jit.trace(model, torch.zeros(1, 3, 224, 224))
    torch.jit.save(traced, str(task / "model.partial"))
    os.replace(task / "model.partial", task / "model.pt")


def measure(variant: str, paths: dict[str, Path], cores: set[int]) -> dict:
    """One cold start. Raises UserError if the function fails."""
    variables = {"UNZIP_REQUIREMENTS_TO": "memory"} if variant == "memory" else {}
    event = {"model": str(paths["task"] / "model.pt"), "image": str(paths["task"] / "image.jpg")}
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as log:
        with running(
            paths["task"], paths[variant], Path(scratch), variables, log, cores
        ) as address:
            answer = requests.post(address, json=event, timeout=TIMEOUT).json()
        if "total" not in answer:
            raise UserError(f"{variant}: {answer.get('errorMessage', answer)}")
        answer["tmp"] = sum(p.stat().st_size for p in Path(scratch).rglob("*") if p.is_file())
    return answer


def compare(rounds: int, variants: list[str], cores: list[int]) -> dict:
    folder = BUILD / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    paths, budget = prepare(folder)
    available = sorted(os.sched_getaffinity(0))
    results = []
    settings = [n for n in cores if n <= len(available)]
    for number in range(rounds + 1):  # the first, which fills the page cache, is not counted
        for n in settings:
            for variant in variants:
                answer = measure(variant, paths, set(available[:n]))
                print(
                    f"round {number}/{rounds}, {n} core{'s'[: n - 1]}, {variant}: "
                    f"{answer['total']:.2f} s" + ("" if number else " (warm-up, not counted)"),
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                if number:
                    results.append({"round": number, "cores": n, "variant": variant} | answer)
    return summarise(results, settings, variants, budget)


def summarise(rounds: list[dict], cores: list[int], variants: list[str], budget: dict) -> dict:
    """Medians per number of cores and variant, and the ratios of their totals."""
    words = {1: "one_core", 2: "two_cores"}
    medians: dict[str, dict] = {}
    for n in cores:
        for variant in variants:
            rows = [r for r in rounds if r["cores"] == n and r["variant"] == variant]
            medians.setdefault(words[n], {})[variant] = {
                **{key: statistics.median(r[key] for r in rows)
                   for key in ("total", "peak_memory", "tmp")},
                "stages": {s: statistics.median(r["stages"][s] for r in rows) for s in STAGES},
            }  # fmt: skip
    answers = {(r["class"], round(r["confidence"], 5)) for r in rounds}
    if len(answers) != 1:
        raise UserError(f"The variants do not predict the same: {sorted(answers)}.")
    return {
        "ratio": {
            name: median["layer"]["total"] / median["whole zip"]["total"]
            for name, median in medians.items()
            if {"layer", "whole zip"} <= median.keys()
        },
        "median": medians,
        "rounds": rounds,
        "layer": {key: budget[key] for key in ("unzipped", "zipped", "extracted")},
        "versions": {
            "python": platform.python_version(),
            "torch": rounds[0]["torch"],
        },
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
        },
    }


def processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def table(result: dict) -> str:
    """Markdown: one row per number of cores and variant; seconds, MB of 10^6 bytes."""
    lines = [
        "| cores | method | " + " | ".join(STAGES) + " | total s | ratio | peak MB | /tmp MB |",
        "| --- | --- |" + " ---: |" * (len(STAGES) + 4),
    ]
    for name, variants in result["median"].items():
        for variant, row in variants.items():
            base = variants.get("whole zip", row)["total"]
            lines.append(
                f"| {name.replace('_', ' ')} | {variant} | "
                + " | ".join(f"{row['stages'][s]:.2f}" for s in STAGES)
                + f" | {row['total']:.2f} | {row['total'] / base:.3f} "
                f"| {row['peak_memory'] / 1e6:.0f} | {row['tmp'] / 1e6:.0f} |"
            )
    return "\n".join(lines)


def plot(result: dict) -> Figure:
    """Stacked bars of the median seconds per stage, for every method and number of cores."""
    figure = plt.figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots()
    bars = [
        (f"{variant}, {name.replace('_', ' ')}", row)
        for name, variants in result["median"].items()
        for variant, row in variants.items()
    ]
    left = [0.0] * len(bars)
    colours = ["#999999", "#D55E00", "#56B4E9", "#0072B2", "#009E73", "#F0E442"]
    for stage, colour in zip(STAGES, colours, strict=True):
        widths = [row["stages"][stage] for _, row in bars]
        axes.barh([label for label, _ in bars], widths, left=left, color=colour, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, (_, row) in enumerate(bars):
        axes.annotate(f" {row['total']:.1f} s", (left[i], i), va="center")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds from process start to first prediction (medians)")
    axes.legend(fontsize="small", loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.cold_start",
        description="Cold start of the layer against one zip extracted whole.",
    )
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default 7)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--cores", nargs="+", type=int, choices=[1, 2], default=[2, 1])
    parser.add_argument("--output", type=Path, default=BUILD / "bench" / "cold-start.json")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    result = compare(options.rounds, options.variants, options.cores)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_name(options.output.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, options.output)
    print(table(result))
    print(options.output)


if __name__ == "__main__":
    run(main)
