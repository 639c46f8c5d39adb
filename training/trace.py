"""Turn a trained model into TorchScript that answers the same. Called by `training.optimize`.

The archive is compared with the eager model here, and then once more in the serving environment:
the packages of the Lambda layer, another release of torch, in an interpreter that has nothing else.
"""

import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import network
from archive import KINDS
from errors import ModelError
from layer.packages import Target, serving_packages
from local.atomic import replacing
from local.cli import UserError
from preprocessing import Preprocessing
from training.model import TrainedModel, library_versions

# Largest accepted difference between two logits, as a share of the largest logit (at least of 1).
TOLERANCE = 1e-4
PROVENANCE = "trace.json"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
PATIENCE = 1200  # seconds for all images in the serving environment


@dataclass(frozen=True)
class Comparison:
    """Two runs of one model over the same images.

    Attributes:
        images: how many images were compared.
        max_difference: largest absolute difference between two logits.
        same_class: for how many images both runs name the same class.
        agrees: all of them, and no difference over `TOLERANCE`.
        versions: of the packages that made the second run.
        engine, milliseconds: what computed the second run, and its median time of an image;
            only from the serving environment.
    """

    images: int
    max_difference: float
    same_class: int
    agrees: bool
    versions: dict
    engine: str | None = None
    milliseconds: float | None = None


def trace(trained: TrainedModel, images: Sequence[Path], output: Path) -> Comparison:
    """Trace and freeze `trained` into `output` and compare both on `images`.

    A model that is TorchScript already is only frozen. An archive that was made from the same
    weights by the same torch is kept as it is. The archive of a fresh process is the same byte for
    byte; a second trace in one process numbers its classes differently.

    `torch.jit.trace` is deprecated in favour of `torch.export`; it works in the pinned release,
    and that the archive runs in the layer's release is what `check_in_serving` proves each time.

    Raises:
        UserError: an image cannot be read, or the two models disagree (nothing is written then).
    """
    inputs = load_images(images, trained.preprocessing)
    expected = run_model(trained.model, inputs)
    provenance = provenance_of(trained, "fp32")
    kept = made_before(output, provenance)
    if not kept:
        traced = freeze(trace_module(trained.model, torch.from_numpy(inputs[:1])))
        data = serialize(traced, {PROVENANCE: provenance})
    else:
        traced, data = load_archive(output), None
    comparison = compare(expected, run_model(traced, inputs), {"torch": str(torch.__version__)})
    if not comparison.agrees:
        raise UserError(f"the traced model differs from the eager one: {comparison}")
    if data is not None:
        with replacing(output) as partial:
            partial.write_bytes(data)
    return comparison


def provenance_of(trained: TrainedModel, variant: str, **more: str) -> str:
    """What decides the content of an archive, as JSON; it is stored inside."""
    values = {"model": trained.fingerprint(), "crop": trained.preprocessing.crop}
    return json.dumps(values | library_versions() | {"variant": variant} | more, sort_keys=True)


def trace_module(model: nn.Module, example: torch.Tensor) -> torch.jit.ScriptModule:
    """Trace any module on the CPU in evaluation mode; `example` is one batch of its input."""
    if isinstance(model, torch.jit.ScriptModule):
        return model.eval()
    # Torch's own check traces again and wants the same graph, which attention layers do not give;
    # `trace` compares answers on real images instead.
    with without_deprecation(), torch.no_grad():
        return torch.jit.trace(model.cpu().eval(), example, check_trace=False)


def freeze(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """Make the weights constants, and fold batch norm into the convolutions before it."""
    with without_deprecation():
        frozen = torch.jit.freeze(script) if hasattr(script, "training") else script
    drop_warnings(frozen.graph)
    return frozen


def drop_warnings(graph: torch.Graph) -> None:
    """Remove what a scripted model says at every call, such as GoogLeNet's of its training: it
    would be in the function's log for each request, and torch.export has no operator for it."""
    for warning in graph.findAllNodes("aten::warn"):
        warning.destroy()


def serialize(module: torch.jit.ScriptModule, extra_files: dict[str, str] | None = None) -> bytes:
    """The bytes of a TorchScript archive without its debug records.

    `torch.jit.save` adds to each source file a record of the Python call stack that traced it:
    names of files on this machine, which would differ in every checkout and be published with the
    model.
    """
    buffer = io.BytesIO()
    # Saved to a buffer, not a path: the archive would otherwise contain the (temporary) file name.
    with without_deprecation():
        torch.jit.save(module, buffer, _extra_files=extra_files or {})
    return rewrite(buffer.getvalue())


def rewrite(archive: bytes, edit: Callable[[str, bytes], bytes] = lambda _, data: data) -> bytes:
    """A copy of an archive of torch without debug records; `edit` changes records by their name."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(archive))
    copy = io.BytesIO()
    # These two classes are what torch.save and torch.package are made of; unlike zipfile, the
    # writer aligns tensors to 64 bytes, which loading relies on.
    writer = torch._C.PyTorchFileWriter(copy)
    for name in reader.get_all_records():
        written_by_itself = name in ("version", "byteorder") or name.startswith(".data/")
        if not written_by_itself and not name.endswith(".debug_pkl"):
            record = edit(name, reader.get_record(name))
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return copy.getvalue()


def check_in_serving(
    model_path: Path,
    preprocessing: Preprocessing,
    images: Sequence[Path],
    packages: Path | None = None,
    expected: np.ndarray | None = None,
) -> Comparison:
    """Run the archive here and in the serving environment, from image files to logits, and compare.

    Args:
        expected: the logits here, if they are known already.
        packages: directory with the serving environment's torch, numpy and Pillow; by default that
            of the layer, which is installed on first use.

    Raises:
        UserError: the archive does not run there, or the answers differ.
    """
    if packages is None:
        packages = serving_packages(Target.create("local"))
    kind = KINDS[model_path.suffix]
    if expected is None:
        here = load_network(model_path, preprocessing.crop)
        expected = run_model(here, load_images(images, preprocessing))
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch, "request.json"), Path(scratch, "answer.npy")
        request.write_text(
            json.dumps(
                {
                    "packages": str(packages),
                    "function": str(Path(network.__file__).resolve().parent),
                    "kind": kind,
                    "preprocessing": preprocessing.to_json(),
                    "model": str(model_path.resolve()),
                    "images": [str(path.resolve()) for path in images],
                    "answer": str(answer),
                }
            )
        )
        script = Path(__file__).with_name("run_in_serving.py")
        # -I -S: no environment variables or site-packages, only the library and `packages`.
        command = [sys._base_executable, "-I", "-S", str(script), str(request)]
        # As on Lambda, where nobody sets how OpenMP's threads wait (training/__init__.py).
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE, env=environment
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{model_path} did not answer {len(images)} images in the serving environment "
                f"within {PATIENCE} s: name fewer"
            ) from None
        if done.returncode != 0:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise UserError(f"{model_path} does not run in the serving environment: {reason}")
        report = json.loads(done.stdout.splitlines()[-1])
        logits = np.load(answer)
    comparison = compare(expected, logits, report.pop("versions"))
    if not comparison.agrees:
        raise UserError(f"the serving environment answers differently: {comparison}")
    return dataclasses.replace(comparison, **report)


def run_model(model: Callable, inputs: np.ndarray, progress: str = "") -> np.ndarray:
    """Logits of (N, classes) for inputs of (N, 3, height, width), computed one image at a time, as
    the Lambda function does; with a bar of that name if `progress` has one."""
    images = tqdm(inputs, desc=progress, unit="image", disable=not progress, leave=False)
    with torch.inference_mode():
        outputs = [model(torch.from_numpy(image[None])) for image in images]
    return torch.cat(outputs).numpy()


def compare(first: np.ndarray, second: np.ndarray, versions: dict) -> Comparison:
    """Compare two arrays of logits, (N, classes) each."""
    if first.shape != second.shape:
        raise UserError(f"the models answer in different shapes: {first.shape}, {second.shape}")
    difference = float(np.abs(first - second).max())
    same = int((first.argmax(1) == second.argmax(1)).sum())
    scale = max(1.0, float(np.abs(first).max()))
    # Written so that NaN does not agree.
    agrees = difference <= TOLERANCE * scale and same == len(first)
    return Comparison(len(first), difference, same, agrees, versions)


def load_archive(path: Path) -> torch.jit.ScriptModule:
    """Load a TorchScript archive on the CPU.

    Raises:
        UserError: the file is missing or is no TorchScript archive.
    """
    if not path.is_file():
        raise UserError(f"there is no model {path}; make one first (training.optimize)")
    try:
        with without_deprecation():
            return torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as error:
        raise UserError(f"{path} is damaged or not a TorchScript archive") from error


def load_network(path: Path, size: int, kind: str | None = None) -> network.Network:
    """Load a model file as the Lambda function does; its kind is told by its name or `kind`.

    Raises:
        UserError: the file is missing or no model, or the model fails on an image.
    """
    if kind is None and path.suffix not in KINDS:
        raise UserError(f"the model {path.name} must be named *.pt, *.pth or *.pt2")
    if not path.is_file():
        raise UserError(f"there is no model {path}; make one first (training.optimize)")
    try:
        with path.open("rb") as file:
            return network.load(file, kind or KINDS[path.suffix], size)
    except ModelError as error:
        raise UserError(f"{path}: {error}") from error


def find_images(folder: Path, limit: int = 16) -> list[Path]:
    """At most `limit` image files from `folder` and below, evenly spread over their sorted names.

    Raises:
        UserError: there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"there are no images in {folder}")
    spread = [found[(2 * i + 1) * len(found) // (2 * limit)] for i in range(limit)]
    return spread if len(found) > limit else found


def load_images(paths: Sequence[Path], preprocessing: Preprocessing) -> np.ndarray:
    """Read and preprocess image files into float32 of (N, 3, crop, crop)."""
    if not paths:
        raise UserError("no image was given to compare the models with")
    inputs = []
    for path in paths:
        try:
            with Image.open(path) as image:
                inputs.append(preprocessing(image))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} cannot be read as an image") from error
    return np.stack(inputs)


def made_before(path: Path, provenance: str) -> bool:
    """Whether the archive at `path` is intact and was made of the same."""
    try:
        with zipfile.ZipFile(path) as archive:
            (record,) = (name for name in archive.namelist() if name.endswith(f"/{PROVENANCE}"))
            return archive.read(record).decode() == provenance and archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile):
        return False  # missing, damaged or something else: made anew


@contextmanager
def without_deprecation() -> Iterator[None]:
    """TorchScript's functions each say that they are deprecated, some once a submodule; `trace`
    says once what that means here. Every other warning stays."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        yield
