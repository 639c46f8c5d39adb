"""What the benchmarks make of their rounds, and that README tells what was measured."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from benchmarks import cold_start, results
from local.cli import UserError

README = Path(results.__file__).parents[1] / "README.md"
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


def test_readme_shows_the_stored_run():
    stored = json.loads((results.STORED / "cold-start.json").read_text())
    assert cold_start.table(stored) in README.read_text(encoding="utf-8")
