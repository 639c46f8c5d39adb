"""Turn TorchScript back into a module that torch.export and quantisation can take.

PyTorch converts the recording to a graph of its operators. Those with weights, and those that
quantisation knows as modules only, become torch.nn's modules again.
"""

import operator
import warnings
from collections.abc import Callable

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator

from local.cli import UserError
from training.trace import drop_warnings

aten = torch.ops.aten


def to_module(script: torch.jit.ScriptModule, example: torch.Tensor) -> fx.GraphModule:
    """A module that computes what `script` does, for inputs of the shape of `example`.

    That it really does has to be shown on images: `training.optimize` compares.

    Raises:
        UserError: PyTorch cannot convert this recording.
    """
    try:
        # Private, but the only way back, and what it gives is checked by whoever uses it.
        from torch._export.converter import TS2EPConverter

        class Converter(TS2EPConverter):
            def retrace_as_exported_program(self, graph, _constants):
                # Its own way keeps shapes as symbols, with which a DenseNet takes many minutes.
                return torch.export.export(graph, self.sample_args)

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            converter = Converter(script, (example,))
            drop_warnings(converter.ts_graph)
            module = converter.convert().module(check_guards=False)
        if depends := [node for node in module.graph.nodes if _reads_values(node)]:
            raise ValueError(f"it depends on the values of the image ({depends[0]})")
        _plain_signature(module.graph)
    except Exception as error:  # the converter has an exception for everything it cannot do
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"this TorchScript file cannot be turned into a module: {reason[0]}; choose the "
            "variant fp32, or bring the model as Python code"
        ) from error
    for number, node in enumerate(list(module.graph.nodes)):
        if node.op == "call_function" and node.target in REPLACED:
            _replace(node, REPLACED[node.target](_arguments(node, module)), module, number)
    module.graph.eliminate_dead_code()
    return fx.GraphModule(module, module.graph).eval()  # the exporter's own class has no eval


def _replace(
    node: fx.Node, made: nn.Module | Callable | None, module: fx.GraphModule, number: int
) -> None:
    """Put what an entry of REPLACED has made in the place of an operator."""
    if made is None:
        return
    with module.graph.inserting_before(node):
        if isinstance(made, nn.Module):
            name = f"{made._get_name().lower()}_{number}"
            module.add_submodule(name, made.eval())
            (image,) = [x for x in node.args if isinstance(x, fx.Node) and x.op != "get_attr"]
            new = module.graph.call_module(name, (image,))
        else:
            new = module.graph.call_function(made, node.args, node.kwargs)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _plain_signature(graph: fx.Graph) -> None:
    """One tensor in, one tensor out, without the exporter's nested containers."""
    graph.set_codegen(fx.graph.CodeGen())
    (output,) = graph.find_nodes(op="output")
    while isinstance(output.args[0], tuple | list):
        if len(output.args[0]) != 1:
            raise ValueError("it does not answer with one tensor")
        output.args = (output.args[0][0],)


def _reads_values(node: fx.Node) -> bool:
    """Whether an operator turns values into control flow or shapes, which a trace would freeze."""
    return isinstance(node.target, HigherOrderOperator) or node.target in (
        aten.item.default,
        aten._local_scalar_dense.default,
    )


def _arguments(node: fx.Node, module: nn.Module) -> dict:
    """An operator's arguments by name, with its defaults; weights as tensors."""
    schema = node.target._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    values |= dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {
        name: operator.attrgetter(value.target)(module)
        if isinstance(value, fx.Node) and value.op == "get_attr"
        else value
        for name, value in values.items()
    }


def _convolution(a: dict) -> nn.Module | None:
    weight = a["weight"]
    if not isinstance(weight, torch.Tensor) or weight.ndim != 4 or a.get("transposed"):
        return None
    layer = nn.Conv2d(
        weight.shape[1] * a["groups"], weight.shape[0], tuple(weight.shape[2:]),
        a["stride"], a["padding"], a["dilation"], a["groups"], a["bias"] is not None,
    )  # fmt: skip
    return _with(layer, weight=weight, bias=a["bias"])


def _linear(a: dict) -> nn.Module | None:
    weight = a["weight"]
    if not isinstance(weight, torch.Tensor):
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], a["bias"] is not None)
    return _with(layer, weight=weight, bias=a["bias"])


def _batch_norm(a: dict) -> nn.Module | None:
    statistics = {name: a[name] for name in ("weight", "bias", "running_mean", "running_var")}
    if a["training"] or not all(isinstance(x, torch.Tensor) for x in statistics.values()):
        return None
    return _with(nn.BatchNorm2d(len(a["running_mean"]), eps=a["eps"]), **statistics)


def _with(layer: nn.Module, **tensors: torch.Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        if tensor is not None:
            getattr(layer, name).data = tensor.detach().clone()
    return layer


def _hardtanh(a: dict) -> nn.Module:
    low, high = a["min_val"], a["max_val"]
    return nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high)


def _max_pool(a: dict) -> nn.Module:
    return nn.MaxPool2d(
        a["kernel_size"], a["stride"] or None, a["padding"], a["dilation"], ceil_mode=a["ceil_mode"]
    )


# What becomes of an operator: a module made of its arguments, a function of the same arguments, or
# None: it stays as it is.
REPLACED: dict[Callable, Callable[[dict], nn.Module | Callable | None]] = {
    aten.conv2d.default: _convolution,
    aten.convolution.default: _convolution,
    aten.linear.default: _linear,
    aten.batch_norm.default: _batch_norm,
    aten.relu.default: lambda a: nn.ReLU(),
    aten.relu_.default: lambda a: nn.ReLU(),
    aten.hardtanh.default: _hardtanh,
    aten.hardtanh_.default: _hardtanh,
    aten.hardswish.default: lambda a: nn.Hardswish(),
    aten.hardswish_.default: lambda a: nn.Hardswish(),
    aten.hardsigmoid.default: lambda a: nn.Hardsigmoid(),
    aten.hardsigmoid_.default: lambda a: nn.Hardsigmoid(),
    aten.sigmoid.default: lambda a: nn.Sigmoid(),
    aten.silu.default: lambda a: nn.SiLU(),
    aten.silu_.default: lambda a: nn.SiLU(),
    aten.dropout.default: lambda a: nn.Identity(),
    aten.dropout_.default: lambda a: nn.Identity(),
    aten.max_pool2d.default: _max_pool,
    aten.adaptive_avg_pool2d.default: lambda a: nn.AdaptiveAvgPool2d(a["output_size"]),
    aten.add.Tensor: lambda a: torch.add if a["alpha"] == 1 else None,
    aten.add_.Tensor: lambda a: torch.add if a["alpha"] == 1 else None,
    aten.mul.Tensor: lambda a: torch.mul,
    aten.mul_.Tensor: lambda a: torch.mul,
    aten.cat.default: lambda a: torch.cat,
    aten.flatten.using_ints: lambda a: torch.flatten,
    aten.mean.dim: lambda a: torch.mean if a["dtype"] is None else None,
}
