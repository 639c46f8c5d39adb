"""What a model answers to images whose class is known, and how far its confidence can be trusted.

`training.train` calls `assess`; the pictures of it are in `training.plots`, the record of it in
`training.model_card`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from local.cli import UserError
from training.data import read_images
from training.model import TrainedModel

BINS = 15  # of confidence, as in Guo et al.
HOTTEST = 20.0  # the fitted temperature lies between 1/20 and 20


@dataclass(frozen=True)
class Predictions:
    """What a model says about every image of a folder; arrays of length N in the folder's order.

    Attributes:
        paths: the image files.
        labels: indices into `classes`.
        logits: of (N, len(classes)), before the temperature.
        temperature: probabilities are softmax(logits / temperature).
    """

    classes: list[str]
    paths: list[Path]
    labels: np.ndarray
    logits: np.ndarray
    temperature: float = 1.0

    @property
    def predicted(self) -> np.ndarray:
        """Index of the most probable class."""
        return self.logits.argmax(1)

    @property
    def confidence(self) -> np.ndarray:
        """Probability of the predicted class, in 0..1."""
        return np.exp(log_softmax(self.logits / self.temperature, axis=1).max(1))

    @property
    def right(self) -> np.ndarray:
        return self.labels == self.predicted

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return cross_entropy(self.logits, self.labels, self.temperature)


def predict(trained: TrainedModel, folder: Path) -> Predictions:
    """Classify every image of `folder`, which has one sub-folder a class.

    Raises:
        UserError: a class is not one of the model's, or an image cannot be read.
    """
    images = read_images(folder, trained.preprocessing)
    if unknown := [name for name in images.classes if name not in trained.classes]:
        raise UserError(f"{folder} has a class {unknown[0]!r}, which the model does not know")
    logits, labels = logits_of(trained.model, images, torch.device("cpu"))
    index = np.array([trained.classes.index(name) for name in images.classes])
    return Predictions(
        classes=trained.classes,
        paths=[Path(path) for path, _ in images.samples],
        labels=index[labels.numpy()],
        logits=logits.double().numpy(),
        temperature=trained.temperature,
    )


def assess(trained: TrainedModel, folder: Path) -> Predictions:
    """Fit the temperature on `folder`/val, measure on `folder`/test, and record both.

    Sets `trained.temperature` and in `trained.metrics`: `test_images`, `test_accuracy` with the
    bounds `test_accuracy_low` and `test_accuracy_high`, `test_loss`, `calibration_error` and, at
    temperature 1, `calibration_error_before`, and `per_class`, one dict for each class that has
    images: `class`, `images`, `precision`, `recall`, `recall_low`, `recall_high`, `f1`.
    """
    val = predict(trained, folder / "val")
    trained.temperature = fit_temperature(val.logits, val.labels)
    test = predict(trained, folder / "test")
    low, high = wilson(int(test.right.sum()), len(test.labels))
    plain = Predictions(test.classes, test.paths, test.labels, test.logits)
    trained.metrics |= {
        "test_images": len(test.labels),
        "test_accuracy": test.accuracy,
        "test_accuracy_low": low,
        "test_accuracy_high": high,
        "test_loss": test.loss,
        "calibration_error_before": calibration_error(plain.confidence, plain.right),
        "calibration_error": calibration_error(test.confidence, test.right),
        "per_class": per_class(test),
    }
    return test


@torch.inference_mode()
def logits_of(
    model: nn.Module, images: ImageFolder, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of (N, classes) and labels of (N,), in the folder's order, on the CPU."""
    model.eval()
    # Somebody's trace may have been made for one image at a time.
    size = 1 if isinstance(model, torch.jit.ScriptModule) else 64
    logits = [model(batch.to(device)).cpu() for batch, _ in DataLoader(images, size)]
    return torch.cat(logits), torch.tensor(images.targets)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature at which softmax(logits / temperature) has the least cross-entropy.

    Temperature scaling (Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599): it
    changes no answer, only the confidence. Where every answer is right, the cross-entropy falls
    without end as the temperature falls; the temperature stays 1 then.

    Args:
        logits: of (N, classes).
        labels: of (N,).
    """
    if (logits.argmax(1) == labels).all():
        return 1.0
    # In the logarithm, doubling and halving are the same step.
    bounds = (-np.log(HOTTEST), np.log(HOTTEST))
    found = minimize_scalar(
        lambda t: cross_entropy(logits, labels, float(np.exp(t))), bounds=bounds, method="bounded"
    )
    return float(np.exp(found.x))


def cross_entropy(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Mean over N, in nats; logits of (N, classes), labels of (N,)."""
    log_probabilities = log_softmax(logits / temperature, axis=1)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of the images in each of BINS equal bins of confidence;
    empty bins are left out."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        (float(confidence[bins == i].mean()), float(right[bins == i].mean()), int(count))
        for i, count in enumerate(np.bincount(bins, minlength=BINS))
        if count
    ]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over the bins,
    weighted by their images (Guo et al., eq. 3)."""
    return sum(
        count / len(right) * abs(mean - share)
        for mean, share, count in reliability(confidence, right)
    )


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def per_class(predictions: Predictions) -> list[dict]:
    present = np.unique(predictions.labels)
    precision, recall, f1, images = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=present, zero_division=0
    )
    rows = []
    for i, index in enumerate(present):
        low, high = wilson(round(float(recall[i] * images[i])), int(images[i]))
        rows.append(
            {
                "class": predictions.classes[index],
                "images": int(images[i]),
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "recall_low": low,
                "recall_high": high,
                "f1": float(f1[i]),
            }
        )
    return rows
