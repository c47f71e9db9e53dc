"""Bugs that other libraries' users met, each as a test of ours: what went wrong there, in the scenario in which it did.

A reference is owner/repository#issue, or PR and its number. GPU kernels are checked without a GPU: how they are launched, by a driver that
records; and their sources.
"""

import ast
import copy
import io
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import ACTIVATIONS, channels_last, every_isa, integers, reals, sparse
from torch import nn

import fastconv
from fastconv import _extension, ops, reference

ROOT = Path(__file__).parent.parent
needs_kernels = pytest.mark.skipif(not _extension.available or _extension.backend() != "auto", reason="needs the compiled extension")

OPERATORS = ["depthwise", "pointwise", "fire_expand", "fire", "separable", "inverted_residual", "stem", "max_pool", "global_avg_pool"]


def arguments(name, draw=reals, c=8, size=(9, 7), n=2):
    """Positional arguments of an operator, x first."""
    wide = 2 * c
    return {
        "depthwise": (draw(n, c, *size), draw(c, 1, 3, 3), draw(c)),
        "pointwise": (draw(n, c, *size), draw(wide, c, 1, 1), draw(wide)),
        "fire_expand": (draw(n, c, *size), draw(wide, c, 1, 1), draw(wide), draw(c, c, 3, 3), draw(c)),
        "fire": (draw(n, c, *size), draw(4, c, 1, 1), draw(4), draw(wide, 4, 1, 1), draw(wide), draw(c, 4, 3, 3), draw(c)),
        "separable": (draw(n, c, *size), draw(c, 1, 3, 3), draw(c), draw(wide, c, 1, 1), draw(wide)),
        "inverted_residual": (
            draw(n, c, *size), draw(wide, c, 1, 1), draw(wide), draw(wide, 1, 3, 3), draw(wide), draw(c, wide, 1, 1), draw(c),
        ),
        "stem": (draw(n, 3, *size), draw(c, 3, 3, 3), draw(c)),
        "max_pool": (draw(n, c, *size),),
        "global_avg_pool": (draw(n, c, *size),),
    }[name]  # fmt: skip


def call(name, *args, **options):
    return getattr(ops, name)(*args, **options)


def specification(name, *args, **options):
    return getattr(reference, name)(*args, **options)


# Sizes


@needs_kernels
@every_isa
def test_pytorch_152816_depthwise_past_2_31_elements():
    """pytorch#152816: a depthwise convolution fails above 2^31 elements. (More: test_large.py.)"""
    step, rows = 2**19, 5
    x = sparse(1, 32, step * (rows - 1) + 3, 32)
    assert x.numel() > 2**31
    weight = integers(32, 1, 3, 3)
    for row in range(rows):
        x[:, :, row * step : row * step + 3] = integers(1, 32, 3, 32)
    y = ops.depthwise(x, weight, stride=(step, 2), padding=(0, 1))
    for row in range(rows):
        alone = ops.depthwise(x[:, :, row * step : row * step + 3].contiguous(), weight, stride=(1, 2), padding=(0, 1))
        assert torch.equal(y[:, :, row : row + 1], alone)
        assert alone.any()


HUGE = """
import json, sys
sys.path[:0] = [{tests!r}, {gpu!r}]
import torch, driver
driver.install()
from harness import sparse
from fastconv.kernels.gpu import launch, staged, staged_fire
import importlib
bf16 = torch.bfloat16
def weight(*shape):
    return launch.kernel_order(torch.zeros(shape, dtype=bf16))
def calls(x):
    c = x.shape[1]
    yield "depthwise", (x, weight(c, 1, 3, 3), None)
    yield "pointwise", (x, weight(8, c, 1, 1), None)
    yield "fire_expand", (x, weight(8, c, 1, 1), None, weight(8, c, 3, 3), None)
    yield "separable", (x, weight(c, 1, 3, 3), None, weight(8, c, 1, 1), None)
    yield "inverted_residual", (x, weight(16, c, 1, 1), None, weight(16, 1, 3, 3), None, weight(8, 16, 1, 1), None)
    yield "fire", (x, weight(16, c, 1, 1), None, weight(8, 16, 1, 1), None, weight(8, 16, 3, 3), None)
    yield "head", (x, weight(8, c, 1, 1), None, "relu")
    yield "global_avg_pool", (x,)
    yield "depthwise_backward_input", (x, weight(c, 1, 3, 3), (2 * x.shape[2], 2 * x.shape[3]), (2, 2), (1, 1))
    yield "depthwise_backward_weight", (x, x, (3, 3), (1, 1), (1, 1))
found = []
for shape in {shapes}:
    for name, args in calls(sparse(*shape, dtype=bf16)):
        module = importlib.import_module("fastconv.kernels.gpu." + ("depthwise_backward" if "backward" in name else name))
        getattr(module, name)(*args)
        kernels = {{name + "_kernel": module, "staged_kernel": staged, "staged_fire_kernel": staged_fire}}
        kernel, launched = next(launch for launch in reversed(driver.launches) if launch[0] in kernels)
        bound = dict(zip(getattr(kernels[kernel], kernel).arg_names, launched[9:]))
        found.append([shape, name, launched[:3], bound.get("WIDE")])
print(json.dumps(found))
"""
SHAPES = ((1, 64, 5824, 5824), (70000, 64, 24, 24), (1, 2**17, 2, 2))  # one image, many images, many channels


@pytest.fixture(scope="module")
def launches():
    """[shape, operation, grid, whether the kernel was told of an image past 2^31] of every Triton kernel on huge images."""
    pytest.importorskip("triton")
    code = HUGE.format(tests=str(ROOT / "tests"), gpu=str(ROOT / "tests/gpu"), shapes=SHAPES)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"FASTCONV_BACKEND": "triton"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_cutlass_pr_2651_gpu_addresses_past_int32(launches):
    """NVIDIA/cutlass PR 2651: a convolution's addresses overflow int32. Kernels are told of an image past 2^31 elements, and of no other;
    pointwise has no such switch, for its addresses are always wide."""
    assert len(launches) == 10 * len(SHAPES)
    for shape, name, _, wide in launches:
        image = torch.Size(shape[1:]).numel()
        assert wide == (None if name == "pointwise" else image > 2**31 - 1), (shape, name)


def jitted():
    """Every function of the Triton kernels that is compiled: (file and name, syntax tree, source)."""
    for path in sorted((ROOT / "kernels/gpu").glob("*.py")):
        source = path.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield f"{path.name}:{node.name}", node, ast.get_source_segment(source, node)


def test_flash_linear_attention_pr_1082_triton_offsets_stay_int32():
    """fla-org/flash-linear-attention PR 1082, triton#1058, #832: products of a program's number with sizes stay int32.

    In every kernel: the image or the first pixel, a quotient of the program's number, is int64 before anything is multiplied by it; and a
    function that is told of images past 2^31 (WIDE) widens with it, itself or through march.place."""
    small = ("depthwise_backward.py:depthwise_backward_sum_kernel",)  # of partial sums, whose number PROGRAMS bounds
    kernels = switched = 0
    for name, node, source in jitted():
        firsts = [part for part in ast.walk(node) if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) in ("n", "start")]
        source = source.replace("gl.", "tl.")  # Gluon's name for the same
        assert all(".to(tl.int64)" in ast.unparse(part.value).replace("gl.", "tl.") for part in firsts), name
        if "tl.program_id" in source and name not in small:
            assert firsts, name
            kernels += 1
        if any(argument.arg == "WIDE" for argument in node.args.args):
            tests = [part for part in ast.walk(node) if isinstance(part, ast.If) and "WIDE" in ast.unparse(part.test)]
            handed_on = [part for part in ast.walk(node) if isinstance(part, ast.Call) and "WIDE" in map(ast.unparse, part.args)]
            assert tests or handed_on, name
            assert all("l.int64" in ast.unparse(part.body) or "l.int32" in ast.unparse(part.orelse) for part in tests), name
            switched += 1
    assert kernels >= 12
    assert switched >= 10


def test_causal_conv1d_32_2_16_channels_exceed_the_grid(launches):
    """causal-conv1d#32: 2^16 channels exceed grid.y. Our grids have one dimension, whose limit is 2^31 - 1."""
    for shape, name, (x, y, z), _ in launches:
        assert (y, z) == (1, 1), (shape, name)
        assert 0 < x < 2**31, (shape, name, x)
    assert max(x for _, _, (x, _, _), _ in launches) > 2**16


EXTREMES = (0, -1, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))


def test_xnnpack_10781_size_products_wrap():
    """google/XNNPACK PR 10781, 10985, 10789: products of sizes wrap, and the heap is written out of bounds.

    Strides and paddings from the extremes of int64: ATen's result, or an error that names the operator; shapes of a fake image, too."""
    x, weight = integers(1, 8, 5, 5), integers(8, 1, 3, 3)
    for stride, padding in itertools.product(EXTREMES, EXTREMES):
        if padding in (2**16, 2**31 - 1):  # allowed, and a result of their size: on the meta device below
            continue
        valid = 1 <= stride < 2**31 and padding == 0
        if valid:
            assert torch.equal(
                ops.depthwise(x, weight, stride=stride, padding=padding), reference.depthwise(x, weight, stride=stride, padding=0)
            )
            continue
        with pytest.raises((ValueError, RuntimeError), match=r"depthwise: (stride|padding) must be"):
            torch.ops.fastconv.depthwise(x, weight, None, [1, stride], [0, padding])
        for name, *more in (("separable", None, integers(4, 8, 1, 1), None), ("depthwise",)):
            with pytest.raises(ValueError, match=rf"{name}: (stride|padding) must be"):
                call(name, x, weight, *more, stride=stride, padding=padding)
    meta = torch.empty(4, 8, 2**20, 2**10, device="meta")
    y = ops.depthwise(meta, weight.to("meta"), stride=(2, 1), padding=(2**31 - 1, 2**16))
    assert y.shape == (4, 8, (2**20 + 2 * (2**31 - 1) - 3) // 2 + 1, 2**10 + 2**17 - 2)


def test_xnnpack_11118_filter_dimensions_are_checked():
    """google/XNNPACK#11118: a filter's dimensions are not checked against the image's, and the heap is read out of bounds."""
    shapes = [
        (),
        (8,),
        (8, 1),
        (8, 1, 3),
        (8, 1, 3, 3, 1),
        (7, 1, 3, 3),
        (9, 1, 3, 3),
        (8, 2, 3, 3),
        (8, 1, 3, 5),
        (8, 1, 1, 1),
        (0, 1, 3, 3),
    ]
    for name in OPERATORS[:7]:
        args = arguments(name)
        for i, shape in itertools.product(
            [i for i, arg in enumerate(args) if i and arg.dim() == 4], [*shapes, (16, 7, 1, 1), (16, 9, 3, 3)]
        ):
            spoiled = list(args)
            spoiled[i] = torch.ones(shape)
            with pytest.raises((ValueError, RuntimeError), match=f"^{name}: "):
                call(name, *spoiled)
            with pytest.raises((ValueError, RuntimeError), match=f"{name}: "):
                getattr(torch.ops.fastconv, name)(*spoiled)


GUARDED = """
import ctypes, mmap, sys
import torch
from fastconv import ops
from threadpoolctl import threadpool_info
extension = sys.modules["fastconv._C"]
libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE
pages = mmap.mmap(-1, SIZE + PAGE)
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
assert libc.mprotect(ctypes.c_void_p(start + SIZE), PAGE, 0) == 0  # whoever reads past the end ends the process
whole = torch.frombuffer(pages, dtype=torch.float32, count=SIZE // 4)
def guarded(tensor):
    "The same numbers, the last of them at the unmapped page."
    flat = tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 and tensor.shape[0] == 1 else tensor
    there = whole[whole.numel() - flat.numel():].view(flat.shape).copy_(flat)
    return there.permute(0, 3, 1, 2) if flat is not tensor else there
checked = 0
for isa in extension.isas():
    extension.set_isa(isa)
    for c in range(1, 66):
        x, taps, weight, bias = torch.randn(1, c, 5, 3), torch.randn(c, 1, 3, 3), torch.randn(c, c, 1, 1), torch.randn(c)
        convolutions = (ops.depthwise, (x, taps, bias)), (ops.pointwise, (x, weight, bias))
        for call, args in (*convolutions, (ops.max_pool, (x,)), (ops.global_avg_pool, (x,))):
            plain = call(*args)
            for i in range(len(args)):
                assert torch.equal(call(*args[:i], guarded(args[i]), *args[i + 1:]), plain), (isa, c, call)
                checked += 1
print(checked, sum(library["user_api"] == "openmp" for library in threadpool_info()))
"""


@pytest.fixture(scope="module")
def guarded():
    """(how many calls at an unmapped page were right, how many OpenMP runtimes the process held)."""
    if not _extension.available:
        pytest.skip("needs the compiled extension")
    pytest.importorskip("threadpoolctl")
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr[-4000:])
    return tuple(map(int, done.stdout.split()))


def test_xnnpack_4190_tails_read_past_the_tensor(guarded):
    """google/XNNPACK#4190: the AVX2 tail reads past the tensor. 1 to 65 channels, each argument ending at an unmapped page, every ISA."""
    assert guarded[0] == len(sys.modules["fastconv._C"].isas()) * 65 * 8


@every_isa
def test_onednn_5080_wrong_only_at_padded_columns():
    """oneDNN#5080: results are wrong only in padded columns, on one instruction set. Borders are compared apart from the interior."""
    for width, k in itertools.product((1, 2, 3, 6, 7, 8, 13, 14, 15, 17, 29), (3, 5)):
        x, weight, dense = integers(1, 18, 6, width), integers(18, 1, k, k), integers(17, 18, 3, 3)
        pad = k // 2
        pairs = [(ops.depthwise(x, weight, padding=pad), reference.depthwise(x, weight, padding=pad))]
        pairs.append(
            (ops.fire_expand(x, dense[:, :, :1, :1], None, dense, None), reference.fire_expand(x, dense[:, :, :1, :1], None, dense, None))
        )
        pairs.append((ops.stem(x[:, :3], dense[:, :3], stride=1), reference.stem(x[:, :3], dense[:, :3], stride=1)))
        for y, wanted in pairs:
            for column in {*range(min(pad, width)), *range(max(0, width - pad), width)}:
                assert torch.equal(y[..., column], wanted[..., column]), (width, k, column)
            assert torch.equal(y[..., pad : width - pad], wanted[..., pad : width - pad]), (width, k)


@every_isa
def test_onednn_6035_backward_weights_with_fewer_channels_than_a_block():
    """oneDNN#6035: the weight gradient of a 1x1 convolution with fewer channels than a block writes past its workspace."""
    before = torch.get_num_threads()
    try:
        for channels, outputs, threads in itertools.product((1, 3, 15), (1, 17), (1, 2, 4)):
            torch.set_num_threads(threads)
            block = nn.Sequential(nn.Conv2d(channels, outputs, 1), nn.ReLU())
            block[0].weight.data, block[0].bias.data = integers(outputs, channels, 1, 1), integers(outputs)
            ours = fastconv.replace(copy.deepcopy(block))
            x, grad = integers(2, channels, 5, 6), integers(2, outputs, 5, 6)
            layer = fastconv.nn.PointwiseConv2d(channels, outputs, 1)
            layer.load_state_dict(block[0].state_dict())
            block(x).backward(grad)
            ours(x).backward(grad)
            layer(x).relu().backward(grad)
            for got in (ours[0], layer):
                assert torch.equal(got.weight.grad, block[0].weight.grad), (channels, outputs, threads)
                assert torch.equal(got.bias.grad, block[0].bias.grad)
    finally:
        torch.set_num_threads(before)


@every_isa
def test_mnn_2291_tiny_images():
    """alibaba/MNN#2291: depthwise is wrong at H = 2, W = 1."""
    for h, w, k, stride, c in itertools.product((1, 2, 3), (1, 2, 3), (3, 5), (1, 2), (3, 16)):
        x, weight = integers(1, c, h, w), integers(c, 1, k, k)
        options = {"stride": stride, "padding": k // 2}
        assert torch.equal(ops.depthwise(x, weight, **options), reference.depthwise(x, weight, **options)), (h, w, k, stride)


@every_isa
def test_tnn_211_kernels_that_are_not_square():
    """Tencent/TNN#211: the kernel's height is used for its width. Refused, or right."""
    x = integers(2, 3, 9, 8)
    for kernel in ((3, 5), (5, 3), (1, 3)):
        with pytest.raises(ValueError, match="depthwise: weight must be"):
            ops.depthwise(x, integers(3, 1, *kernel))
        weight = integers(8, 3, *kernel)
        assert torch.equal(ops.stem(x, weight), reference.stem(x, weight))
        layer = fastconv.nn.DepthwiseConv2d(3, 3, kernel, groups=3, padding=(kernel[0] // 2, kernel[1] // 2))
        layer.weight.data, layer.bias.data = integers(3, 1, *kernel), integers(3)
        with torch.no_grad():
            assert torch.equal(layer(x), torch.conv2d(x, layer.weight, layer.bias, 1, layer.padding, groups=3))


@every_isa
def test_pytorch_82060_layouts_that_strides_do_not_tell():
    """pytorch#82060: a channels_last weight with C = 1 gives wrong results in silence: its strides are ambiguous."""
    for c, (h, w) in itertools.product((1, 2), ((1, 1), (1, 5), (5, 1), (4, 3))):
        for name in OPERATORS:
            if name == "max_pool" and min(h, w) < 3:
                continue
            args = arguments(name, integers, c, (h, w))
            wanted = specification(name, *args)
            for layouts in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
                laid = [arg.contiguous(memory_format=layouts[i > 0]) if arg.dim() == 4 else arg for i, arg in enumerate(args)]
                assert torch.equal(call(name, *laid), wanted), (name, c, h, w, layouts)
            strided = args[0].as_strided(args[0].shape, (args[0].stride(0), *(1,) * 3)) if c * h * w == 1 else args[0]
            assert torch.equal(call(name, strided, *args[1:]), specification(name, strided, *args[1:])), (name, c, h, w)


# Values


@every_isa
def test_pytorch_7999_relu_makes_zero_of_nan():
    """pytorch#7999, onnxruntime#11010, apache/tvm#19572: ReLU turns NaN into 0. (At every position: test_special_values.py.)"""
    for activation, k in itertools.product(ACTIVATIONS, (3, 5)):
        x = reals(1, 20, 9, 9)
        x[0, 7, 4, 4] = torch.nan
        y = ops.depthwise(x, torch.ones(20, 1, k, k), padding=k // 2, activation=activation)
        wanted = torch.zeros_like(y, dtype=torch.bool)
        wanted[0, 7, 4 - k // 2 : 5 + k // 2, 4 - k // 2 : 5 + k // 2] = True
        assert torch.equal(y.isnan(), wanted), activation
        assert torch.equal(ops.pointwise(x, torch.ones(17, 20, 1, 1), activation=activation).isnan()[0, 0], x[0, 7].isnan())


@every_isa
def test_onnxruntime_pr_28565_activation_of_every_group():
    """onnxruntime PR 28565 (review): of a grouped convolution only one group is activated."""
    for channels in (2, 17, 40):
        x, weight = -torch.ones(1, channels, 4, 4), torch.ones(channels, 1, 3, 3)
        assert not ops.depthwise(x, weight, activation="relu").any()
        assert torch.equal(ops.depthwise(-x, weight, activation="relu6").amax((2, 3)), torch.full((1, channels), 6.0))
        model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.ReLU()).eval()
        with torch.no_grad():
            assert fastconv.optimize(model)(x).min() == 0


@needs_kernels
def test_onnxruntime_20030_weights_packed_on_one_isa_read_on_another():
    """onnxruntime#20030: packed for a stride of 16, read with 4, on an instruction set that no test ran."""
    extension = sys.modules["fastconv._C"]
    chosen = extension.isa()
    try:
        for name in ("pointwise", "depthwise", "fire_expand", "fire", "stem"):
            x, *weights = arguments(name, integers, 20)
            wanted = specification(name, x, *weights)
            options = {"depthwise": {"stride": 1, "padding": 1}, "stem": {"stride": 2, "padding": 1}, "fire": {"exact": True}}.get(name, {})
            options |= {"activation": None} if name in ("depthwise", "pointwise", "stem") else {}
            for packed_on in extension.isas():
                extension.set_isa(packed_on)
                prepared = getattr(ops, f"prepare_{name}")(*weights, **options)
                for isa in extension.isas():
                    extension.set_isa(isa)
                    assert torch.equal(prepared(x), wanted), (name, packed_on, isa)
    finally:
        extension.set_isa(chosen)


@every_isa
def test_pytorch_20583_padding_3_on_older_processors():
    """pytorch#20583: padding=3 fails, on older Xeons only."""
    for k in (3, 5, 7):
        x, weight, dense = integers(1, 20, 9, 11), integers(20, 1, k, k), integers(9, 3, k, k)
        if k < 7:
            assert torch.equal(ops.depthwise(x, weight, padding=3), reference.depthwise(x, weight, padding=3)), k
        assert torch.equal(ops.stem(x[:, :3], dense, padding=3), reference.stem(x[:, :3], dense, padding=3)), k
        layer = fastconv.nn.DepthwiseConv2d(20, 20, k, padding=3, groups=20, bias=False)
        layer.weight.data = weight
        with torch.no_grad():
            assert torch.equal(layer(x), torch.conv2d(x, weight, padding=3, groups=20)), k


@every_isa
def test_tensorflow_61905_strides_of_0_and_2_16():
    """tensorflow#61905: a stride cut to 16 bits becomes 0, a division by it ends the process."""
    x, weight = integers(1, 8, 6, 7), integers(8, 1, 3, 3)
    image, dense = integers(1, 3, 6, 7), integers(8, 3, 3, 3)
    for stride in (2**16, 2**16 + 1, 2**20, (2**16, 1), (1, 2**16), (2, 2**31 - 1)):
        assert torch.equal(ops.depthwise(x, weight, stride=stride), reference.depthwise(x, weight, stride=stride)), stride
        assert torch.equal(ops.max_pool(x, stride=stride), reference.max_pool(x, stride=stride)), stride
        assert torch.equal(ops.stem(image, dense, stride=stride), reference.stem(image, dense, stride=stride)), stride
    for stride in (0, -1, -(2**16)):
        for name in ("depthwise", "max_pool", "stem", "separable", "inverted_residual"):
            with pytest.raises(ValueError, match=f"{name}: stride must be at least 1, got {stride}"):
                call(name, *arguments(name), stride=stride)
            if name == "max_pool":
                continue
            with pytest.raises(RuntimeError, match=f"{name}: stride must be at least 1"):
                getattr(torch.ops.fastconv, name)(*arguments(name), [1, stride])


@pytest.mark.usefixtures("poison")
def test_tensorflow_pr_126484_gradients_of_an_empty_batch():
    """tensorflow PR 126484: the gradient of an empty batch is uninitialised memory. Here fresh memory holds NaN."""
    for name in OPERATORS:
        args = [arg.requires_grad_() for arg in arguments(name, n=0)]
        call(name, *args).sum().backward()
        assert args[0].grad.shape == args[0].shape
        for weight in args[1:]:
            assert torch.equal(weight.grad, torch.zeros_like(weight)), name
    grad, x = torch.empty(0, 8, 5, 5), torch.empty(0, 8, 5, 5)
    assert torch.equal(ops.depthwise_backward_weight(grad, x, 3, stride=1, padding=1), torch.zeros(8, 1, 3, 3))
    layer = fastconv.nn.DepthwiseSeparable(8, 8).train()
    layer.bn1, layer.bn2 = nn.Identity(), nn.Identity()
    layer(torch.empty(0, 8, 5, 5)).sum().backward()
    assert all(not parameter.grad.any() for parameter in layer.parameters())


def test_pytorch_142209_hostile_arguments():
    """pytorch#142209, #39824: a convolution crashes on hostile or large padding. 600 random calls: a result as ATen's, or an error."""
    choose = random.Random(0).choice
    numbers = (0, 1, 1, 1, 2, 2, 3, 4, 6, -1, 7, 2**16, 2**31, 2**63 - 1, -(2**63))
    served = refused = 0
    for _ in range(600):
        name = choose(("depthwise", "separable", "inverted_residual", "stem", "max_pool"))
        args = arguments(name, integers, choose((1, 3, 8)), (choose((1, 2, 5, 9)), choose((1, 3, 6))), choose((0, 1, 2)))
        stride, padding = [choose(numbers), choose(numbers)], [choose(numbers[:11]), choose(numbers)]
        if padding[1] == 2**16:
            padding[1] = 5
        options = [False] if name == "max_pool" else []
        try:
            y = getattr(torch.ops.fastconv, name)(*args, stride, padding, *options)
        except RuntimeError as error:
            refused += f"{name}: " in str(error)
            continue
        assert torch.equal(y, specification(name, *args, stride=tuple(stride), padding=tuple(padding))), (name, stride, padding)
        served += 1
    assert served + refused == 600
    assert min(served, refused) > 50


@needs_kernels
def test_pytorch_21734_denormal_weights():
    """pytorch#21734, #23862: denormal weights make a convolution 5 to 40 times slower, or more: processors trap on them.

    Results keep them; torch.set_flush_denormal(True) buys the time back, on each of a team's threads, so with the same bits for any
    number. Without it, ATen's own kernels are the measure (test_special_values.py)."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    torch.set_flush_denormal(False)
    w, x = reals(64, 1, 3, 3), channels_last(reals(1, 64, 64, 64).abs() + 0.5)
    plain, tiny = (ops.prepare_depthwise(weight, None, stride=1, padding=1, activation=None) for weight in (w, w * 2.0**-140))
    kept, best, before = tiny(x), {}, torch.get_num_threads()
    assert (kept != 0).float().mean() > 0.9
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            assert torch.equal(tiny(x), kept), count
            torch.set_flush_denormal(True)
            for _, prepared in itertools.product(range(30), (plain, tiny)):
                start = time.perf_counter()
                y = prepared(x)
                best[prepared] = min(best.get(prepared, 1e9), time.perf_counter() - start)
            assert not y.any(), count
            torch.set_flush_denormal(False)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert best[tiny] <= 5 * best[plain]


# Threads and processes


@needs_kernels
def test_pytorch_2245_fork_after_openmp():
    """pytorch#2245, #17199, OpenBLAS PR 343: after a fork OpenMP waits for threads that are not there. (Networks: test_concurrency.py.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        x, weight = reals(2, 64, 56, 56), reals(64, 1, 3, 3)
        wanted = ops.depthwise(x, weight).numpy().tobytes()
        pid = os.fork()
        if pid == 0:
            os._exit(0 if ops.depthwise(x, weight).numpy().tobytes() == wanted else 1)  # torch.equal would wait for threads, too
        end = time.monotonic() + 30
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.01)
        if not ended[0]:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        assert ended == (pid, 0)
    finally:
        torch.set_num_threads(before)


def test_pytorch_166087_two_openmp_runtimes(guarded):
    """pytorch#166087, #98836: two OpenMP runtimes in one process. Ours brings none: with torch and fastconv at work there is one."""
    assert guarded[1] <= 1


@every_isa
def test_pytorch_134908_results_depend_on_the_batch():
    """pytorch#134908: an image's output depends on the batch it stands in. (Networks: test_whole.py.)"""
    for name in OPERATORS:
        x, *weights = arguments(name, c=20, size=(15, 13), n=5)
        whole = call(name, x, *weights)
        for part in (slice(0, 1), slice(1, 3), slice(4, 5)):
            alone = call(name, x[part], *weights)
            assert torch.equal(alone, whole[part]) if _extension.available else torch.allclose(alone, whole[part], atol=1e-4), name


# torch's own machinery


@pytest.mark.parametrize("name", OPERATORS)
def test_pytorch_171622_fake_strides_are_the_real_ones(name):
    """pytorch#171622, cuEquivariance#223: a fake kernel's strides are not the real ones for channels_last; torch.compile then fails."""
    args = arguments(name)
    for layout, n in itertools.product((torch.contiguous_format, torch.channels_last), (1, 2)):
        laid = [args[0][:n].contiguous(memory_format=layout), *args[1:]]
        torch.library.opcheck(getattr(torch.ops.fastconv, name).default, tuple(laid), test_utils=("test_schema", "test_faketensor"))
        real = call(name, *laid)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = call(name, *[mode.from_tensor(arg) for arg in laid])
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


LAYERS = {
    "DepthwiseConv2d": lambda: fastconv.nn.DepthwiseConv2d(8, 8, 3, padding=1, groups=8),
    "PointwiseConv2d": lambda: fastconv.nn.PointwiseConv2d(8, 12, 1),
    "Fire": lambda: fastconv.nn.Fire(8, 4, 6, 6),
    "DepthwiseSeparable": lambda: fastconv.nn.DepthwiseSeparable(8, 8),
    "InvertedResidual": lambda: fastconv.nn.InvertedResidual(8, 8, 1, 2),
    "Conv2dNormActivation": lambda: fastconv.nn.Conv2dNormActivation(8, 12, 3),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_fastvideo_pr_1373_layers_have_gradients(name, training):
    """hao-ai-lab/FastVideo PR 1373: an operator without autograd breaks training. Each layer's gradients against finite differences."""
    layer = LAYERS[name]().train(training)
    x = reals(2, 8, 6, 5).requires_grad_()
    direction = torch.randn_like(layer(x))
    (layer(x) * direction).sum().backward()
    assert x.grad is not None
    double = copy.deepcopy(layer).double()
    double.zero_grad()
    twin = x.detach().double().requires_grad_()
    (double(twin) * direction).sum().backward()
    for (key, ours), theirs in zip([("x", x), *layer.named_parameters()], [twin, *double.parameters()]):
        assert ours.grad is not None, key
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)
        assert ours.grad.any(), key


def test_mmdetection_2924_a_folded_bias_is_lost_on_load():
    """open-mmlab/mmdetection#2924: a convolution without bias is folded with its norm and saved; on load the bias that came of it is lost.

    Folding changes no parameter: what is saved from an optimized module is the original's, and every way back gives the same logits."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
    ).eval()
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()
        norm.bias.data.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = reals(2, 3, 9, 9)
    fast = fastconv.optimize(model)
    with torch.no_grad():
        wanted = fast(x)
        torch.testing.assert_close(wanted, model(x), rtol=1e-4, atol=1e-5)
        assert list(fast.state_dict()) == list(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), model.state_dict().values()))
        file = io.BytesIO()
        torch.save(fast.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        fresh = copy.deepcopy(model)
        for parameter in fresh.parameters():
            parameter.zero_()
        loaded = fastconv.optimize(fresh)
        assert not torch.equal(loaded(x), wanted)
        loaded.load_state_dict(state)  # after its plan was made
        plain = copy.deepcopy(model)
        plain.load_state_dict(state)
        for other in (loaded, fastconv.optimize(plain), pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
            assert torch.equal(other(x), wanted)
        torch.testing.assert_close(fastconv.revert(loaded)(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATORS[:7])
def test_depthwise_conv3d_2_autocast_dtypes(name, dtype):
    """gungui98/Pytorch-Depthwise-Conv3d#2, #3: dtypes do not match under autocast, forward and backward."""
    args = [(arg / 2).requires_grad_() for arg in arguments(name)]
    with torch.autocast("cpu", dtype=dtype):
        y = call(name, *args)
        wanted = specification(name, *args)
    assert y.dtype == wanted.dtype == dtype
    torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.1)
    y.float().sum().backward()  # outside the region, as torch advises
    for arg in args:
        assert arg.grad.dtype == arg.dtype == torch.float32
        assert arg.grad.isfinite().all()
