"""Somebody's module, made to answer as the function expects it, and recorded as TorchScript.

Called by `training.sources`, for TorchScript files and for modules in Python.
"""

import io
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from local.cli import UserError
from network import last_line
from preprocessing import Preprocessing
from training.model import load_torchscript


def adapt(
    model: nn.Module, classes: list[str], preprocessing: Preprocessing, name: object
) -> nn.Module:
    """The module, or one around it that gives float32 logits. Running it on an image shows what it
    takes and gives. Raises UserError if it takes no such image or gives something else."""
    size, count, served = preprocessing.crop, len(classes), model
    if {tensor.dtype for tensor in model.parameters()} & {torch.float16, torch.bfloat16}:
        print(f"{name} has weights of half precision; they are served as float32")
        served = nn.Sequential(model.float())
    try:
        with torch.inference_mode():
            outputs = served(_noise(1, size))
            if isinstance(outputs, Mapping | tuple | list):
                print(f"{name} answers with more than logits; those alone are served")
                served = (_Named if isinstance(outputs, Mapping) else _First)(served)
                outputs = served(_noise(1, size))
    except Exception as error:  # of code that is not ours
        raise UserError(
            f"{name} fails on images of 3 x {size} x {size}: {last_line(error)}"
        ) from error
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or len(outputs) != 1:
        raise UserError(f"{name} does not answer with one row of numbers for an image")
    if outputs.shape[1] != count:
        raise UserError(f"{name} has {outputs.shape[1]} outputs, but there are {count} classes")
    if outputs.dtype != torch.float32 or not outputs.isfinite().all():
        raise UserError(f"{name} does not answer with finite float32 numbers")
    if _answers_probabilities(served, size):
        print(f"{name} answers with probabilities; their logarithms are served instead")
        served = _LogProbabilities(served)
    return served


def record(model: nn.Module, size: int) -> tuple[torch.jit.ScriptModule, bytes]:
    """The module as TorchScript and its file's bytes; proven equal on another batch."""
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
            if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
                recorded = torch.jit.script(model.eval())  # what it holds cannot all be traced
            else:
                recorded = torch.jit.trace(model.eval(), _noise(1, size), check_trace=False)
            torch.jit.save(recorded, buffer)
    except Exception as error:  # whatever tracing meets in code that is not ours
        raise UserError(f"the model cannot be traced: {last_line(error)}") from error
    archive = buffer.getvalue()
    loaded = load_torchscript(archive)
    other = _noise(2, size)[1:]
    with torch.inference_mode():
        for batch in (other, other + 1, other - 1):
            if not torch.allclose(model(batch), loaded(batch), rtol=1e-3, atol=1e-4):
                raise UserError(
                    "the traced model answers differently from the original: it depends on the "
                    "image in a way that a trace does not record (an `if` on the values, perhaps); "
                    "save it by torch.jit.script and take it as TorchScript"
                )
    return loaded, archive


def _answers_probabilities(model: nn.Module, size: int) -> bool:
    with torch.inference_mode():
        outputs = torch.cat([model(image[None]) for image in _noise(4, size)])
    sums = torch.ones(len(outputs))
    return bool((outputs >= 0).all()) and torch.allclose(outputs.sum(1), sums, atol=1e-4)


def _noise(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


class _First(nn.Module):
    """The logits alone of a model that answers with a tuple: torchvision's auxiliary outputs come
    after them, and Hugging Face's other ones."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)[0]


class _Named(nn.Module):
    """The logits alone of a model that answers with a dict."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)["logits"]


class _LogProbabilities(nn.Module):
    """softmax(log p) is p."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch).clamp_min(1e-30).log()
