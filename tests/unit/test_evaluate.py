"""Figures on predictions, against values worked out by hand or by other means."""

import numpy as np
import pytest

from preprocessing import IMAGENET
from training import model_card
from training.evaluate import (
    Predictions,
    calibration_error,
    cross_entropy,
    fit_temperature,
    per_class,
    reliability,
    wilson,
)
from training.model import TrainedModel, build


def sampled(scale: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from softmax(logits), and the logits times `scale`."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (count, 4))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (shares.cumsum(1) < rng.random((count, 1))).sum(1)
    return logits * scale, labels


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_the_scale(scale):
    logits, labels = sampled(scale)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(scale, rel=0.05)
    assert cross_entropy(logits, labels, temperature) <= cross_entropy(logits, labels)


def test_the_temperature_of_a_model_that_is_always_right_is_one():
    assert fit_temperature(np.eye(4), np.arange(4)) == 1.0


def test_calibration_error_falls_with_the_temperature_and_answers_stay():
    logits, labels = sampled(3.0)
    plain = Predictions(list("abcd"), [], labels, logits)
    cooled = Predictions(list("abcd"), [], labels, logits, fit_temperature(logits, labels))
    assert calibration_error(plain.confidence, plain.right) > 0.1
    assert calibration_error(cooled.confidence, cooled.right) < 0.02
    assert (plain.predicted == cooled.predicted).all()
    assert plain.accuracy == cooled.accuracy and cooled.loss < plain.loss


def test_calibration_error_by_hand():
    confidence = np.array([0.9, 0.9, 0.6, 0.6, 1.0])
    right = np.array([True, False, True, True, True])
    assert calibration_error(confidence, right) == pytest.approx(0.4 * 0.4 + 0.4 * 0.4 + 0)
    assert sum(count for _, _, count in reliability(confidence, right)) == 5


def test_wilson_is_the_published_interval():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_per_class_counts():
    logits = np.eye(3)[[0, 0, 1, 1]]
    rows = per_class(Predictions(["a", "b", "c"], [], np.array([0, 1, 1, 1]), logits))
    assert [row["class"] for row in rows] == ["a", "b"]
    assert [row["images"] for row in rows] == [1, 3]
    assert rows[0]["precision"] == 0.5 and rows[0]["recall"] == 1.0
    assert rows[1]["recall"] == pytest.approx(2 / 3)
    assert rows[1]["recall_low"] < 2 / 3 < rows[1]["recall_high"]


def test_a_card_without_measurements_says_so():
    card = model_card.write(
        TrainedModel("squeezenet1_1", {}, ["a|b", "c"], IMAGENET, build("squeezenet1_1", 2))
    )
    assert "Not measured here" in card and "224 x 224" in card
