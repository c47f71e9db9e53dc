"""The kernels on the GPU: test_interpreter.py's checks, the registered operators, tensors past 2^31 elements, and memcheck."""

import copy
import dataclasses
import os
import shutil
import subprocess
import sys

import blocks
import cases
import pytest
import torch

import fastconv
from fastconv import reference
from fastconv.models import get_model
from fastconv.optimize import optimize

pytestmark = pytest.mark.gpu
one_at_a_time = pytest.mark.xdist_group("memory")  # of the GPU's, each takes much


class TestDevice(cases.Checks, blocks.BlockChecks):
    device = "cuda"

    @pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
    def dtype(self, request, setting):
        setting(torch.backends.cuda.matmul, "fp32_precision", "ieee")
        return request.param


# Images that no tile divides, channels that no chunk does; as `blocks` lists cases.
STAGED = {
    "separable": [
        (2, 40, 24, 23, 31, 3, (1, 1), (1, 1), "relu6", "relu", True, False),
        (2, 48, 48, 30, 15, 3, (1, 1), (1, 1), "hardswish", None, False, True),
        (2, 40, 72, 23, 31, 3, (2, 2), (1, 1), "relu6", "relu6", True, False),
    ],
    "inverted_residual": [
        (2, 24, 136, 24, 23, 31, 3, (1, 1), (1, 1), ("relu6", "relu6", None), True, True),
        (2, 32, 96, 40, 15, 17, 3, (1, 1), (1, 1), ("hardswish", "silu", "relu"), False, False),
        (2, 16, 96, 24, 29, 31, 3, (2, 2), (1, 1), ("relu", "hardsigmoid", None), True, False),
        (2, 40, 72, 64, 29, 15, 3, (2, 2), (0, 0), (None, "relu6", None), True, False),
        (2, 24, 96, 24, 15, 31, 3, (1, 1), (1, 1), ("hardsigmoid", "relu6", None), True, False),  # which is not 0 at 0
        (2, 32, 96, 24, 15, 31, 3, (1, 1), (1, 1), ("hardsigmoid", "relu6", None), False, False),
    ],
    "fire": [(2, 96, 16, 64, 64, 23, 31, True), (2, 64, 32, 72, 136, 13, 13, False), (1, 200, 48, 96, 64, 15, 27, True)],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in STAGED.items() for case in cases], ids=str)
def test_staged_tiles(op, case, dtype, monkeypatch):
    """Each tile in shared memory that can hold the problem, wide offsets too; and those of an expand that stops after depthwise."""
    tiles = staged_tiles(op, case, dtype)
    if not tiles:
        pytest.skip("none on this GPU")
    cases.sentinel(monkeypatch)
    for tile in tiles:
        blocks.CHECKS[op](dtype, "cuda", case, True, tile)
    monkeypatch.setattr("fastconv.kernels.gpu.launch.INT32_MAX", 0)
    blocks.CHECKS[op](dtype, "cuda", case, True, tiles[0])


def staged_tiles(op, case, dtype, /, **changes):
    from fastconv.kernels.gpu import configs, launch

    kind, arch = launch.DTYPES[dtype], launch.arch(torch.device("cuda", 0))
    if op == "fire":
        _, c, between, o1, o3, *size, _ = case
        problem = configs.Problem("fire", kind, *size, c, max(o1, o3), 3, (1, 1), (1, 1), between)
    else:
        _, c, *between, o, h, w, kernel, stride, padding = case[: 9 if op == "inverted_residual" else 8]
        out = launch.window((h, w), kernel, stride, padding)
        problem = configs.Problem(op, kind, *out, c, o, kernel, stride, padding, *(between or [0]), (h, w))
    return configs.staged(dataclasses.replace(problem, **changes), arch)


@pytest.mark.parametrize("stride", [1, 2])
def test_staged_sums(stride):
    """An expand and depthwise whose tiles leave the sums for squeeze-excitation."""
    case = (3, 24, 136, 136, 23, 31, 3, (stride, stride), (1, 1))
    tiles = staged_tiles("inverted_residual", case, torch.bfloat16, op="expand_depthwise")
    if not tiles:
        pytest.skip("none on this GPU")
    from fastconv.kernels.gpu.inverted_residual import expand_depthwise

    x = torch.randn(3, 24, 23, 31, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(136, 24, 1, 1), torch.randn(136), torch.randn(136, 1, 3, 3), torch.randn(136)]
    weights = [weight.to("cuda", torch.bfloat16) / 3 for weight in weights]
    wanted = reference.pointwise(x.double(), *(weight.double() for weight in weights[:2]), activation="relu6")
    wanted = reference.depthwise(wanted, *(weight.double() for weight in weights[2:]), stride=stride, padding=1, activation="relu6")
    for tile in tiles:
        y, sums = expand_depthwise(x, *weights, (stride, stride), (1, 1), "relu6", "relu6", tile)
        assert ((y.double() - wanted).norm() / wanted.norm()).item() < 8e-3
        total = wanted.sum((2, 3))
        assert ((sums.sum((2, 3)).double() - total).norm() / total.norm()).item() < 8e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("op", ["separable", "inverted_residual", "fire"])
def test_what_is_not_finite_stays_in_its_windows_of_a_staged_tile(op, value):
    case = STAGED[op][0]
    tiles = staged_tiles(op, case, torch.bfloat16)
    if not tiles:
        pytest.skip("none on this GPU")
    c, (h, w) = case[1], (23, 31)
    x = torch.rand(1, c, h, w, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    shapes = {
        "separable": [(c, 1, 3, 3), (24, c, 1, 1)],
        "inverted_residual": [(136, c, 1, 1), (136, 1, 3, 3), (24, 136, 1, 1)],
        "fire": [(16, c, 1, 1), (64, 16, 1, 1), (64, 16, 3, 3)],
    }[op]
    weights = []
    for shape in shapes:
        weights += [torch.rand(shape, device="cuda", dtype=torch.bfloat16), torch.rand(shape[:1], device="cuda", dtype=torch.bfloat16)]
    extra = {"separable": ((1, 1), (1, 1), None, None), "inverted_residual": (None, (1, 1), (1, 1), None, None, None), "fire": ()}[op]
    x[0, 5, 13, 14] = value  # at the edge of a tile
    for tile in tiles:
        y = cases.launcher(op)(x, *weights, *extra, **({"residual": None, "tile": tile} if op == "separable" else {"tile": tile}))
        found = (~y.isfinite()).nonzero()
        assert set(map(tuple, found[:, 2:].tolist())) == {(i, j) for i in (12, 13, 14) for j in (13, 14, 15)}


ARGUMENTS = {
    "depthwise": lambda r: (r(2, 24, 9, 11), r(24, 1, 5, 5), r(24), (2, 1), (2, 1), "hardswish"),
    "depthwise_backward_input": lambda r: (r(2, 24, 5, 11), r(24, 1, 5, 5), (9, 11), (2, 1), (2, 2)),
    "depthwise_backward_weight": lambda r: (r(2, 24, 5, 11), r(2, 24, 9, 11), (5, 5), (2, 1), (2, 2)),
    "pointwise": lambda r: (r(2, 24, 9, 11), r(40, 24, 1, 1), r(40), r(2, 40, 9, 11), "relu6"),
    "fire_expand": lambda r: (r(2, 16, 9, 11), r(64, 16, 1, 1), r(64), r(64, 16, 3, 3), r(64)),
    "fire": lambda r: (r(2, 24, 9, 11), r(16, 24, 1, 1), r(16), r(64, 16, 1, 1), r(64), r(64, 16, 3, 3), r(64)),
    "separable": lambda r: (r(2, 24, 9, 11), r(24, 1, 5, 5), r(24), r(40, 24, 1, 1), r(40), (2, 1), (2, 1), "relu", "relu6"),
    "inverted_residual": lambda r: (
        r(2, 24, 9, 11), r(96, 24, 1, 1), r(96), r(96, 1, 3, 3), r(96), r(24, 96, 1, 1), r(24), (1, 1), (1, 1), "relu6", True,
    ),
    "stem": lambda r: (r(2, 3, 19, 21), r(24, 3, 3, 3), r(24), (2, 2), (1, 1), "hardswish"),
    "max_pool": lambda r: (r(2, 40, 9, 11), (2, 2), (1, 0), True),
    "global_avg_pool": lambda r: (r(2, 40, 9, 11),),
}  # fmt: skip
# Operators in a file of another name; the blocks' launchers choose: one kernel or several.
FILES = dict.fromkeys(("fire", "separable", "inverted_residual"), "blocks")
FILES |= dict.fromkeys(("depthwise_backward_input", "depthwise_backward_weight"), "depthwise_backward")


def arguments(op, dtype, layout=torch.contiguous_format, requires_grad=False):
    torch.manual_seed(0)

    def make(*shape):
        tensor = torch.randn(shape, device="cuda", dtype=dtype)
        return (tensor.contiguous(memory_format=layout) if len(shape) == 4 else tensor).requires_grad_(requires_grad)

    return ARGUMENTS[op](make)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_operator(op, dtype, layout):
    """torch.ops.fastconv.<op> on CUDA tensors; float64 is not covered and takes the reference."""
    args = arguments(op, dtype, layout)
    y = getattr(torch.ops.fastconv, op)(*args)
    names = [argument.name for argument in getattr(torch.ops.fastconv, op).default._schema.arguments]
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in zip(names, args, strict=False)}
    wanted = getattr(reference, op)(**wide)
    relative = ((y.double() - wanted).norm() / wanted.norm()).item()
    # fp32 through tf32 only where torch's switch says so, which it does not by default
    assert relative < {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_operator_runs_triton(op, monkeypatch):
    import importlib

    module = importlib.import_module(f"fastconv.kernels.gpu.{FILES.get(op, op)}")
    launched = []
    kernel = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *args, **given: launched.append(op) or kernel(*args, **given))
    getattr(torch.ops.fastconv, op)(*arguments(op, torch.float16))
    assert set(launched) == {op}  # max_pool of an NCHW image calls itself for its planes


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck(op, layout):
    torch.library.opcheck(getattr(torch.ops.fastconv, op).default, arguments(op, torch.float32, layout, requires_grad=True))


def test_tf32_follows_torchs_switch(setting):
    x, weight = torch.randn(1, 512, 32, 32, device="cuda"), torch.randn(256, 512, 1, 1, device="cuda")
    wanted = torch.nn.functional.conv2d(x.double(), weight.double())

    def error(precision):
        setting(torch.backends.cuda.matmul, "fp32_precision", precision)
        y = fastconv.ops.pointwise(x, weight)
        return ((y.double() - wanted).norm() / wanted.norm()).item()

    assert error("ieee") < 1e-6
    assert 1e-5 < error("tf32") < 2e-3


def _enough_memory(gigabytes):
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


# (N, C, H, W): many images; one image that alone passes 2^31 elements
@one_at_a_time
@pytest.mark.parametrize("shape", [(1400, 128, 112, 112), (1, 64, 5824, 5824)], ids=str)
@pytest.mark.parametrize("op", ["depthwise", "pointwise", "fire_expand", "separable", "inverted_residual", "fire", "max_pool"])
def test_past_2_31_elements(op, shape):
    """Patches at the start, across 2^31 elements and at the end agree with the kernel on the patch alone."""
    _enough_memory(32)
    torch.manual_seed(0)
    n, c, h, w = shape
    x = torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=torch.channels_last).normal_()
    assert x.numel() > 2**31

    def weight(*size):
        depth = size[1] * size[2] * size[3]
        return torch.randn(size, device="cuda", dtype=torch.bfloat16) * depth**-0.5

    weights = {
        "depthwise": (weight(c, 1, 3, 3),),
        "pointwise": (weight(c, c, 1, 1),),
        "fire_expand": (weight(c // 2, c, 1, 1), None, weight(c // 2, c, 3, 3), None),
        "separable": (weight(c, 1, 3, 3), None, weight(c, c, 1, 1), None),
        "inverted_residual": (weight(32, c, 1, 1), None, weight(32, 1, 3, 3), None, weight(c, 32, 1, 1), None),
        "fire": (weight(16, c, 1, 1), None, weight(c // 2, 16, 1, 1), None, weight(c // 2, 16, 3, 3), None),
        "max_pool": ((1, 1), (1, 1)),
    }[op]
    run = cases.launcher(op)  # the fused kernel of a block, chosen or not
    y = run(x, *weights)
    pixel = 2**31 // c  # the pixel that holds element 2^31
    for at in (0, pixel, n * h * w - 1):
        image, row = at // (h * w), at % (h * w) // w
        low, high = max(row - 2, 0), min(row + 3, h)
        patch = x[image : image + 1, :, low:high].contiguous(memory_format=torch.channels_last)
        alone = run(patch, *weights)
        # rows next to a cut lack their halo in the patch
        top, bottom = (0 if low == 0 else 1), (high - low if high == h else high - low - 1)
        torch.testing.assert_close(y[image, :, low + top : low + bottom], alone[0, :, top:bottom], rtol=0.02, atol=0.05)
        assert y[image, :, low + top : low + bottom].abs().sum() > 0


@one_at_a_time
def test_memcheck():
    """Every kernel on small images under compute-sanitizer: no access outside an allocation."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        pytest.skip("compute-sanitizer is not installed")
    some = "test_nchw or test_head or test_squeeze_excite or ((test_depthwise or test_max_pool) and channels_last) or test_wide"
    few = f"TestDevice and ({some}) and not f32"
    pytest_of_it = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", __file__, "-k", few]
    # one allocation a tensor: in torch's pool a neighbour would hide a wrong address
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *pytest_of_it]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if "ERROR SUMMARY" not in child.stdout:
        pytest.skip(f"compute-sanitizer does not work here: {child.stdout[-300:]}")
    assert "ERROR SUMMARY: 0 errors" in child.stdout, child.stdout[-8000:]
    assert " passed" in child.stdout
    assert child.returncode == 0, child.stdout[-8000:]


def test_current_device_is_restored():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x = torch.randn(1, 8, 4, 4, device="cuda:1")
    y = fastconv.ops.depthwise(x, torch.ones(8, 1, 3, 3, device="cuda:1"))
    assert y.device == x.device
    assert torch.cuda.current_device() == 0


def test_operators_compile():
    """torch.compile takes the operators in one graph, with the same results."""
    x, weight, bias, *_ = arguments("depthwise", torch.float16, torch.channels_last)

    def block(x):
        y = torch.ops.fastconv.depthwise(x, weight, bias, (2, 1), (2, 1), "hardswish")
        return torch.ops.fastconv.pointwise(y, torch.eye(24, device="cuda", dtype=x.dtype).view(24, 24, 1, 1))

    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.parametrize("case", STAGED["fire"], ids=str)
def test_a_fire_has_the_same_bits_in_parts(case):
    """So that few images may run in parts (`configs.few`)."""
    from fastconv.kernels.gpu import fire, fire_expand, pointwise

    tiles = staged_tiles("fire", case, torch.bfloat16)
    if not tiles:
        pytest.skip("none on this GPU")
    n, c, between, o1, o3, h, w, _ = case
    x = cases.randn((n, c, h, w), torch.bfloat16, "cuda", True)
    shapes = [(between, c, 1, 1), (o1, between, 1, 1), (o3, between, 3, 3)]
    weights = [cases.randn(size, torch.bfloat16, "cuda") / 8 for shape in shapes for size in (shape, shape[:1])]
    parts = fire_expand.fire_expand(pointwise.pointwise(x, *weights[:2], None, "relu"), *weights[2:])
    for tile in tiles:
        assert torch.equal(fire.fire(x, *weights, tile), parts), tile


NETWORKS = ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "squeezenet1_0", "squeezenet1_1"]


@one_at_a_time
@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_has_the_same_bits_in_any_batch(name):
    """Though few images run with other tiles and forms. The last product of MobileNets is torch's, which chooses by the batch."""
    torch.manual_seed(0)
    model = get_model(name).eval().to(memory_format=torch.channels_last)
    if name.startswith("mobilenet"):
        model.classifier = torch.nn.Identity()
    x = torch.randn(140, 3, 224, 224, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        fast = optimize(model.cuda(), dtype=torch.bfloat16)
        y = fast(x)
        assert y.isfinite().all()
        for batch in (1, 3, 20):
            assert torch.equal(fast(x[:batch].contiguous(memory_format=torch.channels_last)), y[:batch])


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name, setting):
    """A whole network through fastconv.optimize on the GPU, in fp32, within the bound that holds on CPU."""
    setting(torch.backends.cudnn.conv, "fp32_precision", "ieee")  # what no kernel takes runs in cuDNN, in tf32 by default
    torch.manual_seed(0)
    model = get_model(name).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    wanted = copy.deepcopy(model).double()(x.double())
    with torch.inference_mode():
        y = optimize(model.cuda())(x.cuda()).cpu()
    assert ((y - wanted).norm() / wanted.norm()).item() < 1e-5
