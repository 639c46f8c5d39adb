"""TorchScript turned back into modules: networks of torchvision, and what cannot be converted."""

import io
import warnings

import pytest
import torch
from torch import nn

from local.cli import UserError
from training.convert import to_module
from training.model import build
from training.trace import freeze, serialize, trace_module

IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["trace", "freeze", "script"])
@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v3_small"])
def test_it_computes_the_same_with_modules_for_all_operators(architecture, how):
    torch.manual_seed(0)
    model = build(architecture, 5).eval()
    script = torch.jit.script(model) if how == "script" else trace_module(model, IMAGE)
    module = to_module(freeze(script) if how == "freeze" else script, IMAGE)
    other = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(module(other), model(other), atol=1e-5)
    assert not [node for node in module.graph.nodes if "aten" in str(node.target)]
    kinds = [type(part) for part in module.modules()]
    expected = [type(part) for part in model.modules()]
    assert kinds.count(nn.Conv2d) == expected.count(nn.Conv2d)
    norms = 0 if how == "freeze" else expected.count(nn.BatchNorm2d)
    assert kinds.count(nn.BatchNorm2d) == norms


class Operators(nn.Module):
    """Each operator in the form that has no module: it stays, or is told from the one that has."""

    def forward(self, x):
        y = torch.add(x, x, alpha=2)
        y = nn.functional.hardtanh(y, -0.5, 0.5)
        y = nn.functional.conv_transpose2d(y, torch.ones(3, 4, 2, 2), stride=2)
        y = nn.functional.max_pool2d(y, 3, padding=1)
        return y.mean((2, 3), dtype=torch.float64).float()


def test_what_has_no_module_stays_an_operator():
    model = Operators().eval()
    module = to_module(trace_module(model, IMAGE), IMAGE)
    assert torch.allclose(module(IMAGE), model(IMAGE))


class Branching(nn.Module):
    def forward(self, x):
        if x.mean() > 0:
            return x.mean((2, 3))
        return x.amax((2, 3))


class Growing(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)).repeat(1, int(x.sum()))


class Two(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("model", [Branching(), Growing(), Two()])
def test_what_cannot_be_converted_gets_a_sentence(model):
    with pytest.raises(UserError, match=r"into a module: .*variant fp32"):
        to_module(torch.jit.script(model.eval()), IMAGE)


class Talkative(nn.Module):
    def forward(self, x):
        warnings.warn("about its training", stacklevel=2)
        return x.mean((2, 3))


def test_what_a_model_says_at_every_call_is_left_out(recwarn):
    script = torch.jit.script(Talkative().eval())
    data = serialize(freeze(script))
    for model in (torch.jit.load(io.BytesIO(data)), to_module(script, IMAGE)):
        assert torch.allclose(model(IMAGE), IMAGE.mean((2, 3)))
    assert not [warning for warning in recwarn if "training" in str(warning.message)]
    with pytest.warns(UserWarning, match="about its training"):
        script(IMAGE)
