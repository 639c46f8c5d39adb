"""A bundle from S3, loaded, against the bare model file: `make bench-bundle`.

Under AWS's runtime emulator with the layer, from a stand-in for S3 (benchmarks/s3.py), in turn:

- `bundle`: pytorch/'s way: streamed, hashed, unpacked to memory, its code searched, loaded;
- `bare file`: `download_file` to /tmp and `torch.jit.load`, with nothing checked.

ResNet-50: 102 MB. `ready` is the bundle with everything that INIT does to it: fused, compared with
the plain network, and warm. Writes BUILD/bench/bundle.json with all rounds, medians and ratios.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import requests
from tqdm import tqdm

from benchmarks import results, s3
from benchmarks.init import bundles
from local.cli import UserError, run, shown
from local.invoke import LAYER, TIMEOUT, running, unpacked
from local.paths import ROOT

MODEL = "resnet50"
WAYS = ["bundle", "bare file", "ready"]
RATES = [0, 80]  # MB/s

HANDLER = """
import unzip_requirements
import os, sys, tempfile, time
sys.path.insert(0, os.environ["FUNCTION"])
import boto3
import torch
import download, network
from model import Model

def bundle(bucket, name):
    with download.download(bucket, name + ".tar.gz").model as file:
        fetched = time.perf_counter()
        network._open_script(file, fuse=False)
    return fetched

def bare_file(bucket, name):
    path = os.path.join(tempfile.gettempdir(), "model.pt")
    boto3.client("s3").download_file(bucket, name + ".pt", path)
    fetched = time.perf_counter()
    torch.jit.load(path, map_location="cpu").eval()
    os.remove(path)
    return fetched

def ready(bucket, name):
    Model.from_s3(bucket, name + ".tar.gz")
    return time.perf_counter()

def lambda_handler(event, context):
    way = {"bundle": bundle, "bare file": bare_file, "ready": ready}[event["way"]]
    started = time.perf_counter()
    fetched = way(event["bucket"], event["name"])
    ended = time.perf_counter()
    return {"fetch_s": fetched - started, "load_s": ended - fetched, "total_s": ended - started}
"""


def compare(rounds: int, latency: float, rates: list[float]) -> list[dict]:
    """All rounds; the first of each rate is not counted."""
    folder, layer, rows = bundles([MODEL]), unpacked(LAYER), []
    for rate in rates:
        with (
            tempfile.TemporaryDirectory() as place,
            tempfile.TemporaryDirectory() as scratch,
            tempfile.TemporaryFile() as log,
            s3.running(folder, latency, rate * 1e6) as variables,
        ):
            Path(place, "app.py").write_text(HANDLER)
            variables |= {"FUNCTION": str(ROOT / "pytorch"), "PYTHONDONTWRITEBYTECODE": "1"}
            with running(Path(place), layer, Path(scratch), variables, log) as address:
                speed = f"{rate:g} MB/s" if rate else "no limit"
                for number in tqdm(range(rounds + 1), desc=speed, unit="round"):
                    for way in WAYS:
                        event = {"way": way, "bucket": s3.BUCKET, "name": MODEL}
                        answer = requests.post(address, json=event, timeout=TIMEOUT).json()
                        if "total_s" not in answer:
                            raise UserError(f"{way}: {answer.get('errorMessage', answer)}")
                        if number:
                            rows.append({"round": number, "rate_mb_s": rate, "way": way} | answer)
    return rows


def summarise(rounds: list[dict]) -> tuple[list[dict], dict[str, float]]:
    """Medians for each rate and way, and the ratio bundle / bare file of the totals by rate."""
    groups: dict[tuple, list[dict]] = {}
    for row in rounds:
        groups.setdefault((row["rate_mb_s"], row["way"]), []).append(row)
    medians = {
        group: {name: statistics.median(r[name] for r in rows)
                for name in ("fetch_s", "load_s", "total_s")}
        for group, rows in groups.items()
    }  # fmt: skip
    ratios = {
        f"{rate:g}": medians[rate, "bundle"]["total_s"] / medians[rate, "bare file"]["total_s"]
        for rate in {rate: None for rate, _ in groups}
    }
    return [{"rate_mb_s": rate, "way": way} | m for (rate, way), m in medians.items()], ratios


def table(result: dict) -> str:
    """Markdown, a row for each rate and way."""
    lines = ["| MB/s | way | fetch s | load s | total s | ratio |", "| --- | --- |" + " ---: |" * 4]
    for row in result["median"]:
        rate, way = row["rate_mb_s"], row["way"]
        ratio = f"{result['ratio'][format(rate, 'g')]:.2f}" if way == "bundle" else ""
        parts = [f"{row[n]:.2f}" if way != "ready" else "" for n in ("fetch_s", "load_s")]
        lines.append(
            f"| {format(rate, 'g') if rate else 'no limit'} | {way} | {' | '.join(parts)} "
            f"| {row['total_s']:.2f} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument("--latency", type=float, default=0.03, help="of S3, seconds")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=RATES, help="of S3, MB/s; 0: no limit"
    )
    parser.add_argument("--output", type=Path, help="default: build/bench/bundle.json")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    rounds = compare(options.rounds, options.latency, options.rates)
    medians, ratios = summarise(rounds)
    result = {"ratio": ratios, "median": medians, "rounds": rounds, "latency_s": options.latency}
    output = results.write("bundle", result, options.output)
    print(table(result))
    print(shown(output))


if __name__ == "__main__":
    run(main)
