"""Warm latency of an image classifier: this project's variants, plain PyTorch, ONNX Runtime.

`python -m benchmarks.latency` (`make bench-latency`) times ResNet-18 and ResNet-50 on a 224x224
image, batch 1, with one thread and with two:

- `eager`: the module of torchvision, in the notebooks' PyTorch;
- `traced`: torch.jit.trace and torch.jit.load, nothing else, the usual way on Lambda;
- `fp32`, `int8`, `export`: the variants of training.optimize, loaded by the function's code;
- `onnxruntime`: ONNX Runtime's own optimisations of the exported model, fp32.

Each runs in a process of its own, started once. In a round each process is asked in turn for some
predictions while the others sleep, so that what disturbs the machine disturbs all alike. All but
`eager` and `onnxruntime` run on the packages of the Lambda layer.

The weights are random, as nothing is downloaded: the time does not depend on them. int8 is
calibrated on crops of the two photographs that come with scikit-learn. The agreement of each
variant with `eager` is measured on other crops of them; what int8 costs in accuracy, notebook 02
measures on a trained model.

Writes BUILD/bench/latency.json with all rounds, medians, and the ratios to ONNX Runtime.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.results import processor
from layer.packages import Target, serving_packages
from local.atomic import replacing
from local.cli import UserError, run
from local.paths import BUILD, ROOT

MODELS = ["resnet18", "resnet50"]
VARIANTS = ["eager", "traced", "fp32", "int8", "export", "onnxruntime"]
FILES = {"traced": ".traced.pt", "fp32": ".pt", "int8": ".int8.pt", "export": ".pt2",
         "eager": ".state.pt", "onnxruntime": ".onnx"}  # fmt: skip
IN_A_ROW = 10  # predictions of a process in a round; the first two are not counted


def prepare(folder: Path, models: list[str]) -> None:
    """Make the files of all variants, those that are missing."""
    import torch

    from training.export import export_module
    from training.model import build
    from training.quantize import quantize_module
    from training.trace import freeze, serialize, trace_module

    crops = photographs(64)
    if not (folder / "images.npy").exists():
        with replacing(folder / "images.npy") as partial, partial.open("wb") as file:
            np.save(file, crops[1::4])
    calibration = np.delete(crops, np.s_[1::4], axis=0)
    for name in models:
        torch.manual_seed(0)
        model = build(name, 1000).eval()
        example = torch.from_numpy(crops[:1].copy())

        def traced(module, example=example):
            return trace_module(module, example)

        def onnx(path, model=model, example=example):
            with warnings.catch_warnings(), contextlib.redirect_stdout(None):
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    model, (example,), path, dynamo=True, external_data=False, verbose=False
                )

        makers = {
            "eager": lambda path, m=model: torch.save(m.state_dict(), path),
            "traced": lambda path, m=model, t=traced: torch.jit.save(t(m), path),
            "fp32": lambda path, m=model, t=traced: path.write_bytes(serialize(freeze(t(m)))),
            "int8": lambda path, m=model: path.write_bytes(
                serialize(quantize_module(m, calibration))
            ),
            "export": lambda path, m=model: path.write_bytes(export_module(m, crops[:1])),
            "onnxruntime": onnx,
        }
        for variant in tqdm(VARIANTS, desc=f"making {name}"):
            path = folder / f"{name}{FILES[variant]}"
            if not path.exists():
                with replacing(path) as partial:
                    makers[variant](partial)


def photographs(count: int) -> np.ndarray:
    """Crops of scikit-learn's two photographs, preprocessed: float32 of (count, 3, 224, 224)."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from preprocessing import IMAGENET

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    chance = random.Random(0)
    crops = []
    for i in range(count):
        photo, side = photos[i % 2], chance.randint(200, 420)
        left, top = (chance.randint(0, length - side) for length in photo.size)
        crops.append(IMAGENET(photo.crop((left, top, left + side, top + side))))
    return np.stack(crops)


class Worker:
    """A process that holds one variant of one model, and predicts when asked."""

    def __init__(self, folder: Path, model: str, variant: str, threads: int, packages: Path):
        ours = variant not in ("eager", "onnxruntime")
        # As on Lambda: the layer's packages and the function's code, and nothing else.
        python = [sys._base_executable, "-I", "-S"] if ours else [sys.executable]
        request = {
            "path": [str(packages), str(ROOT / "pytorch")] if ours else [],
            "file": str(folder / f"{model}{FILES[variant]}"),
            "images": str(folder / "images.npy"),
            "model": model,
            "variant": variant,
            "threads": threads,
            "in_a_row": IN_A_ROW,
        }
        self.name = f"{model} {variant}, threads: {threads}"
        self.process = subprocess.Popen(
            [*python, str(Path(__file__).with_name("latency_worker.py")), json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"]},
        )
        self.start = self.answer()

    def answer(self) -> dict:
        """The process's next line."""
        line = self.process.stdout.readline()
        if not line:
            reason = self.process.stderr.read().strip().splitlines() or ["no message"]
            raise UserError(f"{self.name}: {reason[-1]}")
        return json.loads(line)

    def predict(self) -> list[float]:
        """Seconds of some predictions in a row."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()["seconds"]

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(
    folder: Path, models: list[str], threads: list[int], rounds: int, packages: Path
) -> list[dict]:
    """One row for each model, number of threads and variant, with the seconds of each round."""
    rows = []
    with tqdm(total=len(models) * len(threads) * rounds, desc="measuring", unit="round") as bar:
        for model in models:
            for n in threads:
                with contextlib.ExitStack() as stack:
                    workers = {}
                    for variant in VARIANTS:
                        worker = workers[variant] = Worker(folder, model, variant, n, packages)
                        stack.callback(worker.stop)
                    seconds = {variant: [] for variant in VARIANTS}
                    for _ in range(rounds):
                        for variant, worker in workers.items():
                            seconds[variant].append(worker.predict())
                        bar.update()
                reference = np.array(workers["eager"].start["logits"])
                for variant, worker in workers.items():
                    logits = np.array(worker.start.pop("logits"))
                    rows.append(
                        {"model": model, "threads": n, "variant": variant}
                        | worker.start
                        | agreement(reference, logits)
                        | {
                            "bytes": (folder / f"{model}{FILES[variant]}").stat().st_size,
                            "median": statistics.median(s for r in seconds[variant] for s in r),
                            "rounds": seconds[variant],
                        }
                    )
    return rows


def agreement(reference: np.ndarray, logits: np.ndarray) -> dict:
    """How far logits of (N, classes) are from those of the eager model."""
    return {
        "same_class": float((reference.argmax(1) == logits.argmax(1)).mean()),
        "max_difference": float(np.abs(reference - logits).max() / np.abs(reference).max()),
    }


def summarise(rows: list[dict]) -> dict:
    """The rows, and the ratio of each median with two threads to that of ONNX Runtime."""
    ratio: dict[str, dict] = {}
    most = max(row["threads"] for row in rows)
    for row in rows:
        if row["threads"] == most:
            base = find(rows, row["model"], most, "onnxruntime")["median"]
            ratio.setdefault(row["model"], {})[row["variant"]] = row["median"] / base
    for row in rows:
        if row["variant"] != "int8" and row["max_difference"] > 1e-4:
            raise UserError(f"{row['model']} {row['variant']} answers differently: {row}")
    return {
        "ratio": ratio,
        "size": {
            model: find(rows, model, most, "int8")["bytes"]
            / find(rows, model, most, "fp32")["bytes"]
            for model in ratio
        },
        "rows": rows,
        "versions": {
            "python": platform.python_version(),
            "torch": find(rows, rows[0]["model"], most, "fp32")["version"],
            "eager torch": find(rows, rows[0]["model"], most, "eager")["version"],
            "onnxruntime": version("onnxruntime"),
        },
        "machine": {
            "processor": processor(),
            "features": features(),
            "cores": os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
        },
    }


def find(rows: list[dict], model: str, threads: int, variant: str) -> dict:
    key = (model, threads, variant)
    return next(r for r in rows if (r["model"], r["threads"], r["variant"]) == key)


def features() -> list[str]:
    """What of the processor's instructions decides the speed of a network."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                known = {"avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimd", "i8mm"}
                return sorted(known & set(line.split()))
    return []


def table(result: dict) -> str:
    """Markdown: a row for each model, number of threads and variant; ms, MB of 10^6 bytes."""
    lines = [
        "| model | threads | variant | MB | second call, ms | median, ms | ratio | same class |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        base = find(result["rows"], row["model"], row["threads"], "onnxruntime")["median"]
        lines.append(
            f"| {row['model']} | {row['threads']} | {row['variant']} | {row['bytes'] / 1e6:.1f} "
            f"| {row['second_call'] * 1e3:.0f} | {row['median'] * 1e3:.1f} "
            f"| {row['median'] / base:.2f} | {row['same_class']:.0%} |"
        )
    return "\n".join(lines)


def plot(result: dict) -> Figure:
    """Bars of the median milliseconds of each variant, a panel for each model."""
    models = list(result["ratio"])
    figure = plt.figure(figsize=(9, 2.8), layout="constrained")
    colours = {1: "#56B4E9", 2: "#0072B2"}
    for number, model in enumerate(models, start=1):
        axes = figure.add_subplot(1, len(models), number, title=model)
        rows = [row for row in result["rows"] if row["model"] == model]
        threads = sorted({row["threads"] for row in rows})
        for k, n in enumerate(threads):
            medians = [find(rows, model, n, variant)["median"] * 1e3 for variant in VARIANTS]
            height = 0.8 / len(threads)
            bars = axes.barh(
                np.arange(len(VARIANTS)) + k * height, medians, height,
                color=colours.get(n, "#999999"), label=f"{n} thread{'s'[: n - 1]}",
            )  # fmt: skip
            axes.bar_label(bars, fmt=" %.0f", fontsize="small")
        axes.set_yticks(np.arange(len(VARIANTS)) + 0.2, VARIANTS if number == 1 else [])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("milliseconds, median")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.latency",
        description="Warm latency of this project's variants, plain PyTorch and ONNX Runtime.",
    )
    parser.add_argument("--rounds", type=int, default=20, help="(default %(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--threads", nargs="+", type=int, choices=[1, 2], default=[2, 1])
    parser.add_argument("--output", type=Path, default=BUILD / "bench" / "latency.json")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    folder = BUILD / "bench" / "latency"
    prepare(folder, options.models)
    packages = serving_packages(Target.create("local"))
    rows = measure(folder, options.models, options.threads, options.rounds, packages)
    result = summarise(rows)
    with replacing(options.output) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    print(options.output)


if __name__ == "__main__":
    run(main)
