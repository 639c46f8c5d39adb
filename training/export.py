"""Turn a trained model into an archive of torch.export, the successor of TorchScript."""

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from local.atomic import replacing
from local.cli import UserError
from training.convert import to_module
from training.model import TrainedModel
from training.trace import (
    PROVENANCE,
    Comparison,
    compare,
    load_images,
    load_network,
    made_before,
    provenance_of,
    rewrite,
    run_model,
)


def export(trained: TrainedModel, images: Sequence[Path], output: Path) -> Comparison:
    """Export `trained` into `output` and compare both on `images`, as `trace` does.

    Raises:
        UserError: the model cannot be exported, an image cannot be read, or the two models
            disagree (nothing is written then).
    """
    inputs = load_images(images, trained.preprocessing)
    expected = run_model(trained.model, inputs)
    provenance = provenance_of(trained, "export")
    versions = {"torch": str(torch.__version__)}
    if made_before(output, provenance):
        return _agreeing(expected, output, inputs, versions)
    with replacing(output) as partial:
        partial.write_bytes(export_module(trained.model, inputs[:1], {PROVENANCE: provenance}))
        return _agreeing(expected, partial, inputs, versions)


def export_module(
    model: torch.nn.Module, example: np.ndarray, extra_files: dict[str, str] | None = None
) -> bytes:
    """The bytes of a torch.export archive, without the files and lines that the model came from.

    Raises:
        UserError: the model is TorchScript that cannot be converted, or does what torch.export
            cannot record.
    """
    image = torch.from_numpy(example.copy())
    if isinstance(model, torch.jit.ScriptModule):
        model = to_module(model, image)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", DeprecationWarning)
            program = torch.export.export(model.eval(), (image,))
            buffer = io.BytesIO()
            torch.export.save(program, buffer, extra_files=extra_files or {})
    except Exception as error:  # the exporter has an exception for everything it cannot do
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"torch.export cannot record this model: {reason[0]}") from error
    return rewrite(buffer.getvalue(), _without_origin)


def _without_origin(name: str, record: bytes) -> bytes:
    """Drop stack traces, names of files on this machine, from the graph."""
    if not name.endswith("models/model.json"):
        return record
    document = json.loads(record)
    for node in document["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}
    return json.dumps(document, separators=(",", ":")).encode()


def _agreeing(expected: np.ndarray, path: Path, inputs: np.ndarray, versions: dict) -> Comparison:
    network = load_network(path, inputs.shape[-1], "export")
    comparison = compare(expected, run_model(network, inputs), versions)
    if not comparison.agrees:
        raise UserError(f"the exported model differs from the eager one: {comparison}")
    return comparison
