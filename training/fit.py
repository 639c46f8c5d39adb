"""The training loop: from a network and images to its best weights. Called by `training.train`.

From scratch and fine-tuning are one loop with two recipes. After each epoch all of its state goes
to a file, so that a training that was killed goes on there and ends with the same weights.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from local.atomic import replacing
from local.cli import UserError
from preprocessing import Preprocessing, to_rgb
from training.evaluate import logits_of

STEPS = 8  # an epoch at least, so that a hundred images teach something too


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: at most this many times through the images.
        batch_size: images a step, at most; fewer where that made less than `STEPS` an epoch.
        learning_rate: largest, of the last layer; the other layers' is `backbone_rate` times it.
        frozen_epochs: so many epochs at first train the last layer only.
        patience: stop after so many epochs without a better one.
        augment: show each image cut, mirrored and coloured anew each time.
    """

    epochs: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    backbone_rate: float = 1.0
    weight_decay: float = 0.05
    frozen_epochs: int = 0
    patience: int = 5
    augment: bool = False


FROM_SCRATCH = Recipe(epochs=6, batch_size=64)
# A pretrained network needs little: a new last layer first, as its random gradients would spoil
# what the others know, then all layers, at a tenth of the rate.
FINE_TUNING = Recipe(epochs=12, backbone_rate=0.1, frozen_epochs=2, augment=True)
# Photographs from nothing: slower to learn.
FROM_SCRATCH_ON_PHOTOGRAPHS = Recipe(epochs=30, patience=10, augment=True)


@dataclass(frozen=True)
class Augmentation:
    """A random view of an image, prepared as `preprocessing` prepares the whole one."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image) -> np.ndarray:
        size = self.preprocessing.crop
        interpolation = InterpolationMode(self.preprocessing.interpolation)
        view = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(0.35, 1.0), interpolation=interpolation),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            ]
        )
        return replace(self.preprocessing, resize=size)(view(to_rgb(image)))


def fit(
    model: nn.Module,
    train: ImageFolder,
    val: ImageFolder,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    head: frozenset[str] = frozenset(),
    progress: Path | None = None,
    key: str = "",
    on_epoch: Callable[[list[dict]], None] | None = None,
) -> list[dict]:
    """Train `model` in place and leave it with the weights of its best epoch on `val`.

    AdamW with a one-cycle schedule (Smith and Topin, arXiv:1708.07120). The same seed, machine and
    number of threads give the same weights, interrupted or not.

    Args:
        head: names of the last layer's parameters, for a recipe that treats them differently.
        progress: file for the state after each epoch; continued from if it is there and was
            written under the same `key`. The caller deletes it once he has saved the result.
        on_epoch: is handed the history after each epoch.

    Returns:
        One dict an epoch, as in `TrainedModel.history`.
    """
    model.to(device)
    shuffle = torch.Generator().manual_seed(seed)
    size = max(2, min(recipe.batch_size, len(train) // STEPS))
    # A last batch of one image cannot be normalised (batch norm), so an incomplete one is left out.
    loader = DataLoader(
        train,
        size,
        shuffle=True,
        drop_last=True,
        generator=shuffle,
        num_workers=4 if device.type == "cuda" else 0,  # a CPU has no time to spare for it
    )
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in head) == last], "lr": rate}
        for last, rate in (
            (False, recipe.learning_rate * (recipe.backbone_rate if head else 1)),
            (True, recipe.learning_rate),
        )
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=recipe.epochs * len(loader)
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history, best = [], None
    if progress is not None and (state := _read(progress, key, device)):
        history, best = state["history"], state["best"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        _set_random(state["random"], shuffle)
        print(f"going on after epoch {len(history)}, where an earlier run was interrupted")
        if best is None:
            best = copy.deepcopy(model.state_dict())

    with tqdm(
        total=recipe.epochs * len(loader),
        initial=len(history) * len(loader),
        unit="batch",
        desc="training",
    ) as bar:
        for epoch in range(len(history) + 1, recipe.epochs + 1):
            if history and epoch - 1 - best_epoch(history) >= recipe.patience:
                bar.write(f"stopped: no better epoch in the last {recipe.patience}")
                break
            frozen = bool(head) and epoch <= recipe.frozen_epochs
            _set_mode(model, head, frozen)
            loss, accuracy = _train_epoch(model, loader, optimizer, schedule, bar, epoch, recipe)
            logits, labels = logits_of(model, val, device)
            history.append(
                {
                    "epoch": epoch,
                    "train_loss": loss,
                    "train_accuracy": accuracy,
                    "val_loss": nn.functional.cross_entropy(logits, labels).item(),
                    "val_accuracy": (logits.argmax(1) == labels).double().mean().item(),
                }
            )
            improved = best_epoch(history) == epoch
            if improved:
                best = copy.deepcopy(model.state_dict())
            if progress is not None:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= {"best": None if improved else best}  # else it is the model itself
                state |= {"history": history, "random": _random(shuffle), "key": key}
                with replacing(progress) as partial:
                    torch.save(state, partial)
            if on_epoch:
                on_epoch(history)
    model.load_state_dict(best)
    return history


def best_epoch(history: list[dict]) -> int:
    """The epoch of highest accuracy on the validation split, of lowest loss where several tie."""
    return max(history, key=lambda entry: (entry["val_accuracy"], -entry["val_loss"]))["epoch"]


def _train_epoch(model, loader, optimizer, schedule, bar, epoch, recipe) -> tuple[float, float]:
    """Mean loss and accuracy over one epoch's batches, measured as they are learned from."""
    device = next(model.parameters()).device
    total_loss = right = seen = 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        if not loss.isfinite():
            raise UserError(f"the training diverged in epoch {epoch}: its loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seen += len(labels)
        total_loss += loss.item() * len(labels)
        right += (logits.argmax(1) == labels).sum().item()
        bar.update()
        bar.set_postfix(epoch=f"{epoch}/{recipe.epochs}", loss=total_loss / seen, acc=right / seen)
    return total_loss / seen, right / seen


def _set_mode(model: nn.Module, head: frozenset[str], frozen: bool) -> None:
    """Training mode; a frozen backbone keeps its weights and its statistics."""
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or name in head)
    for module in model.modules():
        if frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _read(path: Path, key: str, device: torch.device) -> dict | None:
    """The state in `path`, if it is of the training that `key` stands for."""
    state = None
    # Whatever is wrong with the file, it means that there is nothing to go on from.
    with suppress(Exception):
        state = torch.load(path, map_location=device, weights_only=True)
    return state if isinstance(state, dict) and state.get("key") == key else None


def _random(shuffle: torch.Generator) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state(), "shuffle": shuffle.get_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random(states: dict[str, torch.Tensor], shuffle: torch.Generator) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    shuffle.set_state(states["shuffle"].cpu())
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu())
