"""Prepared kernels and the packed operators under them."""

import copy
import pickle

import pytest
import torch
from harness import integers, reals

from fastconv import _extension, ops, reference

needs_extension = pytest.mark.skipif(not _extension.available, reason="the compiled extension is missing")

DEPTHWISE = {"stride": 1, "padding": 1, "activation": "relu"}


def prepared_kernels():
    dw, pw, w3 = integers(6, 1, 3, 3), integers(6, 6, 1, 1), integers(5, 6, 3, 3)
    gate = integers(2, 6, 1, 1), None, integers(6, 2, 1, 1), None, "relu", "hardsigmoid"
    block = {"stride": 1, "padding": 1, "expand_activation": "relu", "depthwise_activation": "relu"}
    return {
        "depthwise": ops.prepare_depthwise(dw, None, **DEPTHWISE),
        "pointwise": ops.prepare_pointwise(pw, integers(6), activation="silu"),
        "fire_expand": ops.prepare_fire_expand(pw, None, w3, integers(5)),
        "fire": ops.prepare_fire(pw, None, pw, None, w3, None),
        "separable": ops.prepare_separable(dw, None, pw, None, stride=1, padding=1, depthwise_activation="relu", activation=None),
        "inverted_residual": ops.prepare_inverted_residual(pw, None, dw, None, pw, None, **block, squeeze_excite=gate),
        "stem": ops.prepare_stem(w3[:, :3], None, stride=2, padding=1, activation="relu"),
        "max_pool": ops.prepare_max_pool(2, 0, True),
        "global_avg_pool": ops.prepare_global_avg_pool(),
    }


NAMES = ("depthwise", "pointwise", "fire_expand", "fire", "separable", "inverted_residual", "stem", "max_pool", "global_avg_pool")


@pytest.mark.parametrize("name", NAMES)
def test_copies(name):
    """A prepared kernel survives pickling and copying; the copies own their tensors."""
    prepared = prepared_kernels()[name]
    x = integers(2, 3 if name == "stem" else 6, 7, 8)
    for other in (pickle.loads(pickle.dumps(prepared)), copy.deepcopy(prepared)):
        assert torch.equal(other(x), prepared(x))
        assert other.kernel == prepared.kernel
        assert len(other.tensors) == len(prepared.tensors)
        assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(other.tensors, prepared.tensors, strict=True))


@needs_extension
@pytest.mark.parametrize("name", NAMES)
def test_kernel_names_the_instruction_set(name, isa):
    assert prepared_kernels()[name].kernel == f"{name} f32 {isa}" + (" winograd" if name == "fire" else "")


@needs_extension
def test_kernel_says_why_aten_runs():
    weight = reals(6, 1, 3, 3)
    assert ops.prepare_depthwise(weight.double(), None, **DEPTHWISE).kernel == "ATen (float64 on cpu)"
    assert ops.prepare_depthwise(weight.bfloat16(), None, **DEPTHWISE).kernel == "ATen (bfloat16 on cpu)"
    assert ops.prepare_depthwise(weight, None, **DEPTHWISE | {"stride": (1, 3)}).kernel == "ATen (stride (1, 3))"
    assert ops.prepare_depthwise(weight, None, **DEPTHWISE | {"padding": 3}).kernel == "ATen (padding (3, 3) around a 3 x 3 kernel)"
    assert ops.prepare_stem(reals(4, 5, 3, 3), None, stride=2, padding=1, activation=None).kernel == "ATen (5 input channels)"
    assert ops.prepare_stem(reals(4, 3, 9, 9), None, stride=2, padding=1, activation=None).kernel == "ATen (a 9 x 9 kernel)"
    assert ops.prepare_global_avg_pool(like=weight.half()).kernel == "ATen (float16 on cpu)"


@needs_extension
def test_autocast():
    """Inside an autocast region a layer that torch runs in bfloat16 may stand before a prepared kernel."""
    weight, x = integers(4, 6, 1, 1), integers(2, 6, 5, 5)
    prepared = ops.prepare_pointwise(weight, None, activation=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prepared(x.bfloat16()), reference.pointwise(x.double(), weight.double()).float())


def test_tensors_are_snapshots():
    """Packing copies: a later change of the weight does not reach the prepared kernel, whose owner prepares anew."""
    if not _extension.available:
        pytest.skip("without the extension nothing is packed")
    weight, x = integers(4, 6, 1, 1), integers(2, 6, 5, 5)
    prepared = ops.prepare_pointwise(weight, None, activation=None)
    before = prepared(x)
    weight.zero_()
    assert torch.equal(prepared(x), before)


@needs_extension
def test_packed_layouts():
    """The documented panels and taps."""
    weight = reals(21, 5, 3, 2)
    panels = torch.ops.fastconv.pack_panels(weight)
    padded = torch.zeros(32, 5, 3, 2)
    padded[:21] = weight
    assert torch.equal(panels, padded.view(2, 16, 5, 6).permute(0, 3, 2, 1).reshape(2, 30, 16))
    taps = torch.ops.fastconv.pack_taps(weight[:, :1].expand(21, 1, 3, 2))
    assert torch.equal(taps, weight[:, 0].flatten(1).t())


def packed_calls():
    x, dw, pw, w3 = reals(2, 6, 7, 8), reals(6, 1, 3, 3), reals(4, 6, 1, 1), reals(5, 6, 3, 3)
    pack, taps = torch.ops.fastconv.pack_panels, torch.ops.fastconv.pack_taps
    square, five, seven = reals(6, 6, 1, 1), reals(6, 1, 5, 5), reals(5, 3, 7, 7)
    return {
        "pack_panels": (w3,),
        "pack_taps": (dw,),
        "depthwise_packed": (x, taps(five), reals(6), [2, 1], [2, 0], "relu"),
        "pointwise_packed": (x, pack(pw), reals(4), reals(2, 4, 7, 8), "hardswish"),
        "fire_expand_packed": (x, pack(pw), reals(4), pack(w3), reals(5)),
        "fire_packed": (x, pack(square), reals(6), pack(pw), reals(4), pack(w3), reals(5)),
        "inverted_residual_packed": (
            x, pack(square), reals(6), taps(dw), reals(6), [pack(square), reals(6), pack(square), reals(6)], pack(pw), reals(4), None,
            [2, 2], [1, 1], "relu", "relu", "relu", "sigmoid", None,
        ),
        "pack_strassen": (reals(40, 64, 1, 1),),
        "pack_digits": (reals(40, 70, 1, 1),),
        "pack_stem_winograd": (seven,),
        "stem_packed": (
            reals(2, 3, 9, 8), pack(seven), reals(5), [7, 7], [2, 2], [3, 3], "relu", torch.ops.fastconv.pack_stem_winograd(seven),
        ),
    }  # fmt: skip


PACKED = (
    "pack_panels",
    "pack_strassen",
    "pack_digits",
    "pack_stem_winograd",
    "pack_taps",
    "depthwise_packed",
    "pointwise_packed",
    "fire_expand_packed",
    "fire_packed",
    "inverted_residual_packed",
    "stem_packed",
)


@needs_extension
@pytest.mark.parametrize("name", PACKED)
def test_packed_operators(name):
    """Their fake kernels agree with them, and their output is channels_last whatever the input."""
    op, args = getattr(torch.ops.fastconv, name).default, packed_calls()[name]
    torch.library.opcheck(op, args)
    if name.endswith("_packed"):
        y = op(*args)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert not y.is_contiguous()
        assert torch.equal(op(args[0].contiguous(memory_format=torch.channels_last), *args[1:]), y)


@needs_extension
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("depthwise_packed", {0: reals(2, 7, 7, 8)}, r"depthwise: x must have 6 channels, got \(2, 7, 7, 8\)"),
        ("depthwise_packed", {0: reals(2, 6, 7, 8).double()}, "depthwise: x must be float32, got float64"),
        ("depthwise_packed", {2: reals(5)}, "depthwise: the depthwise bias must be"),
        ("depthwise_packed", {3: [1, 3]}, "depthwise: stride must be 1 or 2 along the width"),
        ("depthwise_packed", {5: "gelu"}, "depthwise: activation must be .*, got 'gelu'"),
        ("pointwise_packed", {0: reals(2, 5, 7, 8)}, r"pointwise: x must have 6 channels, got \(2, 5, 7, 8\)"),
        ("pointwise_packed", {3: reals(2, 4, 7, 7)}, "pointwise: residual must have the output's shape"),
        ("pointwise_packed", {2: reals(17)}, "pointwise: panels must be dense float32"),
        ("inverted_residual_packed", {14: "tanh"}, "inverted_residual: gate_activation must be"),
        ("stem_packed", {0: reals(2, 5, 9, 8)}, r"stem: x must have 3 channels, got \(2, 5, 9, 8\)"),
        ("stem_packed", {0: reals(2, 3, 1, 1), 5: [0, 0]}, "stem: x has no output pixels"),
        ("stem_packed", {4: [2, 1]}, "stem: winograd goes with 3 channels, a kernel 7 wide and stride 2, got 3, 7 and 1"),
        ("stem_packed", {7: reals(1, 293, 16)}, "stem: winograd must be"),
        ("pack_stem_winograd", {0: reals(5, 3, 7, 5)}, r"pack_stem_winograd: weight must be \(Cout, 3, KH, 7\), got \(5, 3, 7, 5\)"),
    ],
)
def test_packed_errors(name, change, message):
    """What C++ checks: everything that could make a kernel read outside its tensors."""
    args = [change.get(i, arg) for i, arg in enumerate(packed_calls()[name])]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastconv, name)(*args)
