"""Random operator calls, layers and networks against float64: a few hundred by default, FUZZ_EXAMPLES=100000 for a sweep.

Operators and layers get nine in ten of them. A failure is shrunk by hypothesis, which prints the line that reproduces it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import test_depthwise
import test_fire
import test_fire_expand
import test_inverted_residual
import test_pointwise
import test_separable
import test_stem
import torch
from core import programs
from fuzz import fuzz
from fuzz.python_targets import TARGETS
from harness import ACTIVATIONS, ISAS, Bounded, integers, layouts, randomise_norms, reals, using_isa
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_random_networks import network
from torch import Tensor, nn

import fastconv
from fastconv import ops, reference

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))

SIZES = st.integers(1, 11)
CHANNELS = st.sampled_from((1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48))
ACTIVATION = st.sampled_from(ACTIVATIONS)
SEEDS = st.integers(0, 2**32 - 1)
Draw = Callable[[st.SearchStrategy], object]


def examples(share: float, least: int) -> settings:
    """Settings for a test that takes this share of FUZZ_EXAMPLES: without them the same `least` examples every time."""
    return settings(
        max_examples=int(EXAMPLES * share) or least,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def _poisoned(poison):
    """Every example on memory that holds NaN."""


def image(draw: Draw, kind: Callable[..., Tensor], channels: int, kernel: tuple[int, int] = (1, 1), padding=(0, 0), batch=0) -> Tensor:
    """Large enough for one window, in any layout; of `batch` images at least."""
    size = [max(draw(SIZES), k - 2 * p) for k, p in zip(kernel, padding)]
    x = kind(draw(st.integers(batch, 3)), channels, *size) * draw(st.sampled_from((1, 1, 1, 8, 2**-10)))
    return dict(layouts(x))[
        draw(st.sampled_from(("NCHW", "channels_last", "a slice of channels", "a crop", "transposed", "every other image")))
    ]


def window(draw: Draw, k: int, covered: bool = False) -> dict[str, tuple[int, int]]:
    """covered: by the compiled depthwise kernels. Else a block's two forms run ATen in different places, and round differently."""
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 2 if covered else 3)))
    most = k - 1 if covered else k
    return {"stride": stride, "padding": draw(st.tuples(st.integers(0, most), st.integers(0, most)))}


def maybe(draw: Draw, tensor: Tensor) -> Tensor | None:
    return tensor if draw(st.integers(0, 3)) else None


def depthwise(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    c, k = draw(CHANNELS), draw(st.sampled_from((3, 5)))
    options = window(draw, k) | {"activation": draw(ACTIVATION)}
    args = image(draw, kind, c, (k, k), options["padding"]), kind(c, 1, k, k), maybe(draw, kind(c))
    return test_depthwise.both(*args, **options), test_depthwise.expected(*args, **options)


def pointwise(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    c, out = draw(CHANNELS), draw(CHANNELS)
    x = image(draw, kind, c)
    options = {"residual": maybe(draw, kind(x.shape[0], out, *x.shape[2:])), "activation": draw(ACTIVATION)}
    args = x, kind(out, c, 1, 1), maybe(draw, kind(out))
    return test_pointwise.both(*args, **options), test_pointwise.expected(*args, **options)


def fire_expand(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    c = draw(CHANNELS)
    args = image(draw, kind, c), *test_fire_expand.weights(c, draw(CHANNELS), draw(CHANNELS), kind)
    return test_fire_expand.both(*args), test_fire_expand.expected(*args)


def fire(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    c = draw(CHANNELS)
    args = image(draw, kind, c), *test_fire.weights(c, draw(CHANNELS), draw(CHANNELS), draw(CHANNELS), kind)
    if args[0].numel():
        test_fire.admits_winograd(args[0], args[1:])
    return test_fire.both(*args), test_fire.expected(*args)


def separable(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    c, out, k = draw(CHANNELS), draw(CHANNELS), draw(st.sampled_from((3, 5)))
    options = window(draw, k, covered=True) | {"depthwise_activation": draw(ACTIVATION), "activation": draw(ACTIVATION)}
    args = image(draw, kind, c, (k, k), options["padding"]), *test_separable.weights(c, out, k, kind)
    expected = test_separable.expected(*args, **options)
    if draw(st.booleans()):
        options["residual"] = kind(*expected.value.shape)
        expected = test_separable.expected(*args, **options)
    return test_separable.both(*args, **options), expected


def inverted_residual(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    c, out, k = draw(CHANNELS), draw(CHANNELS), draw(st.sampled_from((3, 5)))
    options = window(draw, k, covered=True) | {"activation": draw(ACTIVATION)}
    if draw(st.booleans()):
        out, options = c, options | {"stride": (1, 1), "padding": (k // 2, k // 2), "residual": True}
    x = image(draw, kind, c, (k, k), options["padding"])
    args = x, *test_inverted_residual.weights(c, draw(CHANNELS), out, k, kind)
    return test_inverted_residual.both(*args, **options), test_inverted_residual.expected(*args, **options)


def stem(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    c, out = draw(st.integers(1, 5)), draw(CHANNELS)
    k = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    options = window(draw, 3) | {"activation": draw(ACTIVATION)}
    args = image(draw, kind, c, k, options["padding"]), kind(out, c, *k), maybe(draw, kind(out))
    return test_stem.both(*args, **options), test_stem.expected(*args, **options)


def global_avg_pool(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    x = image(draw, kind, draw(CHANNELS))
    return ops.global_avg_pool(x), Bounded.exact(x).mean()


def max_pool(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    options = window(draw, 1) | {"ceil_mode": draw(st.booleans())}
    x = image(draw, kind, draw(CHANNELS), (3, 3), options["padding"])
    return ops.max_pool(x, **options), Bounded.exact(reference.max_pool(x, **options))


def depthwise_backward_input(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    """On integers, where both are exact."""
    c, k = draw(CHANNELS), draw(st.sampled_from((3, 5)))
    options = window(draw, k)
    x = image(draw, integers, c, (k, k), options["padding"])
    weight = integers(c, 1, k, k)
    grad = integers(*reference.depthwise(x, weight, **options).shape)
    args = grad, weight, tuple(x.shape[2:])
    return ops.depthwise_backward_input(*args, **options), Bounded.exact(reference.depthwise_backward_input(*args, **options))


def depthwise_backward_weight(draw: Draw, kind) -> tuple[Tensor, Bounded]:
    """On integers, where both are exact."""
    c, k = draw(CHANNELS), draw(st.sampled_from((3, 5)))
    options = window(draw, k)
    x = image(draw, integers, c, (k, k), options["padding"])
    grad = integers(*reference.depthwise(x, integers(c, 1, k, k), **options).shape)
    return ops.depthwise_backward_weight(grad, x, k, **options), Bounded.exact(reference.depthwise_backward_weight(grad, x, k, **options))


OPERATORS = (
    depthwise, pointwise, fire_expand, fire, separable, inverted_residual, stem, max_pool, global_avg_pool,
    depthwise_backward_input, depthwise_backward_weight,
)  # fmt: skip


@examples(0.7, 250)
@given(data=st.data(), operator=st.sampled_from(OPERATORS), isa=st.sampled_from(ISAS), seed=SEEDS)
def test_operators(data, operator, isa, seed):
    torch.manual_seed(seed)
    with using_isa(isa):
        y, expected = operator(data.draw, data.draw(st.sampled_from((reals, integers))))
    expected.admits(y, operator.__name__)


# Layers


def depthwise_layer(draw: Draw) -> tuple[nn.Module, int]:
    c, k = draw(CHANNELS), draw(st.sampled_from(((3, 3), (5, 5), (3, 5), (1, 1), (7, 7))))
    options = window(draw, 3) | {"dilation": draw(st.sampled_from((1, 1, 2))), "bias": draw(st.booleans())}
    return fastconv.nn.DepthwiseConv2d(c, c, k, groups=c, padding_mode=draw(st.sampled_from(("zeros", "zeros", "reflect"))), **options), c


def pointwise_layer(draw: Draw) -> tuple[nn.Module, int]:
    c = draw(CHANNELS)
    return fastconv.nn.PointwiseConv2d(c, draw(CHANNELS), 1, stride=draw(st.sampled_from((1, 1, 2))), bias=draw(st.booleans())), c


def fire_layer(draw: Draw) -> tuple[nn.Module, int]:
    c = draw(CHANNELS)
    return fastconv.nn.Fire(c, draw(CHANNELS), draw(CHANNELS), draw(CHANNELS)), c


def separable_layer(draw: Draw) -> tuple[nn.Module, int]:
    c, out = draw(CHANNELS), draw(CHANNELS)
    activation = draw(st.sampled_from((nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)))
    options = {"stride": draw(st.integers(1, 2)), "noskip": draw(st.booleans()), "pw_act": draw(st.booleans()), "act_layer": activation}
    return fastconv.nn.DepthwiseSeparable(c, draw(st.sampled_from((c, out))), draw(st.sampled_from((3, 5))), **options), c


def inverted_residual_layer(draw: Draw) -> tuple[nn.Module, int]:
    c, out = draw(CHANNELS), draw(CHANNELS)
    return fastconv.nn.InvertedResidual(c, draw(st.sampled_from((c, out))), draw(st.integers(1, 2)), draw(st.sampled_from((1, 2, 3)))), c


def norm_layer(draw: Draw) -> tuple[nn.Module, int]:
    c = draw(CHANNELS)
    norm = draw(st.sampled_from((nn.BatchNorm2d, nn.BatchNorm2d, None)))
    activation = draw(st.sampled_from((nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, None)))
    groups, kernel, stride = draw(st.sampled_from((1, c))), draw(st.sampled_from((1, 3, 5))), draw(st.integers(1, 2))
    out = c if groups == c else draw(CHANNELS)
    layer = fastconv.nn.Conv2dNormActivation(c, out, kernel, stride, groups=groups, norm_layer=norm, activation_layer=activation)
    return layer, c


LAYERS = (depthwise_layer, pointwise_layer, fire_layer, separable_layer, inverted_residual_layer, norm_layer)
MODES = ("inference", "gradients", "training")


@examples(0.2, 100)
@given(data=st.data(), made=st.sampled_from(LAYERS), mode=st.sampled_from(MODES), isa=st.sampled_from(ISAS), seed=SEEDS)
def test_layers(data, made, mode, isa, seed):
    """The layer in float32 against itself in float64, which torch computes."""
    torch.manual_seed(seed)
    layer, channels = made(data.draw)
    randomise_norms(layer.train(mode == "training"))
    x = image(data.draw, reals, channels, (13, 13), batch=2 if mode == "training" else 0)
    wide = copy.deepcopy(layer).double()
    with using_isa(isa), torch.set_grad_enabled(mode != "inference"):
        close(layer(x), wide(x.double()), layer)
    for (name, buffer), expected in zip(layer.named_buffers(), wide.buffers()):
        close(buffer, expected.double(), f"{name} of {layer}")


def close(y: Tensor, expected: Tensor, what: object) -> None:
    assert y.shape == expected.shape, what
    error = (y.double() - expected).norm()
    assert error <= 1e-5 * expected.norm() + 1e-30, f"{what}: relative error {float(error / expected.norm()):.2g}"


# Networks


@examples(0.1, 25)
@given(pick=st.randoms(use_true_random=False), isa=st.sampled_from(ISAS), exact=st.booleans(), seed=SEEDS)
@torch.no_grad()
def test_networks(pick, isa, exact, seed):
    torch.manual_seed(seed)
    model = network(pick)
    x = torch.randn(pick.randint(1, 3), 3, pick.randint(16, 48), pick.randint(16, 48))
    if pick.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
    wanted = copy.deepcopy(model).double()(x.double())
    with using_isa(isa):
        y = fastconv.optimize(model, exact=exact)(x)
    error, eager = ((value - wanted).norm() / wanted.norm() for value in (y, model(x)))
    # 1e-6 and 1e-5 are the promise for the six networks; the worst seen of these, with ten logits that may cancel, is 1.1e-6 and 1.1e-5
    assert error <= max(3e-6 if exact else 2e-5, 3 * eager), (float(error), float(eager))


# What `make fuzz` has saved

FUZZ = Path(__file__).parent / "fuzz"


@pytest.mark.parametrize("target", TARGETS)
def test_saved_inputs(target):
    files = sorted((FUZZ / "corpus" / target).iterdir())
    assert files
    for file in files:
        TARGETS[target](file.read_bytes())


def test_the_fuzzed_operators_are_of_every_source_once():
    sources = [source for _, source, _ in fuzz.jobs()]
    assert len(set(sources)) == len(sources)
    assert {path.name for path in sources} > {"training.cpp", "blocks.cpp", "program.cpp", "operators.cpp"}
    assert [path.parent.name for path in sources if path.name == "training.cpp"] == ["cpu", "csrc"]


@pytest.mark.slow
@pytest.mark.skipif(programs.clang() is None, reason="needs clang")
def test_saved_inputs_of_the_compiled_operators():
    subprocess.run([sys.executable, str(FUZZ / "fuzz.py"), "--seconds", "0", "operators"], check=True)
