"""What the benchmarks make of their rounds, and that README tells what was measured."""

import json
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest

from benchmarks import bundle, cold_start, init, latency, results
from local.cli import UserError
from local.paths import ROOT

BUDGET = {"unzipped": 3, "zipped": 2, "extracted": 1}


def answer(variant, cores, total, confidence=0.5):
    stages = dict.fromkeys(cold_start.STAGES, total / len(cold_start.STAGES))
    return {
        "variant": variant, "cores": cores, "total": total, "stages": stages, "peak_memory": 10,
        "tmp": 20, "class": 1, "confidence": confidence, "torch": "2",
    }  # fmt: skip


def test_ratios_are_of_the_medians():
    rounds = [answer("whole zip", 2, total) for total in (8, 10, 90)]
    rounds += [answer("layer", 2, total) for total in (1, 2, 30)]
    result = cold_start.summarise(rounds, [2], ["whole zip", "layer"], BUDGET)
    assert result["ratio"] == {"two_cores": 0.2}
    assert result["median"]["two_cores"]["layer"]["total"] == 2
    assert result["rounds"] == rounds


def test_variants_that_predict_something_else_are_no_result():
    rounds = [answer("whole zip", 1, 2), answer("layer", 1, 1, confidence=0.4)]
    with pytest.raises(UserError, match="do not predict the same"):
        cold_start.summarise(rounds, [1], ["whole zip", "layer"], BUDGET)


def test_a_run_is_drawn_instead_of_the_stored_one(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "BUILD", tmp_path)
    assert results.latest("cold-start")["here"] is False
    results.write("cold-start", {"ratio": {"two_cores": 0.5}})
    made = results.latest("cold-start")
    assert made["here"] and made["ratio"] == {"two_cores": 0.5}
    assert made["machine"]["cores"] >= 1


def test_the_picture_has_every_bar(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "BUILD", tmp_path)
    measured = results.latest("cold-start")
    figure = cold_start.plot(measured)
    above, below = figure.axes
    bars = sum(len(variants) for variants in measured["median"].values())
    assert len(above.containers) == len(cold_start.STAGES)
    assert len(above.get_yticklabels()) == bars > len(below.get_yticklabels()) > 0
    plt.close(figure)


@pytest.mark.parametrize(
    ("name", "benchmark", "page"),
    [
        ("cold-start", cold_start, "README.md"),
        ("latency", latency, "README.md"),
        ("init", init, "docs/serving.md"),
        ("bundle", bundle, "docs/serving.md"),
    ],
)
def test_the_pages_show_the_stored_runs(name, benchmark, page):
    stored = json.loads((results.STORED / f"{name}.json").read_text())
    assert benchmark.table(stored) in (ROOT / page).read_text(encoding="utf-8")


def latency_row(variant, threads, seconds):
    return {
        "model": "m", "threads": threads, "variant": variant, "version": "2", "bytes": 10,
        "median": seconds / threads, "second_call": seconds, "same_class": 1.0,
        "max_difference": 0.01 * (variant == "int8"),
    }  # fmt: skip


def latency_rows(**seconds):
    return [latency_row(variant, n, s) for n in (2, 1) for variant, s in seconds.items()]


def test_latency_is_compared_with_onnx_runtime_at_most_threads():
    rows = latency_rows(eager=8, traced=6, fp32=4, int8=2, export=4, onnxruntime=4)
    result = latency.summarise(rows)
    assert result["ratio"]["m"] == {
        "eager": 2, "traced": 1.5, "fp32": 1, "int8": 0.5, "export": 1, "onnxruntime": 1,
    }  # fmt: skip
    assert "| m | int8 | 0.0 | 2000.0 | 2000.0 | 1000.0 | 0.50 | 100% |" in latency.table(result)
    figure = latency.plot(result)
    assert len(figure.axes[0].patches) == len(rows)
    plt.close(figure)


def test_a_float_variant_that_answers_differently_is_no_result():
    rows = latency_rows(eager=8, fp32=4, int8=2, onnxruntime=4)
    rows[1]["max_difference"] = 0.01
    with pytest.raises(UserError, match="m fp32 answers differently"):
        latency.summarise(rows)


@pytest.mark.parametrize("variant", init.WITHOUT)
def test_init_still_finds_what_it_changes(variant, tmp_path):
    folder = init.task(variant, tmp_path)
    changed = {
        path.name
        for path in folder.glob("*.py")
        if path.read_text() != (ROOT / "pytorch" / path.name).read_text()
    }
    assert changed == set(init.WITHOUT[variant])


def test_the_download_begins_before_torch_is_imported():
    text = (ROOT / "pytorch" / "app.py").read_text()
    assert text.index("unzip_requirements") < text.index(init.BEGINS) < text.index("import numpy")
    code = "import sys, download; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "pytorch", check=True)


def test_second_requests_are_compared_with_the_warm_ones_of_their_round():
    row = {"cores": 2, "model": "m", "variant": "v", "engine": "e", "first_answer_s": 3.0,
           "load_ms": 1.0, "first_ms": 9.0}  # fmt: skip
    rounds = [row | {"second_ms": s, "warm_ms": w} for s, w in [(10, 10), (30, 20), (60, 30)]]
    (median,) = init.summarise(rounds)
    assert (median["second_ms"], median["warm_ms"], median["second_to_warm"]) == (30, 20, 1.5)
    assert "| 2 | m | v | e | 3.00 |" in init.table({"median": [median]})


def test_a_bundle_is_compared_with_the_bare_file_at_the_same_rate():
    rows = [
        {"rate_mb_s": rate, "way": way, "fetch_s": 1.0, "load_s": total - 1, "total_s": total}
        for rate, factor in [(0, 1.5), (80.0, 1.1)]
        for way, total in [("bundle", 2 * factor), ("bare file", 2.0), ("ready", 5.0)]
    ]
    medians, ratios = bundle.summarise(rows)
    assert ratios == {"0": 1.5, "80": pytest.approx(1.1)}
    assert "| no limit | bundle | 1.00 | 2.00 | 3.00 | 1.50 |" in bundle.table(
        {"median": medians, "ratio": ratios}
    )
