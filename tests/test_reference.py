"""The specification itself, against torch's and torchvision's modules; and the tests' own error bound."""

import inspect
import re
from importlib.resources import files

import pytest
import torch
from harness import ACTIVATIONS, Bounded, integers, reals
from torch import nn

from fastconv import ops, reference

OPS = (
    "depthwise", "pointwise", "fire_expand", "fire", "separable", "inverted_residual", "stem", "max_pool", "global_avg_pool",
    "depthwise_backward_input", "depthwise_backward_weight",
)  # fmt: skip
MODULES = {None: nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid, "silu": nn.SiLU}


def parameters(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in module.parameters()]


@pytest.mark.parametrize("name", OPS)
def test_signatures_agree(name):
    """One operator, one argument list: the public function's, the reference's and the schema's."""
    public, specified = inspect.signature(getattr(ops, name)), inspect.signature(getattr(reference, name))
    assert [(p.name, p.kind, p.default) for p in public.parameters.values()] == [
        (p.name, p.kind, p.default) for p in specified.parameters.values()
    ]
    schema = getattr(torch.ops.fastconv, name).default._schema
    assert sorted(argument.name for argument in schema.arguments) == sorted(public.parameters)
    for argument in schema.arguments:
        default, expected = public.parameters[argument.name].default, argument.default_value
        if argument.has_default_value():
            assert expected == ([default, default] if isinstance(expected, list) else default)
        else:
            assert default is inspect.Parameter.empty


def test_every_schema_has_its_function():
    names = re.findall(r'SCHEMA\("(\w+)', files("fastconv").joinpath("schemas.inc").read_text())
    private = ("network", "pack_", "program_", "training_")
    assert set(OPS) == {name for name in names if not name.startswith(private) and not name.endswith("_packed")}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolutions(activation):
    x, act = reals(2, 6, 9, 8), MODULES[activation]()
    conv = nn.Conv2d(6, 6, 5, (1, 2), (2, 0), groups=6)
    assert torch.equal(
        reference.depthwise(x, *parameters(conv), stride=(1, 2), padding=(2, 0), activation=activation), act(conv(x)).detach()
    )
    conv, residual = nn.Conv2d(6, 4, 1), reals(2, 4, 9, 8)
    y = reference.pointwise(x, *parameters(conv), residual=residual, activation=activation)
    assert torch.equal(y, act(conv(x) + residual).detach())
    conv = nn.Conv2d(6, 4, 3, 2, 1)
    assert torch.equal(reference.stem(x, *parameters(conv), activation=activation), act(conv(x)).detach())


def test_blocks():
    x = reals(2, 6, 9, 8)
    block = nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1, groups=6), nn.ReLU6(), nn.Conv2d(6, 9, 1), nn.Hardswish())
    y = reference.separable(x, *parameters(block), stride=2, depthwise_activation="relu6", activation="hardswish")
    assert torch.equal(y, block(x).detach())
    block = nn.Sequential(nn.Conv2d(6, 12, 1), nn.ReLU6(), nn.Conv2d(12, 12, 3, 1, 1, groups=12), nn.ReLU6(), nn.Conv2d(12, 6, 1))
    assert torch.equal(reference.inverted_residual(x, *parameters(block), residual=True), (block(x) + x).detach())


def test_fire_is_torchvisions():
    try:
        from fastconv.models._torchvision import import_torchvision

        import_torchvision()
        from torchvision.models.squeezenet import Fire
    except ImportError as error:
        pytest.skip(f"needs torchvision: {error}")
    module, x = Fire(6, 3, 4, 5), reals(2, 6, 9, 8)
    params = parameters(module)
    assert torch.equal(reference.fire(x, *params), module(x).detach())
    squeezed = torch.relu(module.squeeze(x)).detach()
    assert torch.equal(reference.fire_expand(squeezed, *params[2:]), module(x).detach())


def test_pools():
    x = reals(2, 6, 9, 8)
    y = reference.max_pool(x, stride=(2, 1), padding=(1, 0), ceil_mode=True)
    assert torch.equal(y, nn.MaxPool2d(3, (2, 1), (1, 0), ceil_mode=True)(x))
    torch.testing.assert_close(reference.global_avg_pool(x), nn.AdaptiveAvgPool2d(1)(x))


def test_the_bound_admits_float32_and_nothing_coarser():
    """Float32 arithmetic passes; inputs rounded to 11 bits (tf32), or one product lost, do not."""
    x, weight, bias = reals(2, 40, 7, 7), reals(9, 40, 1, 1), reals(9)
    bound = Bounded.exact(x).conv(weight, bias).activate("hardswish")
    bound.admits(reference.pointwise(x, weight, bias, activation="hardswish"))
    coarse = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    with pytest.raises(AssertionError, match="elements off"):
        bound.admits(reference.pointwise(coarse, weight, bias, activation="hardswish"))
    lost = x.clone()
    lost[1, 39, 6, 6] = 0
    with pytest.raises(AssertionError, match=r"first at \(1, "):
        bound.admits(reference.pointwise(lost, weight, bias, activation="hardswish"))
    spoiled = reference.pointwise(x, weight, bias, activation="hardswish")
    spoiled[0, 0, 0, 0] = torch.nan
    with pytest.raises(AssertionError, match="1 of 882 elements off"):
        bound.admits(spoiled)


def test_integers_stay_exact():
    """The exact tests' premise: their largest sums fit float32's 24 bits."""
    assert integers(1000).abs().max() == 4
    assert 4 * (25 * 16 + 4) * 4 * 33 + 4 * (9 * 16 + 4) < 2**24
