"""Models that were trained elsewhere, each as a `TrainedModel`. Called by `training.train`.

torchvision's pretrained weights, this project's own checkpoint, a plain state_dict, a TorchScript
file, or a function that returns any nn.Module.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import socket
import sys
import traceback
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from torch import nn

from local.cli import UserError
from local.paths import ROOT
from network import last_line
from preprocessing import IMAGENET, Preprocessing
from training.adapt import adapt, record
from training.data import NETWORK_TIMEOUT, slug
from training.model import (
    WITHOUT_AUXILIARY,
    TrainedModel,
    build,
    check_architecture,
    check_classes,
    load_torchscript,
    read_classes,
)

WEIGHT_FILES = {".pt", ".pth", ".bin", ".ckpt", ".tar"}


def pretrained(architecture: str = "resnet18", weights: str = "DEFAULT") -> TrainedModel:
    """torchvision's ImageNet weights, from the cache below TORCH_HOME or the network, with the
    classes and the preprocessing that belong to them.

    Args:
        weights: the name of one of torchvision's, such as `IMAGENET1K_V2`, or `DEFAULT`, its best.

    Raises:
        UserError: there are no such weights, they cannot be fetched, or the cached file is damaged.
    """
    check_architecture(architecture)
    known = torchvision.models.get_model_weights(architecture)
    name = weights.split(".")[-1]  # `ResNet50_Weights.IMAGENET1K_V2` is the same
    if name not in known.__members__:
        raise UserError(
            f"torchvision has no weights {weights!r} for {architecture}; "
            f"it has {', '.join(known.__members__)}"
        )
    chosen = known[name]
    options = dict(WITHOUT_AUXILIARY.get(architecture, {}))
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(chosen.url).name)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)  # torchvision's loader would wait without end
    try:
        model = torchvision.models.get_model(architecture, weights=chosen, **options)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"the weights {chosen.url} could not be fetched ({getattr(error, 'reason', error)}); "
            f"connect to the network, or put that file at {cached}, where it is looked for first"
        ) from error
    except Exception as error:  # a damaged file fails in many ways, all of which mean this
        raise UserError(
            f"the weights in {cached} do not fit {architecture}; remove the file to fetch it again"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    if architecture in WITHOUT_AUXILIARY:
        options["transform_input"] = True  # what the builder sets for these weights
    return TrainedModel(
        architecture=architecture,
        options=options,
        classes=list(chosen.meta["categories"]),
        preprocessing=_preprocessing_of(chosen.transforms()),
        model=model.eval(),
        configuration={"source": "pretrained", "weights": str(chosen)},
    )


def fine_tunable(
    architecture: str, classes: list[str], weights: str
) -> tuple[nn.Module, dict, Preprocessing | None]:
    """A network with an untrained last layer for `classes`, everything else from `weights`.

    Args:
        weights: the name of one of torchvision's, a file with a state_dict of this architecture for
            whatever classes, or `random`.

    Returns:
        The network, the options that it was built with, and the preprocessing of torchvision's
        weights (None for others).
    """
    options, preprocessing, state = dict(WITHOUT_AUXILIARY.get(architecture, {})), None, {}
    if weights != "random" and (os.sep in weights or Path(weights).suffix in WEIGHT_FILES):
        state = read_state_dict(Path(weights))
    elif weights != "random":
        taken = pretrained(architecture, weights)
        options, preprocessing, state = taken.options, taken.preprocessing, taken.model.state_dict()
    model = build(architecture, len(classes), options)
    if state:
        own, last = model.state_dict(), head_of(architecture, len(classes))
        fitting = {
            name: tensor
            for name, tensor in state.items()
            if name in own and name not in last and tensor.shape == own[name].shape
        }
        missing = own.keys() - fitting.keys() - last
        if missing := {name for name in missing if not name.endswith("num_batches_tracked")}:
            raise UserError(
                f"the weights in {weights} do not fit {architecture}: {min(missing)} is missing "
                "or of another shape"
            )
        model.load_state_dict(fitting, strict=False)
    return model, options, preprocessing


def head_of(architecture: str, classes: int) -> frozenset[str]:
    """Names of the parameters whose shape depends on the number of classes: the last layer's."""
    options = WITHOUT_AUXILIARY.get(architecture, {})
    with torch.device("meta"):  # shapes without memory
        one, other = (build(architecture, count, options) for count in (classes, classes + 1))
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    return frozenset(n for n, p in one.named_parameters() if p.shape != shapes[n])


def from_checkpoint(path: Path, architecture: str, classes: Path | None) -> TrainedModel:
    """This project's own checkpoint, or a state_dict of torchvision's `architecture` saved by
    torch.save, bare or under `state_dict`, for which `classes` has to be given.

    Raises:
        UserError: the file is missing, damaged, or does not fit.
    """
    if classes is None:
        return TrainedModel.load(path)
    names, state = read_class_names(classes), read_state_dict(path)
    options = dict(WITHOUT_AUXILIARY.get(architecture, {}))
    model = build(architecture, len(names), options)
    _load(model, state, path, f"{architecture} with {len(names)} classes")
    return TrainedModel(
        architecture, options, names, IMAGENET, model.eval(), configuration={"source": "checkpoint"}
    )


def from_torchscript(path: Path, classes: Path, preprocessing: Preprocessing) -> TrainedModel:
    """A TorchScript file, whatever made it.

    It has to map float32 of (N, 3, crop, crop) to (N, classes), or to a tuple or dict with that. If
    the answers are probabilities already, their logarithm is taken, as whoever serves the model
    computes a softmax.

    Raises:
        UserError: the file is missing or no TorchScript file, or does not take or give that.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    archive, names = path.read_bytes(), read_class_names(classes)
    try:
        model = load_torchscript(archive)
    except RuntimeError as error:
        raise UserError(f"{path} is damaged or not a TorchScript file") from error
    served = adapt(model, names, preprocessing, path)
    if served is not model:
        model, archive = record(served, preprocessing.crop)
    return TrainedModel(
        architecture=slug(path.stem),
        options={},
        classes=names,
        preprocessing=preprocessing,
        model=model,
        configuration={"source": "torchscript"},
        archive=archive,
    )


def from_module(
    reference: str, weights: Path | None, classes: Path, preprocessing: Preprocessing
) -> TrainedModel:
    """Any nn.Module: what the function `path/to/file.py:function` or `package.module:function`
    returns when called without arguments; with the state_dict in `weights` if given.

    It is traced here and now. The checkpoint then holds TorchScript, and loading it runs nobody's
    Python: a checkpoint that named a function would execute whatever lies under that name later.

    Raises:
        UserError: the function is missing or fails, gives no module, or the module cannot be
            traced, does not fit the weights, or does not take and give what `from_torchscript`
            says.
    """
    names = read_class_names(classes)
    model = _call(reference)
    if not isinstance(model, nn.Module):
        raise UserError(f"{reference} returned {type(model).__name__}, not a torch.nn.Module")
    if weights is not None:
        _load(model, read_state_dict(weights), weights, reference)
    served = adapt(model.eval().cpu(), names, preprocessing, reference)
    recorded, archive = record(served, preprocessing.crop)
    return TrainedModel(
        architecture=slug(type(model).__name__),
        options={},
        classes=names,
        preprocessing=preprocessing,
        model=recorded,
        configuration={"source": "module"},
        archive=archive,
    )


def read_class_names(path: Path) -> list[str]:
    """Class names from a file: one a line, or JSON, as a list or as {"0": "tench", …}; Keras' form
    {"0": ["n01440764", "tench"], …} and ImageFolder's {"tench": 0, …} too. In ImageNet's usual
    lists two names come twice: the second gets its number.

    Raises:
        UserError: the file cannot be read, or what is in it are no names.
    """
    if path.suffix.lower() == ".json":
        names = _json_names(path)
    else:
        names = [name.strip() for name in read_classes(path)]
        while names and not names[-1]:
            names.pop()
    seen: set[str] = set()
    for number, name in enumerate(names):
        if name in seen:
            names[number] = f"{name} ({number})"
            print(f"{path.name}: {name!r} is there twice; output {number} is {names[number]!r}")
        seen.add(names[number])
    check_classes(names)
    return names


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file of torch.save: a state_dict, or a dict with one under a usual name.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        if "weights_only" in str(error):
            raise UserError(
                f"{path} holds Python objects, which would execute code when loaded; save "
                "model.state_dict(), or the whole as TorchScript"
            ) from error
        raise UserError(f"{path} is damaged or not a file of torch.save") from error
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(record, dict) and isinstance(record.get(name), dict):
            record = record[name]
            break
    tensors = isinstance(record, dict) and record and all(map(torch.is_tensor, record.values()))
    if not tensors:
        raise UserError(f"{path} does not hold a state_dict (names and tensors)")
    # What DataParallel and Lightning put in front of every name.
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in record):
            record = {name.removeprefix(prefix): tensor for name, tensor in record.items()}
    return record


def read_preprocessing(value: str | dict | None) -> Preprocessing | None:
    """From `imagenet`, a dict, JSON, or the name of a JSON file; None for None.

    Raises:
        UserError: it is none of these.
    """
    if value is None or isinstance(value, Preprocessing):
        return value
    if value == "imagenet":
        return IMAGENET
    try:
        if isinstance(value, dict):
            text = json.dumps(value)
        else:
            text = value if value.lstrip().startswith("{") else Path(value).read_text("utf-8")
        return Preprocessing.from_json(text)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"the preprocessing cannot be read from {value!r}: {error}") from error


def _load(model: nn.Module, state: dict, path: Path, what: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(f"the weights in {path} do not fit {what}: {reason[0].strip()}") from error


def _call(reference: str) -> object:
    """What the function behind `file.py:function` or `package.module:function` returns."""
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise UserError(
            f"{reference!r} must look like path/to/file.py:function or package.module:function"
        )
    try:
        with _importable(Path(place).parent if place.endswith(".py") else ROOT):
            if place.endswith(".py"):
                module = _import_file(Path(place))
            else:
                module = importlib.import_module(place)
            function = getattr(module, name, None)
            if not callable(function):
                raise UserError(f"{place} has no function {name}")
            return function()
    except UserError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{reference} fails at {Path(where.filename).name}:{where.lineno}: "
            f"{type(error).__name__}: {last_line(error)}"
        ) from error


def _import_file(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"own_{slug(path.stem)}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """As for `python folder/file.py`: what lies beside the file can be imported."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def _json_names(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(names, dict):
            if all(isinstance(index, int) for index in names.values()):  # ImageFolder's
                names = {str(index): name for name, index in names.items()}
            names = [names[str(i)] for i in range(len(names))]
        names = [name[-1] if isinstance(name, list) else name for name in names]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"the classes cannot be read from {path}: {error}") from error
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"the classes in {path} must be names")
    return [name.strip() for name in names]


def _preprocessing_of(transforms: nn.Module) -> Preprocessing:
    """The settings of torchvision's ImageClassification preset."""
    return Preprocessing(
        resize=transforms.resize_size[0],
        crop=transforms.crop_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )
