"""NaN, infinities, zeros with a sign and denormals, at each position of each argument and through each activation, as in ATen.

An output is compared with eager ATen's in float32 by its class: NaN, +Inf, -Inf, or finite, and then by value. What is not compared:

- the sign of a zero, but where one operation decides it: a sum of several zeros has the sign that its order of summation gives it;
- float64 at an image's border: there ATen multiplies the padding's zeros, so a NaN or an infinity in a depthwise weight reaches outputs
  whose window only has that tap outside the image. Its float32 kernels leave such taps out, and so do ours.

Winograd (an optimized fire, unless `exact`) is no exception: rows of tiles with a NaN, an infinity or a number past 1e30 in them are
computed directly, and weights with one are not transformed at all. Only rounding differs: it is relative to the tile's largest number,
not to the output, so denormals and numbers 1e7 times smaller than their neighbours are lost in a tile; `exact=True` keeps them.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from harness import ACTIVATIONS, channels_last, classes, every_isa, reals
from torch import Tensor

import fastconv
from fastconv import _extension, ops, reference
from fastconv.models._torchvision import import_torchvision

DENORMAL = 2.0**-140
SPECIAL = (torch.nan, torch.inf, -torch.inf, -0.0, DENORMAL)


class Case(NamedTuple):
    call: Callable[..., Tensor]
    specification: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...] | None, ...]  # of x, then of the weights


def windows(activation: str | None) -> dict[str, Case]:
    def case(name: str, *shapes, **options) -> Case:
        call, specification = getattr(ops, name), getattr(reference, name)
        return Case(lambda *args: call(*args, **options), lambda *args: specification(*args, **options), shapes)

    cases = {}
    for k, stride in itertools.product((3, 5), (1, 2)):
        options = {"stride": stride, "padding": k // 2, "activation": activation}
        cases[f"depthwise {k}x{k} stride {stride}"] = case("depthwise", (1, 17, 6, 8), (17, 1, k, k), (17,), **options)
    cases["stem"] = case("stem", (1, 3, 9, 8), (17, 3, 3, 3), (17,), activation=activation)
    cases["pointwise"] = Case(
        lambda x, w, b, r: ops.pointwise(x, w, b, residual=r, activation=activation),
        lambda x, w, b, r: reference.pointwise(x, w, b, residual=r, activation=activation),
        ((1, 9, 3, 3), (21, 9, 1, 1), (21,), (1, 21, 3, 3)),
    )
    both = {"depthwise_activation": activation, "activation": activation}
    cases["separable"] = case("separable", (1, 9, 6, 5), (9, 1, 3, 3), (9,), (18, 9, 1, 1), (18,), **both)
    shapes = ((1, 5, 6, 5), (17, 5, 1, 1), (17,), (17, 1, 3, 3), (17,), (5, 17, 1, 1), (5,))
    cases["inverted_residual"] = case("inverted_residual", *shapes, activation=activation, residual=True)
    return cases


FIRE = ((1, 4, 13, 9), (5, 4, 1, 1), (5,), (18, 5, 1, 1), (18,), (17, 5, 3, 3), (17,))
UNACTIVATED = {  # those that have no argument for it
    "fire_expand": Case(ops.fire_expand, reference.fire_expand, ((1, 5, 5, 7), *FIRE[3:])),
    "fire": Case(ops.fire, reference.fire, FIRE),
    "fire by Winograd": Case(lambda x, *weights: ops.prepare_fire(*weights)(x), reference.fire, FIRE),
    "max_pool": Case(lambda x: ops.max_pool(x, padding=1), lambda x: reference.max_pool(x, padding=1), ((1, 21, 7, 8),)),
    "global_avg_pool": Case(ops.global_avg_pool, reference.global_avg_pool, ((1, 21, 5, 6),)),
}


def places(shape: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Up to so many places of a tensor, evenly."""
    flat = torch.linspace(0, torch.Size(shape).numel() - 1, min(most, torch.Size(shape).numel())).round().long()
    return [tuple(place) for place in torch.stack(torch.unravel_index(flat, shape), 1).tolist()]


def arguments(case: Case) -> list[Tensor]:
    return [reals(*shape) for shape in case.shapes]


def spoiled(plain: list[Tensor], most: int) -> Iterator[tuple[str, list[Tensor]]]:
    """The arguments with each special value at each place: one after the other in weights, all at a time in a batch of images."""
    for which, value in itertools.product(range(len(plain)), SPECIAL):
        if plain[which].dim() == 4 and plain[which].shape[0] == 1 and which in (0, 3):  # x, pointwise's residual
            where = places(plain[which].shape, max(most, 100))
            args = [tensor.expand(len(where), -1, -1, -1).clone() if tensor.shape[0] == 1 else tensor for tensor in plain]
            for image, place in enumerate(where):
                args[which][(image, *place[1:])] = value
            yield f"{value} in argument {which}", args
            continue
        for place in places(plain[which].shape, most):
            args = list(plain)
            args[which] = plain[which].clone()
            args[which][place] = value
            yield f"{value} at {place} of argument {which}", args


def check_classes(case: Case, most: int) -> None:
    for message, args in spoiled(arguments(case), most):
        y, expected = case.call(*args), case.specification(*args)
        differ = classes(y) != classes(expected)
        assert not differ.any(), f"{message}: {int(differ.sum())} outputs, first {differ.nonzero()[0].tolist()}"
        finite = expected.isfinite()
        assert torch.allclose(y[finite], expected[finite], rtol=1e-5, atol=1e-4), message


@every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", windows(None))
def test_classes(name, activation):
    check_classes(windows(activation)[name], 4)


@every_isa
@pytest.mark.parametrize("name", UNACTIVATED)
def test_classes_of_those_without_an_activation(name):
    check_classes(UNACTIVATED[name], 5)


@pytest.mark.slow
@every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", windows(None))
def test_classes_at_every_place(name, activation):
    check_classes(windows(activation)[name], 10**9)


@every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_special_values(activation):
    """Sums that are exactly the value, in every lane. (Past -88.3, where it is below 4e-37, our silu is -0.)"""
    values = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, DENORMAL, -DENORMAL, 3e38, -3e38, 3.0, -3.0, 6.0, 88.5, -88.5]
    x = torch.tensor(values).view(-1, 1, 1, 1)
    expected = reference.ACTIVATIONS[activation](x).expand(-1, 37, 1, 1)
    options = {"rtol": 1e-6, "atol": 4e-37 if activation == "silu" else 2.0**-148, "equal_nan": True}
    one_tap_inside = ops.depthwise(x.expand(-1, 37, 1, 1), torch.ones(37, 1, 3, 3), activation=activation)
    torch.testing.assert_close(one_tap_inside, expected, **options)
    torch.testing.assert_close(ops.pointwise(x, torch.ones(37, 1, 1, 1), activation=activation), expected, **options)
    torch.testing.assert_close(ops.stem(x, torch.ones(37, 1, 3, 3), activation=activation), expected, **options)


@every_isa
def test_the_sign_of_a_zero_where_one_operation_decides_it():
    """A depthwise sum begins with the bias, and -0 + -0 * 1 is -0; the maximum of equal numbers is that number."""
    minus, ones = torch.full((1, 37, 1, 1), -0.0), torch.ones(37, 1, 3, 3)
    for activation in (None, "hardswish", "silu"):
        y = ops.depthwise(minus, ones, minus.flatten(), activation=activation)
        assert not y.any(), activation
        assert y.signbit().all(), activation
        assert not ops.depthwise(minus, ones, -minus.flatten(), activation=activation).signbit().any(), activation
    y = ops.max_pool(minus.expand(1, 37, 3, 3))
    assert not y.any()
    assert y.signbit().all()


@every_isa
@pytest.mark.parametrize("name", [*windows(None), "fire_expand", "fire", "max_pool", "global_avg_pool"])
def test_denormals_are_kept(name):
    """Inputs near the smallest number against float64: absolute error within a few of its steps, and results that are not all zero."""
    case = (windows(None) | UNACTIVATED)[name]
    args = [tensor.abs() + 0.1 for tensor in arguments(case)]
    args[0] = args[0] * DENORMAL
    args = [tensor * DENORMAL if tensor.dim() == 1 else tensor for tensor in args]  # biases
    if name == "pointwise":
        args[3] = args[3] * DENORMAL
    y, expected = case.call(*args), case.specification(*[tensor.double() for tensor in args])
    assert expected.min() > 0
    assert expected.max() < 2.0**-126
    terms = max(tensor[0].numel() for tensor in args[1:]) + 2 if len(args) > 1 else 32
    assert ((y.double() - expected).abs() <= 40 * terms * 2.0**-149).all()
    assert (y > 0).all()


@every_isa
def test_winograd_weights_that_its_transforms_would_spoil():
    """An infinity would become NaN, a huge number would overflow in mid-sum."""
    args = arguments(UNACTIVATED["fire by Winograd"])
    x, weights = args[0], [tensor.abs() for tensor in args[1:]]  # all sums positive: none is left out by the relu
    for value in (torch.inf, 1e38, 2e3):
        params = [tensor.clone() for tensor in weights]
        params[4][3, 2, 1, 0] = value
        prepared = ops.prepare_fire(*params)
        assert "winograd" not in prepared.kernel
        torch.testing.assert_close(prepared(x), ops.fire(x, *params), rtol=0, atol=0, equal_nan=True)
    if _extension.available:
        assert "winograd" in ops.prepare_fire(*weights).kernel


@every_isa
def test_winograd_at_the_limits_of_what_it_is_given():
    """The largest inputs and the largest weights that it takes at a time: no sum overflows."""
    squeezed = 8
    eye = torch.eye(squeezed).view(squeezed, squeezed, 1, 1)
    weight = torch.full((16, squeezed, 3, 3), 990 / squeezed / 9) * torch.randn(16, squeezed, 3, 3).sign()
    params = eye, None, eye, None, weight, None
    x = torch.where(torch.rand(1, squeezed, 16, 16) < 0.5, 0.0, 9.9e29)
    prepared = ops.prepare_fire(*params)
    assert not _extension.available or "winograd" in prepared.kernel
    y, expected = prepared(x), reference.fire(x.double(), *[None if p is None else p.double() for p in params])
    assert y.isfinite().all()
    assert (y.double() - expected).abs().max() <= 1e-5 * expected.max()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small"])
def test_an_optimized_network_shows_what_its_input_holds(name, exact):
    """Through folded norms, fires and pools: NaN where eager has NaN, in the image that holds it and in no other."""
    try:
        model = import_torchvision().models.get_model(name, num_classes=10).eval()
    except ImportError as problem:
        pytest.skip(f"needs torchvision: {problem}")
    fast = fastconv.optimize(model, exact=exact)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = reals(3, 3, 64, 64)
        x[1, 2, 40, 30] = value
        with torch.no_grad():
            y, expected = fast(x), model(x)
        assert torch.equal(classes(y), classes(expected)), value
        assert not classes(y)[[0, 2]].any()
        assert classes(y)[1].all() or value == value  # NaN reaches every logit; a relu6 may end an infinity


@pytest.mark.skipif(not _extension.available, reason="ATen against itself")
@pytest.mark.parametrize("name", ["depthwise", "pointwise"])
def test_denormals_take_no_longer_than_in_aten(name):
    """Processors trap on denormals, some for a hundred times the time of the multiplication. What is ours to see to: not five times as long
    as ATen's convolution takes for them, and with torch.set_flush_denormal(True) not five times as long as ordinary numbers.

    The best of several times, taken in turns."""
    c = 64
    weight = reals(*((c, 1, 3, 3) if name == "depthwise" else (c, c, 1, 1)))
    options = {"stride": 1, "padding": 1} if name == "depthwise" else {}
    ours = getattr(ops, f"prepare_{name}")(weight, None, activation=None, **options)
    x = channels_last(reals(1, c, 14, 14).abs() + 0.5)
    tiny = channels_last(x * DENORMAL)
    assert tiny.max() < 2.0**-126
    assert tiny.min() > 0

    def best(*calls: Callable[[], Tensor]) -> list[float]:
        times = [float("inf")] * len(calls)
        for _ in range(10):
            for i, call in enumerate(calls):
                start = time.perf_counter()
                call()
                times[i] = min(times[i], time.perf_counter() - start)
        return times

    mine, aten = best(lambda: ours(tiny), lambda: getattr(reference, name)(tiny, weight))
    assert mine <= 5 * aten
    if torch.set_flush_denormal(True):
        try:
            flushed, ordinary = best(lambda: ours(tiny), lambda: ours(x))
            assert not ours(tiny).any()
        finally:
            torch.set_flush_denormal(False)
        assert flushed <= 5 * ordinary
