"""Runs the archive of torch.export without trusting it. Called by network.py.

`torch.export.load` is no loader for files of strangers: it unpickles, evaluates the text of shapes
and guards, and loads compiled libraries. It also imports a compiler, seconds of a cold start
(docs/serving.md). An archive of a classifier holds a graph of operators as JSON and the weights as
plain bytes. This module reads these two and nothing else, and runs the graph operator by operator.

The format is that of torch/_export/serde/schema.py and torch/export/pt2_archive/constants.py,
version 8.
"""

import collections
import dataclasses
import functools
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import torch

SCHEMA_VERSION = 8
MAX_GRAPH_BYTES = 50_000_000
MAX_WEIGHT_BYTES = 1_000_000_000
# What torchvision's classifiers consist of, and close relatives. None of them reads a file or
# memory that is not its arguments'.
OPERATORS = frozenset(
    """
    abs adaptive_avg_pool2d adaptive_max_pool2d add alias amax avg_pool2d batch_norm cat chunk
    clamp clamp_max clamp_min clone contiguous conv1d conv2d detach div dropout einsum elu eq exp
    expand expand_as feature_dropout fill flatten gelu glu group_norm hardsigmoid hardswish
    hardtanh index instance_norm layer_norm leaky_relu lift_fresh_copy linalg_vector_norm linear
    log_softmax masked_fill matmul max_pool2d mean mish mul narrow ne neg new_ones new_zeros
    ones_like pad permute pow prelu relu relu6 repeat reshape rms_norm roll rsqrt
    scaled_dot_product_attention select selu sigmoid silu slice softmax split split_with_sizes
    sqrt squeeze stack sub sum swapaxes t tanh transpose unbind unflatten unsqueeze
    upsample_bicubic2d upsample_bilinear2d upsample_nearest2d view zero zeros_like
    """.split()  # noqa: SIM905 (a list would be 100 lines)
)
LITERALS = {"as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string"}
# torch/_export/serde/schema.py, ScalarType
DTYPES = {
    1: torch.uint8, 2: torch.int8, 4: torch.int32, 5: torch.int64, 6: torch.float16,
    7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
MEMORY_FORMATS = {
    1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format,
}  # fmt: skip


class Name(str):
    """Stands for a tensor among an operator's arguments."""


@dataclass
class Step:
    """One operator: `inputs` by parameter, of which a Name is a tensor; what it calls its result.

    `outputs` is a list if the operator gives several tensors.
    """

    kind: str  # the operator's name without overload and in-place underscore, such as "relu"
    operator: Callable
    inputs: dict
    outputs: Name | list[Name]

    def reads(self) -> list[Name]:
        values = list(self.inputs.values())
        values += [item for value in values if isinstance(value, list) for item in value]
        return [value for value in values if isinstance(value, Name)]


@dataclass
class Program:
    """A network as a list of steps: maps float32 of (1, 3, H, W) to logits of (1, classes)."""

    steps: list[Step]
    weights: dict[Name, torch.Tensor]
    image: Name
    logits: Name

    @functools.cached_property
    def last_use(self) -> list[list[Name]]:
        """For each step the results that nobody reads afterwards."""
        last = {name: i for i, step in enumerate(self.steps) for name in step.reads()}
        freed = [[] for _ in self.steps]
        for name, i in last.items():
            if name != self.logits and name not in self.weights:
                freed[i].append(name)
        return freed

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        # Convolutions keep the layout, and are faster with the channels of a pixel side by side.
        values = self.weights | {self.image: image.contiguous(memory_format=torch.channels_last)}
        for step, freed in zip(self.steps, self.last_use, strict=True):
            result = step.operator(**{key: _value(x, values) for key, x in step.inputs.items()})
            if isinstance(step.outputs, list):
                values.update(zip(step.outputs, result, strict=True))
            else:
                values[step.outputs] = result
            for name in freed:
                del values[name]
        return values[self.logits]


def load(file: BinaryIO) -> Program:
    """Read an archive that `torch.export.save` wrote.

    Raises:
        ValueError, or what Python raises for a field that is missing or of another type: it is
            damaged, needs pickle, has an operator that is not in OPERATORS, or other inputs and
            outputs than one tensor each.
    """
    with zipfile.ZipFile(file) as archive:
        (path,) = (n for n in archive.namelist() if n.endswith("/models/model.json"))
        folder = path.removesuffix("models/model.json")
        document = _json(archive, path)
        if document["schema_version"]["major"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {document['schema_version']} is not known")
        tensors = {
            kind: _tensors(archive, f"{folder}data/{kind}/", f"model_{kind}_config.json")
            for kind in ("weights", "constants")
        }
    graph, signature = (document["graph_module"][key] for key in ("graph", "signature"))
    weights, images = {}, []
    for spec in signature["input_specs"]:
        ((kind, entry),) = spec.items()
        if kind == "user_input":
            images.append(_argument(entry["arg"]))
        elif kind in ("parameter", "buffer"):
            weights[Name(entry["arg"]["name"])] = tensors["weights"][entry[f"{kind}_name"]]
        elif kind == "tensor_constant":
            name = entry["tensor_constant_name"]
            weights[Name(entry["arg"]["name"])] = tensors["constants"][name]
        else:
            raise ValueError(f"an input of the kind {kind!r} is not supported")
    outputs = [_argument(output) for output in graph["outputs"]]
    if len(images) != 1 or len(outputs) != 1 or not isinstance(outputs[0], Name):
        raise ValueError("the graph must take one tensor and give one")
    return Program([_step(node) for node in graph["nodes"]], weights, images[0], outputs[0])


def _json(archive: zipfile.ZipFile, name: str) -> dict:
    if archive.getinfo(name).file_size > MAX_GRAPH_BYTES:
        raise ValueError(f"{name} is too large")
    return json.loads(archive.read(name))


def _tensors(archive: zipfile.ZipFile, folder: str, config: str) -> dict[str, torch.Tensor]:
    """The tensors that a payload configuration describes, by their names."""
    entries = _json(archive, folder + config)["config"]
    paths = {folder + entry["path_name"] for entry in entries.values()}
    if sum(archive.getinfo(path).file_size for path in paths) > MAX_WEIGHT_BYTES:
        raise ValueError("the weights are too large")
    flat, tensors = {}, {}
    for name, entry in entries.items():
        meta = entry["tensor_meta"]
        if entry["use_pickle"] or meta is None:
            raise ValueError(f"{name} is pickled, not plain bytes")
        path, dtype = folder + entry["path_name"], DTYPES[meta["dtype"]]
        sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
        if (path, dtype) not in flat:
            data = bytearray(archive.read(path))
            flat[path, dtype] = torch.frombuffer(data or bytearray(8), dtype=dtype)
        offset = meta["storage_offset"]["as_int"]
        tensors[name] = flat[path, dtype].as_strided(sizes, strides, offset)  # checks the bounds
    return tensors


def _step(node: dict) -> Step:
    target = re.fullmatch(r"torch\.ops\.aten\.(\w+?)(_?)\.(\w+)", node["target"])
    if target is None or target[1] not in OPERATORS:
        raise ValueError(f"the operator {node['target']!r:.80} is not allowed")
    operator = getattr(getattr(torch.ops.aten, target[1] + target[2]), target[3])
    inputs = {entry["name"]: _argument(entry["arg"]) for entry in node["inputs"]}
    (output,) = (_argument(output) for output in node["outputs"])
    return Step(target[1], operator, inputs, output)


def _argument(argument: dict) -> object:
    ((kind, value),) = argument.items()
    if kind in LITERALS:
        return value
    match kind:
        case "as_none":
            return None
        case "as_tensor":
            return Name(value["name"])
        case "as_tensors":
            return [Name(item["name"]) for item in value]
        case "as_optional_tensors":
            return [_argument(item) for item in value]
        case "as_scalar_type":
            return DTYPES[value]
        case "as_memory_format":
            return MEMORY_FORMATS[value]
        case "as_device":
            return torch.device("cpu")
        case "as_layout":
            return torch.strided
    raise ValueError(f"an argument of the kind {kind!r} is not supported")


def _value(argument: object, values: dict[Name, torch.Tensor]) -> object:
    if isinstance(argument, Name):
        return values[argument]
    if isinstance(argument, list):
        return [_value(item, values) for item in argument]
    return argument


# Fusion with oneDNN, by the operators that torch.compile uses for it on a processor.

ACTIVATIONS = {"relu": "relu", "silu": "swish", "hardswish": "hardswish", "hardtanh": "hardtanh"}


class Convolution:
    """A convolution with all that follows it directly; its weights are laid out at the first call.

    activation: a key of ACTIVATIONS, with `bounds` for hardtanh.
    """

    def __init__(self, inputs: dict, weight: torch.Tensor, bias: torch.Tensor | None):
        pairs = (_pair(inputs.get(key, default)) for key, default in
                 (("padding", 0), ("stride", 1), ("dilation", 1)))  # fmt: skip
        self.geometry = (*pairs, inputs.get("groups", 1))
        self.weight, self.bias = weight, bias
        self.activation, self.bounds, self.ready = "none", [], False

    def __call__(self, input: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        mkldnn = torch.ops.mkldnn
        if not self.ready:
            shape = list(input.shape)
            self.weight = mkldnn._reorder_convolution_weight(self.weight, *self.geometry, shape)
            self.ready = True
        if other is None:
            return mkldnn._convolution_pointwise(
                input, self.weight, self.bias, *self.geometry, self.activation, self.bounds, ""
            )
        activation = None if self.activation == "none" else self.activation
        return mkldnn._convolution_pointwise.binary(
            input, other, self.weight, self.bias, *self.geometry, "add", 1.0, activation, [], ""
        )


def fuse(program: Program) -> Program:
    """The same network with batch norm folded into the convolutions before it, and the activations
    and additions after them computed by oneDNN in the same pass."""
    steps: list[Step | None] = list(program.steps)
    producer = {step.outputs: i for i, step in enumerate(steps) if isinstance(step.outputs, Name)}
    readers = collections.defaultdict(list)
    for i, step in enumerate(steps):
        for name in step.reads():
            readers[name].append(i)

    def only_reader(name: Name, *kinds: str) -> int | None:
        """The one step that reads `name`, if it is of one of the kinds."""
        found = readers[name]
        fits = len(found) == 1 and name != program.logits and steps[found[0]] is not None
        return found[0] if fits and steps[found[0]].kind in kinds else None

    def absorb(i: int, reader: int) -> None:
        steps[i].outputs = steps[reader].outputs
        producer[steps[i].outputs] = i
        steps[reader] = None

    for i, step in enumerate(program.steps):
        if step.kind != "conv2d" or isinstance(step.inputs.get("padding"), str):
            continue
        weight = program.weights.get(step.inputs["weight"])
        bias = step.inputs.get("bias")
        if weight is None or (bias is not None and bias not in program.weights):
            continue
        bias = program.weights.get(bias)
        steps[i] = step = dataclasses.replace(step)
        norm = only_reader(step.outputs, "batch_norm")
        if norm is not None and (
            folded := _fold(steps[norm].inputs, program.weights, weight, bias)
        ):
            weight, bias = folded
            absorb(i, norm)
        convolution = Convolution(step.inputs, weight, bias)
        step.operator, inputs = convolution, {"input": step.inputs["input"]}
        addition = only_reader(step.outputs, "add")
        if addition is not None and steps[addition].inputs.get("alpha", 1) == 1:
            operands = [steps[addition].inputs[key] for key in ("self", "other")]
            others = [name for name in operands if name != step.outputs]
            in_place = steps[addition].operator == torch.ops.aten.add_.Tensor
            # The other operand must be there already; the fused addition leaves it as it is, so
            # that `other.add_(convolution)` can only be replaced if nobody reads `other` later.
            if (
                len(others) == 1
                and isinstance(others[0], Name)
                and producer.get(others[0], len(steps)) < i
                and not (in_place and others[0] == operands[0] and len(readers[others[0]]) > 1)
            ):
                inputs["other"] = others[0]
                absorb(i, addition)
        activation = only_reader(step.outputs, *ACTIVATIONS)
        if activation is not None:
            arguments, kind = steps[activation].inputs, steps[activation].kind
            if "other" not in inputs or kind == "relu":
                convolution.activation = ACTIVATIONS[kind]
                if kind == "hardtanh":
                    low, high = arguments.get("min_val", -1), arguments.get("max_val", 1)
                    convolution.bounds = [low, high]
                absorb(i, activation)
        step.kind, step.inputs = "convolution", inputs
    return Program([step for step in steps if step], program.weights, program.image, program.logits)


STATISTICS = ("weight", "bias", "running_mean", "running_var")


def _is_fixed(norm: dict, weights: dict[Name, torch.Tensor]) -> bool:
    """Whether a batch norm is a plain multiplication and addition of known numbers."""
    return not norm["training"] and all(norm.get(key) in weights for key in STATISTICS)


def _fold(
    norm: dict, weights: dict[Name, torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution together with the batch norm after it."""
    gamma, beta, mean, variance = (weights[norm[key]] for key in STATISTICS)
    scale = gamma / torch.sqrt(variance + norm["eps"])
    bias = torch.zeros_like(mean) if bias is None else bias
    return weight * scale[:, None, None, None], beta + (bias - mean) * scale


def _pair(value: int | list[int]) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return values * 2 if len(values) == 1 else values
