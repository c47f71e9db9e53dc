"""Bad arguments: ATen's own result, or a typed error that names operator, argument, wanted and got. Never a crash, or a wrong number."""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from harness import classes, every_isa, integers, randomise_norms, reals, same
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastconv
from fastconv import _extension, models, ops, reference

X, DEPTHWISE = (2, 8, 5, 6), "must be (C, 1, 3, 3) or (C, 1, 5, 5)"

# Of each operator: shapes (tensors), other arguments, and what its messages say of a tensor that has another rank.
OPERATORS: dict[str, dict[str, Any]] = {
    "depthwise": dict(x=X, weight=(8, 1, 3, 3), bias=(8,), stride=1, padding=1, activation="relu"),
    "pointwise": dict(x=X, weight=(4, 8, 1, 1), bias=(4,), residual=(2, 4, 5, 6), activation="relu"),
    "fire_expand": dict(x=X, weight1x1=(4, 8, 1, 1), bias1x1=(4,), weight3x3=(3, 8, 3, 3), bias3x3=(3,)),
    "fire": dict(
        x=X, squeeze_weight=(2, 8, 1, 1), squeeze_bias=(2,), weight1x1=(4, 2, 1, 1), bias1x1=(4,), weight3x3=(3, 2, 3, 3), bias3x3=(3,)
    ),
    "separable": dict(
        x=X, depthwise_weight=(8, 1, 3, 3), depthwise_bias=(8,), pointwise_weight=(4, 8, 1, 1), pointwise_bias=(4,), stride=1, padding=1,
        depthwise_activation="relu", activation="relu6", residual=(2, 4, 5, 6),
    ),
    "inverted_residual": dict(
        x=X, expand_weight=(6, 8, 1, 1), expand_bias=(6,), depthwise_weight=(6, 1, 3, 3), depthwise_bias=(6,), project_weight=(8, 6, 1, 1),
        project_bias=(8,), stride=1, padding=1, activation="relu6", residual=True,
    ),
    "stem": dict(x=(2, 3, 9, 8), weight=(4, 3, 3, 3), bias=(4,), stride=2, padding=1, activation="relu"),
    "max_pool": dict(x=X, stride=2, padding=1, ceil_mode=True),
    "global_avg_pool": dict(x=X),
    "depthwise_backward_input": dict(grad=X, weight=(8, 1, 3, 3), input_size=(5, 6), stride=1, padding=1),
    "depthwise_backward_weight": dict(grad=X, x=X, kernel_size=3, stride=1, padding=1),
}  # fmt: skip
WANTED = {
    "depthwise": {"weight": DEPTHWISE},
    "pointwise": {"weight": "must be (Cout, 8, 1, 1)"},
    "fire_expand": {"weight1x1": "must be (Cout, 8, 1, 1)", "weight3x3": "must be (Cout, 8, 3, 3)"},
    "fire": {
        "squeeze_weight": "must be (Cout, 8, 1, 1)", "weight1x1": "must be (Cout, 2, 1, 1)", "weight3x3": "must be (Cout, 2, 3, 3)",
    },
    "separable": {"depthwise_weight": DEPTHWISE, "pointwise_weight": "must be (Cout, 8, 1, 1)"},
    "inverted_residual": {
        "expand_weight": "must be (Cout, 8, 1, 1)", "depthwise_weight": DEPTHWISE, "project_weight": "must be (Cout, 6, 1, 1)",
    },
    "stem": {"weight": "must be (Cout, 3, KH, KW)"},
    "depthwise_backward_input": {"weight": "must be (8, 1, KH, KW)"},
}  # fmt: skip
TENSORS = [
    (op, name) for op, arguments in OPERATORS.items() for name, value in arguments.items()
    if isinstance(value, tuple) and name != "input_size"
]  # fmt: skip
every_tensor = pytest.mark.parametrize(("op", "name"), TENSORS, ids=[f"{op}-{name}" for op, name in TENSORS])
STRIDED = [op for op, arguments in OPERATORS.items() if "stride" in arguments]


def arguments_of(op: str, draw: Callable[..., Tensor] = reals) -> dict[str, Any]:
    return {name: draw(*value) if (op, name) in TENSORS else value for name, value in OPERATORS[op].items()}


def first_of(op: str) -> str:
    return next(iter(OPERATORS[op]))


def wanted(op: str, name: str) -> str:
    shape = OPERATORS[op][name]
    if len(shape) == 1:
        return f"must be {shape}"
    if name == "residual":
        return f"must have the output's shape, {shape}"
    return WANTED.get(op, {}).get(name, "must be (N, C, H, W)")


def check_error(call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...], message: str, what: object = "") -> None:
    """`call` raises that very message."""
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message, what


# A tensor of another rank, kind, dtype, device or layout, at every place where one is taken


@every_tensor
def test_ranks(op, name):
    for rank in set(range(7)) - {len(OPERATORS[op][name])}:
        arguments, shape = arguments_of(op), (2,) * rank
        arguments[name] = reals(*shape) if rank else torch.tensor(1.0)
        check_error(partial(getattr(ops, op), **arguments), ValueError, f"{op}: {name} {wanted(op, name)}, got {shape}", rank)
        if _extension.available:  # below the public function, C++ refuses it, too
            with pytest.raises((RuntimeError, ValueError), match=rf"^{op}: (the )?{name} .*got \(") as raised:
                raw(op, arguments)
            assert str(shape) in str(raised.value).splitlines()[0]


def raw(op: str, arguments: dict[str, Any]) -> Tensor:
    pairs = {name: [value] * 2 if type(value) is int else value for name, value in arguments.items()}
    return getattr(torch.ops.fastconv, op)(*pairs.values())


@every_tensor
def test_kinds(op, name):
    good = arguments_of(op)
    tensor, first = good[name], first_of(op)
    kinds: list[tuple[object, type[Exception], str]] = [
        (value, TypeError, f"must be a Tensor, got {type(value).__name__}") for value in ([1.0], 3, "x", tensor.numpy())
    ]
    kinds += [
        (tensor.to_sparse(), TypeError, "must be a dense Tensor, got torch.sparse_coo"),
        (tensor.reshape(1, -1).to_sparse_csr(), TypeError, "must be a dense Tensor, got torch.sparse_csr"),
        (tensor.to_mkldnn(), TypeError, "must be a dense Tensor, got torch._mkldnn"),
        *(
            (torch.nested.nested_tensor([tensor], layout=layout), TypeError, "must be a dense Tensor, got a nested one")
            for layout in (torch.jagged, torch.strided)
        ),
    ]
    if name == first:
        kinds.append((None, TypeError, "must be a Tensor, got NoneType"))
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2]
    quantised = torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
    for other in (*(tensor.to(dtype) for dtype in dtypes), quantised):
        wants = "must be float16, bfloat16, float32 or float64" if name == first else f"must have {first}'s dtype, torch.float32"
        kinds.append((other, TypeError, f"{wants}, got {other.dtype}"))
    if name != first:
        kinds.append((tensor.double(), TypeError, f"must have {first}'s dtype, torch.float32, got torch.float64"))
        kinds.append((tensor.to("meta"), ValueError, f"must be on {first}'s device, cpu, got meta"))
    for value, error, message in kinds:
        check_error(partial(getattr(ops, op), **(good | {name: value})), error, f"{op}: {name} {message}", message)
        if _extension.available and isinstance(value, Tensor):
            # Whatever raw operators compute of it is ATen's; they do not crash.
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                raw(op, good | {name: value})


@pytest.mark.parametrize("op", [op for op, name in TENSORS if name in ("weight", "depthwise_weight", "pointwise_weight")])
def test_an_input_on_another_device_or_of_another_dtype(op):
    """The message is then about the first weight."""
    for change, error, message in (
        (lambda x: x.to("meta"), ValueError, "device, meta, got cpu"),
        (lambda x: x.double(), TypeError, "dtype, torch.float64, got torch.float32"),
    ):
        arguments, first = arguments_of(op), first_of(op)
        arguments[first] = change(arguments[first])
        weight = list(arguments)[1]
        wants = "be on" if error is ValueError else "have"
        check_error(partial(getattr(ops, op), **arguments), error, f"{op}: {weight} must {wants} {first}'s {message}", message)


# Shapes


@pytest.mark.parametrize("op", OPERATORS)
def test_empty_images(op):
    first = first_of(op)
    for axis in (1, 2, 3):
        shape = [*OPERATORS[op][first]]
        shape[axis] = 0
        arguments = arguments_of(op) | {first: reals(*shape)}
        check_error(partial(getattr(ops, op), **arguments), ValueError, f"{op}: {first} must have channels and pixels, got {tuple(shape)}")
    arguments = {
        name: value[:0] if isinstance(value, Tensor) and name in ("x", "grad", "residual") else value
        for name, value in arguments_of(op).items()
    }
    y, expected = getattr(ops, op)(**arguments), getattr(reference, op)(**arguments)
    assert torch.equal(y, expected)  # of an empty batch: no image, or a gradient of zeros


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if "weight" in name])
def test_shapes_of_weights(op, name):
    wants = wanted(op, name)
    if wants == DEPTHWISE:
        channels = OPERATORS[op][name][0]
        shapes = [(channels, 1, *k) for k in ((1, 3), (0, 3), (3, 5), (4, 4), (7, 7))] + [(channels, 2, 3, 3)]
        right_but_for_channels = [(channels // 2, 1, 3, 3), (2 * channels, 1, 5, 5), (0, 1, 3, 3)]
    else:
        k = (3, 3) if "3x3" in name or op in ("stem", "depthwise_backward_input") else (1, 1)
        right = OPERATORS[op][name]
        shapes = [(0, right[1], *k), (right[0], right[1] + 1, *k), (right[0], 0, *k), (*right[:2], 0, k[1])]
        shapes += [] if "KH" in wants else [(*right[:2], 1, 3), (*right[:2], 5, 5)]
        right_but_for_channels = []
    for shape in (*shapes, *right_but_for_channels):
        message = f"{op}: {name} {wants.replace('(C,', f'({channels},') if shape in right_but_for_channels else wants}, got {shape}"
        check_error(partial(getattr(ops, op), **(arguments_of(op) | {name: reals(*shape)})), ValueError, message)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if "bias" in name or name == "residual"])
def test_shapes_of_biases_and_residuals(op, name):
    right = OPERATORS[op][name]
    shapes = [(right[0] + 1,), (1,), (0,)] if len(right) == 1 else [(1, *right[1:]), (*right[:3], 1), (*right[:2], 0, 0)]
    for shape in shapes:  # torch would broadcast some
        arguments = arguments_of(op) | {name: reals(*shape)}
        check_error(partial(getattr(ops, op), **arguments), ValueError, f"{op}: {name} {wanted(op, name)}, got {shape}")


# Numbers


@pytest.mark.parametrize("name", ["stride", "padding"])
@pytest.mark.parametrize("op", STRIDED)
def test_strides_and_paddings(op, name):
    least = 1 if name == "stride" else 0
    cases: list[tuple[object, type[Exception], str]] = [
        (value, ValueError, f"must be at least {least}") for value in (least - 1, -1, -(2**31), -(2**63), -(2**70), (least, -1))
    ]
    cases += [(value, ValueError, "must be below 2^31") for value in (2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**70, (1, 2**31))]
    cases += [
        (value, TypeError, "must be an int or a pair of ints") for value in ((), (1,), (1, 1, 1), 1.0, True, "1", None, (1, None), [[1, 1]])
    ]
    for value, error, message in cases:
        arguments = arguments_of(op) | {name: value}
        check_error(partial(getattr(ops, op), **arguments), error, f"{op}: {name} {message}, got {value!r}")
        if _extension.available and type(value) is int and abs(value) < 2**63:
            with pytest.raises(RuntimeError, match=rf"^{op}: {name} must be .*got \("):
                raw(op, arguments)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, arguments in OPERATORS.items() for name in arguments if "activation" in name])
def test_activations(op, name):
    for value in ("gelu", "RELU", "relu ", "", "sigmoid", 1, b"relu", ["relu"], torch.relu):
        message = f"{op}: {name} must be one of None, relu, relu6, hardswish, hardsigmoid, silu, got {value!r}"
        check_error(partial(getattr(ops, op), **(arguments_of(op) | {name: value})), ValueError, message)


@pytest.mark.parametrize(("op", "name"), [("max_pool", "ceil_mode"), ("inverted_residual", "residual")])
@pytest.mark.parametrize("value", [1, None, "no", torch.tensor(True)])
def test_flags(op, name, value):
    message = f"{op}: {name} must be a bool, got {type(value).__name__}"
    check_error(partial(getattr(ops, op), **(arguments_of(op) | {name: value})), TypeError, message)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("max_pool", {"padding": 2}, "padding must be at most 1, half of the window, got (2, 2)"),
        ("max_pool", {"padding": (0, 2)}, "padding must be at most 1, half of the window, got (0, 2)"),
        ("inverted_residual", {"stride": 2}, "a residual needs an output of x's shape, (2, 8, 5, 6), got (2, 8, 3, 3)"),
        ("inverted_residual", {"padding": (0, 1)}, "a residual needs an output of x's shape, (2, 8, 5, 6), got (2, 8, 3, 6)"),
        ("separable", {"stride": (2, 1)}, "residual must have the output's shape, (2, 4, 3, 6), got (2, 4, 5, 6)"),
        ("depthwise_backward_input", {"input_size": (6, 6)}, "grad must have the output's shape, (2, 8, 6, 6), got (2, 8, 5, 6)"),
        ("depthwise_backward_input", {"input_size": 0}, "input_size must be at least 1, got 0"),
        ("depthwise_backward_input", {"input_size": (5,)}, "input_size must be an int or a pair of ints, got (5,)"),
        ("depthwise_backward_input", {"stride": (1, 2)}, "grad must have the output's shape, (2, 8, 5, 3), got (2, 8, 5, 6)"),
        ("depthwise_backward_weight", {"kernel_size": 5}, "grad must have the output's shape, (2, 8, 3, 4), got (2, 8, 5, 6)"),
        ("depthwise_backward_weight", {"kernel_size": (3, 0)}, "kernel_size must be at least 1, got (3, 0)"),
        ("depthwise_backward_weight", {"kernel_size": (3, 3, 3)}, "kernel_size must be an int or a pair of ints, got (3, 3, 3)"),
    ],
)
def test_arguments_that_do_not_fit_each_other(op, change, message):
    check_error(partial(getattr(ops, op), **(arguments_of(op) | change)), (TypeError, ValueError), f"{op}: {message}")


@pytest.mark.parametrize("op", ["depthwise", "separable", "stem", "max_pool", "inverted_residual"])
@pytest.mark.parametrize("stride", [2**16, (1, 2**31 - 1), (2**31 - 1, 1)])
def test_a_stride_beyond_the_image_leaves_one_pixel(op, stride):
    arguments = arguments_of(op, integers) | {"stride": stride}
    arguments |= {"residual": None} if op == "separable" else {"residual": False} if op == "inverted_residual" else {}
    assert torch.equal(getattr(ops, op)(**arguments), getattr(reference, op)(**arguments))


@pytest.mark.parametrize("op", ["depthwise", "separable", "stem"])
def test_a_padding_beyond_the_kernels(op):
    arguments = arguments_of(op, integers) | {"padding": (40, 7), "residual": None}
    if op != "separable":
        del arguments["residual"]
    assert torch.equal(getattr(ops, op)(**arguments), getattr(reference, op)(**arguments))


@pytest.mark.parametrize(("op", "size"), [("depthwise", (2, 6)), ("separable", (5, 1)), ("stem", (2, 8)), ("max_pool", (5, 2))])
def test_an_image_below_the_window(op, size):
    arguments = arguments_of(op)
    arguments |= {"x": reals(*OPERATORS[op]["x"][:2], *size), "padding": 0} | ({"ceil_mode": False} if op == "max_pool" else {})
    shape = tuple(arguments["x"].shape)
    message = f"{op}: the output would have no pixels: input {shape}, kernel (3, 3), padding (0, 0)"
    check_error(partial(getattr(ops, op), **arguments), ValueError, message)


@pytest.mark.parametrize("op", ["depthwise", "stem", "separable", "inverted_residual"])
def test_an_output_larger_than_memory(op):
    """2^66 bytes and more: the product of its sizes does not fit into 64 bits."""
    arguments = arguments_of(op) | {"padding": 2**31 - 1}
    arguments |= {"residual": None} if op == "separable" else {"residual": False} if op == "inverted_residual" else {}
    with pytest.raises((RuntimeError, MemoryError)):
        getattr(ops, op)(**arguments)


def test_batches_and_channels_without_memory_of_their_own():
    """2^33 images in the memory of one: their output has none."""
    with pytest.raises((RuntimeError, MemoryError)):
        ops.depthwise(reals(1, 8, 5, 6).expand(2**33, -1, -1, -1), reals(8, 1, 3, 3))
    with pytest.raises((RuntimeError, MemoryError)):
        ops.pointwise(reals(1, 1, 1, 1).expand(2**31, 1, 2**20, 1), reals(2**10, 1, 1, 1))


# Views


def views(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors of t's shape that are no fresh contiguous ones; their values are whatever they are."""
    n = t.numel()
    yield "one float off", torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    odd = torch.frombuffer(bytearray(4 * n + 1), dtype=torch.float32, offset=1).view(t.shape)
    assert odd.data_ptr() % 4
    yield "one byte off", odd.copy_(t)
    yield "every second", t.repeat_interleave(2, 0)[::2]
    yield "backwards in memory", t.flip(0).contiguous().flip(0) if t.dim() == 1 else t.transpose(0, -1).contiguous().transpose(0, -1)
    yield "a crop", nn.functional.pad(t, (2, 3), value=torch.nan)[..., 2 : 2 + t.shape[-1]]
    yield "negated", torch._neg_view(-t)
    yield "imaginary part of a conjugate", torch.complex(t, -t).conj().imag
    yield "expanded", t[:1].expand_as(t)
    yield "one number", t.flatten()[0].expand_as(t)
    yield "overlapping", t.new_tensor(range(n)).div(n).as_strided(t.shape, [1] * t.dim())


@every_tensor
@every_isa
def test_views(op, name):
    good = arguments_of(op)
    for what, view in views(good[name]):
        before = view.clone()
        y = getattr(ops, op)(**(good | {name: view}))
        assert same(y, getattr(ops, op)(**(good | {name: before.contiguous()}))), what
        assert torch.equal(view, before), what
        y.zero_()
        assert torch.equal(view, before), f"{what}: the output lies in the input's memory"


@pytest.mark.parametrize("stride", [(1, 3), (3, 3), (1, 1)])
@pytest.mark.parametrize("height", [1, 2])
def test_one_channel_of_several(height, stride):
    """Beyond the kernels at stride 3, where ATen's own convolution takes wrong pixels of such a view (torch 2.13)."""
    x, weight = integers(1, 4, height, 5).contiguous(memory_format=torch.channels_last)[:, 1:2], integers(1, 1, 5, 5)
    y = ops.depthwise(x, weight, stride=stride, padding=(2, 0))
    assert torch.equal(y.double(), reference.depthwise(x.contiguous().double(), weight.double(), stride=stride, padding=(2, 0)))


@pytest.mark.parametrize("op", OPERATORS)
def test_outputs_alias_no_input(op):
    arguments = arguments_of(op)
    y = getattr(ops, op)(**arguments)
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    assert y.untyped_storage().data_ptr() not in {tensor.untyped_storage().data_ptr() for tensor in tensors}


@every_isa
def test_one_tensor_in_several_places():
    x, square = reals(2, 8, 5, 6), reals(8, 8, 1, 1)
    assert torch.equal(ops.pointwise(x, square, residual=x), ops.pointwise(x, square, residual=x.clone()))
    weight = reals(8, 1, 3, 3)
    assert torch.equal(ops.depthwise(x, weight, weight[:, 0, 0, 0]), ops.depthwise(x, weight, weight[:, 0, 0, 0].clone()))
    own = reals(8, 8, 1, 1)
    assert torch.equal(ops.pointwise(own, own), ops.pointwise(own.clone(), own))


@pytest.mark.parametrize("op", OPERATORS)
def test_meta_and_fake_tensors_have_the_real_shape(op):
    arguments = arguments_of(op)
    y = getattr(ops, op)(**arguments)
    meta = getattr(ops, op)(**{name: value.to("meta") if isinstance(value, Tensor) else value for name, value in arguments.items()})
    assert (meta.shape, meta.dtype, meta.device.type) == (y.shape, y.dtype, "meta")
    mode = FakeTensorMode()
    with mode:
        fake = getattr(ops, op)(**{n: mode.from_tensor(value) if isinstance(value, Tensor) else value for n, value in arguments.items()})
    assert (fake.shape, fake.stride(), fake.device.type) == (y.shape, y.stride(), "cpu")


# Layers: what the torch module that a layer replaces does


def outcome(call: Callable[[], Any]) -> Any:
    """The result, or the error: one that tells what is wrong."""
    try:
        return call()
    except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
        return error


def inputs(channels: int) -> Iterator[tuple[str, object]]:
    good = reals(2, channels, 7, 6)
    for rank in (0, 1, 2, 3, 5, 6):
        yield f"rank {rank}", reals(*(channels if axis == rank - 3 else 5 for axis in range(rank)))
    for shape in ((0, channels, 7, 6), (2, 0, 7, 6), (2, channels, 0, 6), (2, channels, 7, 0), (2, channels + 1, 7, 6), (2, 1, 7, 6)):
        yield f"shape {shape}", reals(*shape)
    yield "one pixel", reals(2, channels, 1, 1)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8, torch.bool, torch.complex64):
        yield str(dtype), good.to(dtype)
    yield "sparse", good.to_sparse()
    yield "mkldnn", good.to_mkldnn()
    yield "quantised", torch.quantize_per_tensor(good, 0.1, 0, torch.quint8)
    yield "nested", torch.nested.nested_tensor([good[0], good[1]])
    yield "a list", [good]
    yield "None", None
    yield from ((what, view) for what, view in views(good) if what != "one number")  # whose variance is rounding alone


def layers() -> dict[str, tuple[nn.Module, nn.Module, int]]:
    """Ours, torch's, and the channels they take."""
    fire = fastconv.nn.Fire(4, 3, 5, 6)
    block = fastconv.nn.InvertedResidual(4, 4, 1, 3)
    separable = fastconv.nn.DepthwiseSeparable(4, 6, stride=2)
    stem = fastconv.nn.Conv2dNormActivation(3, 8, 3, 2)
    made = {
        "DepthwiseConv2d": (fastconv.nn.DepthwiseConv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 3, padding=1, groups=4), 4),
        "PointwiseConv2d": (fastconv.nn.PointwiseConv2d(4, 6, 1), nn.Conv2d(4, 6, 1), 4),
        "Fire": (fire, Plain(fire), 4),
        "InvertedResidual": (block, Plain(block), 4),
        "DepthwiseSeparable": (separable, Plain(separable), 4),
        "Conv2dNormActivation": (stem, nn.Sequential(*stem), 3),
    }
    for ours, theirs, _ in made.values():
        randomise_norms(ours)
        if isinstance(theirs, nn.Conv2d):
            theirs.load_state_dict(ours.state_dict())
    return made


class Plain(nn.Module):
    """The modules of one of our blocks, called one after another by torch alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        block = self.block
        if isinstance(block, fastconv.nn.Fire):
            y = block.squeeze_activation(block.squeeze(x))
            return torch.cat([torch.relu(block.expand1x1(y)), torch.relu(block.expand3x3(y))], 1)
        if isinstance(block, fastconv.nn.InvertedResidual):
            y = x
            for part in block.conv:
                for module in part if isinstance(part, nn.Sequential) else [part]:
                    y = module(y)
            return x + y if block.use_res_connect else y
        y = block.act1(block.bn1(block.conv_dw(x)))
        return block.act2(block.bn2(block.conv_pw(y)))


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("mode", ["inference", "gradients", "training"])
def test_layers_take_what_torchs_take(kind, mode):
    ours, theirs, channels = layers()[kind]
    ours.train(mode == "training")
    theirs.train(mode == "training")
    with torch.set_grad_enabled(mode != "inference"):
        for what, x in inputs(channels):
            same_outcome(outcome(partial(ours, x)), outcome(partial(theirs, x)), what)


def same_outcome(ours: Any, theirs: Any, what: str) -> None:
    """Both give the same numbers, or both refuse."""
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        assert isinstance(ours, Exception) == isinstance(theirs, Exception), f"{what}: ours {ours!r}, torch's {theirs!r}"
        assert str(ours), what
    else:
        assert (ours.dtype, ours.layout) == (theirs.dtype, theirs.layout), what
        ours, theirs = (y.to_dense() if y.is_mkldnn else y for y in (ours, theirs))
        tolerance = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 0.05
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{what}: {text}")


# optimize


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 6, 1),
    ).eval()  # fmt: skip


def test_an_optimized_model_takes_what_the_model_takes():
    model = small()
    randomise_norms(model)
    fast = fastconv.optimize(model)
    with torch.no_grad():
        for what, x in inputs(3):
            same_outcome(outcome(partial(fast, x)), outcome(partial(model, x)), what)


NORMS: dict[str, Callable[[nn.BatchNorm2d], object]] = {
    "NaN variance": lambda norm: norm.running_var[2:3].fill_(torch.nan),
    "infinite variance": lambda norm: norm.running_var[2:3].fill_(torch.inf),
    "negative variance": lambda norm: norm.running_var[2:3].fill_(-1),
    "negative variance above -eps": lambda norm: norm.running_var[2:3].fill_(-5e-6),
    "no variance": lambda norm: norm.running_var.zero_(),
    "denormal variance": lambda norm: norm.running_var.fill_(1e-42),
    "NaN mean": lambda norm: norm.running_mean[2:3].fill_(torch.nan),
    "infinite weight": lambda norm: norm.weight[2:3].fill_(torch.inf),
    "no weight": lambda norm: norm.weight.zero_(),
    "neither eps nor variance": lambda norm: (setattr(norm, "eps", 0.0), norm.running_var[2:3].zero_()),
    "eps 0": lambda norm: setattr(norm, "eps", 0.0),
    "large eps": lambda norm: setattr(norm, "eps", 1e3),
}


@pytest.mark.parametrize("place", [1, 4])
@pytest.mark.parametrize("change", NORMS)
@torch.no_grad()
def test_strange_norms_fold_to_atens_result(change, place):
    model = small()
    randomise_norms(model)
    NORMS[change](model[place])
    fast, x = fastconv.optimize(model), reals(2, 3, 9, 8)
    for y, expected in ((fast(x), model(x)), (fastconv.optimize(model, exact=True)(x), model(x))):
        assert torch.equal(classes(y), classes(expected))
        scale = expected.nan_to_num(0, 0, 0).abs().max()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * float(scale), equal_nan=True)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"affine": False, "track_running_stats": False}])
@torch.no_grad()
def test_norms_without_weights_or_statistics(options):
    model = small()
    model[1], model[4] = nn.BatchNorm2d(8, **options), nn.BatchNorm2d(8, **options)
    randomise_norms(model.eval())
    x = reals(2, 3, 9, 8)
    torch.testing.assert_close(fastconv.optimize(model)(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_negative_eps_is_atens_error():
    model = small()
    model[1].eps = -0.4
    check_error(lambda: fastconv.optimize(model)(reals(1, 3, 9, 8)), ValueError, str(outcome(lambda: model(reals(1, 3, 9, 8)))))


def replaced(place: int, name: str, change: Callable[[Tensor], Tensor]) -> nn.Module:
    model = small()
    part = model[place]
    if name in part._buffers:
        part._buffers[name] = change(part._buffers[name])
    else:
        setattr(part, name, nn.Parameter(change(getattr(part, name).detach()), requires_grad=False))
    return model


@pytest.mark.parametrize(
    ("place", "name", "change", "error", "message"),
    [
        (6, "bias", lambda t: reals(7), ValueError, "optimize: bias must be (6,), got (7,)"),
        (6, "bias", lambda t: reals(6, 1), ValueError, "optimize: bias must be (6,), got (6, 1)"),
        (1, "running_var", lambda t: t[:4], ValueError, "optimize: running_var must be (8,), got (4,)"),
        (1, "running_mean", lambda t: t[:1], ValueError, "optimize: running_mean must be (8,), got (1,)"),
        (4, "weight", lambda t: reals(9), ValueError, "optimize: weight must be (8,), got (9,)"),
        (4, "bias", lambda t: torch.tensor(1.0), ValueError, "optimize: bias must be (8,), got ()"),
        (0, "weight", lambda t: t.to_sparse(), TypeError, "optimize: 0.weight must be a dense Tensor, got torch.sparse_coo"),
        (6, "weight", lambda t: t.to_mkldnn(), TypeError, "optimize: 6.weight must be a dense Tensor, got torch._mkldnn"),
        (1, "running_var", lambda t: t.to_sparse(), TypeError, "optimize: 1.running_var must be a dense Tensor, got torch.sparse_coo"),
    ],
)
def test_tensors_that_do_not_fit_their_module(place, name, change, error, message):
    check_error(lambda: fastconv.optimize(replaced(place, name, change)), error, message)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, lambda t: t[:, :2]),
        (3, lambda t: t[:4]),
        (3, lambda t: t[..., :1]),
        (6, lambda t: t[:, :7]),
        (0, lambda t: t[:0]),
        (6, lambda t: t[0]),
    ],
)
@torch.no_grad()
def test_weights_that_do_not_fit_are_refused_or_atens_result(place, change):
    model, x = replaced(place, "weight", change), reals(1, 3, 9, 8)
    same_outcome(outcome(lambda: fastconv.optimize(model)(x)), outcome(partial(model, x)), str(place))


# Checkpoints (see also tests/test_models.py)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return models.squeezenet1_1(num_classes=3).state_dict()


def load(path) -> nn.Module:
    return models.squeezenet1_1(weights=path, num_classes=3)


LAST = "classifier.1.bias"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.empty(3, device="meta"), "must hold dense tensors, 'classifier.1.bias' is on the meta device"),
        (torch.ones(3).to_sparse(), "must hold dense tensors, 'classifier.1.bias' is torch.sparse_coo"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "must hold dense tensors, 'classifier.1.bias' is torch.qint8"),
        (torch.ones(3, dtype=torch.int8), "does not fit: classifier.1.bias is torch.int8 and must be floating point"),
        (torch.ones(3, dtype=torch.complex64), "does not fit: classifier.1.bias is torch.complex64 and must be floating point"),
        (torch.zeros(1).expand(2**40), "does not fit: classifier.1.bias is (1099511627776,) and must be (3,)"),
        (torch.zeros(3, 0), "does not fit: classifier.1.bias is (3, 0) and must be (3,)"),
    ],
)
def test_a_checkpoint_with_a_strange_tensor(value, message, state, tmp_path):
    path = tmp_path / "strange.pth"
    torch.save({**state, LAST: value}, path)
    prefix = "squeezenet1_1" if "does not fit" in message else "weights"
    check_error(lambda: load(path), ValueError, f"{prefix}: {path} {message}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_another_floating_dtype_is_cast(dtype, state, tmp_path):
    torch.save({key: value.to(dtype) for key, value in state.items()}, tmp_path / "cast.pth")
    model = load(tmp_path / "cast.pth")
    assert all(torch.equal(value, state[key].to(dtype).float()) for key, value in model.state_dict().items())


def header(data: bytes, text: str | None = None, length: int | None = None) -> bytes:
    """A safetensors file with another header, or another length of it."""
    size = struct.unpack("<Q", data[:8])[0]
    old, rest = data[8 : 8 + size].decode(), data[8 + size :]
    text = old if text is None else text
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + rest


BIAS = re.compile(rf'"{re.escape(LAST)}":\{{[^}}]*\}}')


def declared(text: str) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        return header(data, BIAS.sub(f'"{LAST}":{text}', data[8 : 8 + size].decode()))

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: header(data, length=2**63 - 1),
        lambda data: header(data, length=2**64 - 1),
        lambda data: header(data, length=10**12),
        lambda data: header(data, text="{}"),
        lambda data: header(data, text="[" * 100_000),
        lambda data: header(data, text="\x00"),
        declared('{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}'),
        declared('{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,12]}'),
        declared('{"dtype":"F32","shape":[-3],"data_offsets":[0,12]}'),
        declared('{"dtype":"F32","shape":[3],"data_offsets":[12,0]}'),
        declared('{"dtype":"F32","shape":[3],"data_offsets":[18446744073709551615,18446744073709551615]}'),
        declared('{"dtype":"F31","shape":[3],"data_offsets":[0,12]}'),
        declared("null"),
    ],
    ids=[
        "header of 2^63 bytes", "of 2^64", "of a terabyte", "of none", "of brackets", "of no JSON", "terabytes of data", "2^64 elements",
        "negative shape", "negative length", "offsets of 2^64", "unknown dtype", "no description",
    ],
)  # fmt: skip
def test_a_safetensors_header_that_lies(spoil, state, tmp_path):
    path = tmp_path / "lies.safetensors"
    path.write_bytes(spoil(safetensors_bytes(state)))
    with pytest.raises(ValueError, match=rf"^weights: {re.escape(str(path))} cannot be read, it may be truncated: .+$"):
        load(path)


@pytest.mark.parametrize("name", ["folder.pth", "folder.safetensors"])
def test_a_folder_is_no_checkpoint(name, tmp_path):
    (tmp_path / name).mkdir()
    check_error(lambda: load(tmp_path / name), FileNotFoundError, f"weights: no such file: {tmp_path / name}")


def test_a_checkpoint_of_another_format_under_the_wrong_name(state, tmp_path):
    (tmp_path / "a.pth").write_bytes(safetensors_bytes(state))
    torch.save(state, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        with pytest.raises(ValueError, match=rf"^weights: .*{name} (cannot be read, it may be truncated|is damaged or holds more)"):
            load(tmp_path / name)


# Operators below the public ones


@pytest.mark.skipif(not _extension.available, reason="compiled operators")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.training_means(reals(2, 8, 5, 0), reals(4, 8), "relu"), "training_means: y must have pixels, got (2, 8, 5, 0)"),
        (lambda o: o.pack_panels(torch.empty(2**62, 0, 1, 1)), f"pack_panels: weight must be (Cout, Cin, KH, KW), got ({2**62}, 0, 1, 1)"),
        (lambda o: o.pack_taps(torch.empty(2**62, 1, 0, 3)), f"pack_taps: weight must be (C, 1, K, K), got ({2**62}, 1, 0, 3)"),
        (lambda o: o.depthwise(reals(2, 0, 5, 5), reals(0, 1, 3, 3)), "depthwise: x must have channels, got (2, 0, 5, 5)"),
        (lambda o: o.network(reals(1, 3, 5, 5), [], "fastconv 2"), "network: the program has no steps"),
        (lambda o: o.network(reals(1, 3, 5, 5), [], "fastconv 2;"), "network: the program has no steps"),
        (lambda o: o.program_new([], "fastconv 2"), "network: the program has no steps"),
    ],
)
def test_private_operators(call, message):
    with pytest.raises(RuntimeError) as raised:
        call(torch.ops.fastconv)
    assert str(raised.value).splitlines()[0] == message
