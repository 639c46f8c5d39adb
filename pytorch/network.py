"""A model's file, loaded, fused where the processor can, and warm. Called by model.py.

Fusion merges a convolution with what follows it, so that the activations pass through memory once.
It is compiled for one shape in the first calls, which is why these happen here, on an image of
noise, and not in a request. They also prove that the fused network answers what the plain one
does; if it does not, or the processor cannot, the plain one stays.
"""

import platform
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import torch

import exported
from errors import ModelError

# Largest accepted difference between fused and plain logits, as a share of the largest (at least
# of 1). float32 differs by about 1e-6; a wrong result differs by far more.
TOLERANCE = 1e-3
FUSES = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
# TorchScript cannot run Python, but it has operators that open files, and classes that open
# sockets; of the latter quantised layers need their own.
FORBIDDEN = re.compile(rb"\b(?:from_file|save|rpc_\w+)\s*\(|torch\.classes\.(?!quantized[.\n])")
MAX_CODE_BYTES = 50_000_000


@dataclass
class Network:
    """A warm network: maps float32 of (1, 3, size, size) to logits.

    Attributes:
        engine: what computes it, for the log.
        outputs: shape of the logits for one image.
    """

    run: Callable[[torch.Tensor], torch.Tensor]
    engine: str
    outputs: tuple[int, ...]

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        # A copy, for its strides: numpy gives an axis of length 1 the stride 0, which PyTorch takes
        # for contiguous, and oneDNN's fusion then computes something else without an error.
        return self.run(image.clone(memory_format=torch.contiguous_format))


@torch.inference_mode()
def load(file: BinaryIO, kind: str, size: int, fuse: bool = FUSES) -> Network:
    """Load a "torchscript" or "export" model for images of `size` x `size` pixels.

    Raises:
        ModelError: model_archive_invalid if the file cannot be loaded or asks for what a
            classifier does not need, model_failed if the model fails on an image.
    """
    if "onednn" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "onednn"  # before int8 weights are unpacked
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    open_network = {"torchscript": _open_script, "export": _open_export}[kind]
    plain, fused = open_network(file, fuse)
    logits = _first(plain, image)
    engine = "plain" if "quantized::" not in str(getattr(plain, "inlined_graph", "")) else "int8"
    if fused is not None:
        try:
            fused(image)  # compiles
            if _agree(fused(image), logits):
                plain, engine = fused, "oneDNN fusion"
            else:
                plain, _ = open_network(file, False)
        except RuntimeError:
            plain, _ = open_network(file, False)
    plain(image)  # the second call may still compile
    return Network(plain, engine, tuple(logits.shape))


def _first(run: Callable, image: torch.Tensor) -> torch.Tensor:
    try:
        logits = run(image)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            "model_failed",
            f"the model fails on an image of {image.shape[2]} x {image.shape[3]}: "
            f"{last_line(error)}",
        ) from error
    if not isinstance(logits, torch.Tensor):
        raise ModelError("model_failed", "the model's answer is not one tensor.")
    return logits


def _agree(first: torch.Tensor, second: torch.Tensor) -> bool:
    scale = max(1.0, float(second.abs().max()))
    return bool((first - second).abs().max() <= TOLERANCE * scale)  # False for NaN too


def _open_script(file: BinaryIO, fuse: bool) -> tuple[Callable, Callable | None]:
    """A TorchScript module; with fusion the same module, of which the first call is not fused."""
    _refuse_dangerous(file)
    try:
        with warnings.catch_warnings():  # that TorchScript is deprecated is known
            warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)
            # By name, not as a file object, of which torch would make a copy.
            script = torch.jit.load(f"/proc/self/fd/{file.fileno()}", map_location="cpu")
            # Only one that is not frozen yet has `training`; eval() would give it to any.
            if hasattr(script, "training"):
                script = torch.jit.freeze(script.eval())
    except Exception as error:  # torch reports a damaged file in many ways
        raise ModelError("model_archive_invalid", last_line(error)) from error
    # A quantised network is fused already.
    fuse = fuse and "quantized::" not in str(script.inlined_graph)
    torch.jit.enable_onednn_fusion(fuse)
    return script, script if fuse else None


def _open_export(file: BinaryIO, fuse: bool) -> tuple[Callable, Callable | None]:
    try:
        program = exported.load(file)
    except Exception as error:  # of a damaged file anything may be wrong
        raise ModelError(
            "model_archive_invalid", f"not a usable torch.export archive: {last_line(error)}"
        ) from error
    return program, exported.fuse(program) if fuse else None


def _refuse_dangerous(file: BinaryIO) -> None:
    """Look through the code of a TorchScript archive before torch runs any of it."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith((".py", ".pkl"))]
            if sum(member.file_size for member in members) > MAX_CODE_BYTES:
                raise ModelError("model_archive_invalid", "the model's code is too large.")
            for member in members:
                if found := FORBIDDEN.search(archive.read(member)):
                    raise ModelError(
                        "model_archive_invalid",
                        f"the model's code contains {found[0].decode()!r}, "
                        "which no classifier of images needs.",
                    )
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(
            "model_archive_invalid", f"the model's file is not a TorchScript archive: {error}"
        ) from error


def last_line(error: Exception) -> str:
    """torch's messages bring a C++ backtrace; what went wrong is in the last line."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
