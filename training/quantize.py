"""Turn a trained model into one that computes with 8-bit integers: post-training quantisation.

Weights become int8, a scale for each channel; activations become 7-bit unsigned integers, whose
scales come from running the model over calibration images. Seven bits, because processors without
VNNI add pairs of products in 16 bits, where eight could overflow.
"""

import copy
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.backend_config import get_onednn_backend_config
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from tqdm import tqdm

from local.atomic import replacing
from local.cli import UserError
from training.convert import to_module
from training.model import TrainedModel
from training.trace import (
    PROVENANCE,
    freeze,
    load_images,
    made_before,
    provenance_of,
    serialize,
    trace_module,
)

ENGINE = "onednn"


def quantize(trained: TrainedModel, calibration: Sequence[Path], output: Path) -> Path:
    """Quantise `trained` into the TorchScript archive `output`, unless it holds just that already.

    Raises:
        UserError: the model cannot be quantised, or an image cannot be read.
    """
    digest = hashlib.sha256()
    for path in calibration:
        digest.update(path.read_bytes())
    provenance = provenance_of(trained, "int8", calibration=digest.hexdigest())
    if made_before(output, provenance):
        return output
    inputs = load_images(calibration, trained.preprocessing)
    quantized = quantize_module(trained.model, inputs)
    with replacing(output) as partial:
        partial.write_bytes(serialize(quantized, {PROVENANCE: provenance}))
    return output


def quantize_module(model: torch.nn.Module, inputs: np.ndarray) -> torch.jit.ScriptModule:
    """An int8 copy of `model`, calibrated on `inputs` of (N, 3, height, width), and traced.

    Convolutions are fused with the additions and ReLUs after them (oneDNN's engine only).

    Raises:
        UserError: the model is TorchScript that cannot be converted, or its forward pass depends on
            the data.
    """
    if ENGINE not in torch.backends.quantized.supported_engines:
        raise UserError("int8 needs a torch with oneDNN's quantised operators")
    example = torch.from_numpy(inputs[:1])
    if isinstance(model, torch.jit.ScriptModule):
        model = to_module(model, example)
    settings = get_default_qconfig_mapping("x86")  # 7 bits; oneDNN's own preset takes 8
    fusions = get_onednn_backend_config()
    with warnings.catch_warnings(), _engine(), torch.no_grad():
        # Deprecated in favour of torchao, whose graphs only a compiler can run.
        warnings.simplefilter("ignore")
        try:
            prepared = prepare_fx(
                copy.deepcopy(model).cpu().eval(), settings, (example,), backend_config=fusions
            )
        except Exception as error:  # symbolic tracing runs the model's own code
            raise UserError(
                f"this model cannot be quantised: {type(error).__name__}: {error}"
            ) from error
        for image in tqdm(inputs, desc="calibrating", unit="image"):
            prepared(torch.from_numpy(image[None]))
        return freeze(trace_module(convert_fx(prepared, backend_config=fusions), example))


@contextmanager
def _engine() -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
