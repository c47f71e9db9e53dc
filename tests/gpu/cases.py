"""What test_interpreter.py (CPU, Triton's interpreter) and test_device.py (GPU) both check: launchers against float64."""

import numpy as np
import pytest
import torch

from fastconv import reference

DTYPES = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # unit roundoff
ACTIVATIONS = ("relu", "relu6", "hardswish", "hardsigmoid", "silu")
STEEPEST = 1.5  # of all activations: hardswish at 3

# N, C, H, W, K, stride, padding, activation, bias
DEPTHWISE = [
    (2, 1, 5, 7, 3, (1, 1), (1, 1), "relu", True),
    (1, 3, 1, 1, 3, (1, 1), (1, 1), None, False),
    (1, 3, 9, 10, 5, (2, 2), (2, 2), "hardswish", True),
    (2, 24, 7, 9, 3, (2, 1), (1, 0), "relu6", True),
    (1, 40, 10, 17, 5, (1, 2), (4, 1), "silu", True),
    (1, 96, 9, 8, 3, (2, 2), (2, 2), "hardsigmoid", False),
    (2, 64, 4, 3, 3, (1, 1), (0, 0), None, True),
    (1, 32, 14, 16, 3, (1, 1), (1, 1), "relu6", True),  # strips of 7 rows
    (1, 72, 7, 13, 5, (1, 1), (2, 2), None, True),
    (1, 64, 27, 9, 5, (2, 2), (2, 2), "hardswish", False),  # and of 14, the loop over columns
]
# N, C, H, W, K, stride, padding: of the forward pass
GRADIENTS = [
    (2, 1, 5, 7, 3, (1, 1), (1, 1)),
    (1, 3, 1, 1, 3, (2, 2), (1, 1)),
    (1, 3, 9, 10, 5, (2, 2), (2, 2)),
    (2, 24, 7, 9, 3, (2, 1), (1, 0)),
    (1, 40, 10, 17, 5, (1, 2), (4, 1)),
    (3, 96, 9, 8, 3, (2, 2), (2, 2)),
    (2, 64, 6, 5, 5, (1, 1), (0, 3)),
    (2, 16, 8, 7, 3, (2, 2), (0, 1)),  # windows that leave the last rows unread
]
# N, Cin, Cout, H, W, activation, bias, residual
POINTWISE = [
    (1, 1, 3, 5, 7, None, True, False),
    (2, 3, 24, 7, 9, "relu", True, True),
    (1, 24, 96, 9, 11, "relu6", True, False),
    (3, 40, 24, 5, 5, "hardswish", False, True),
    (1, 96, 40, 15, 15, "hardsigmoid", True, True),
    (1, 160, 130, 3, 5, "silu", True, False),
    (2, 72, 17, 1, 1, "silu", False, False),
]
# N, C, E1, E3, H, W, bias
FIRE_EXPAND = [
    (1, 1, 3, 1, 5, 7, True),
    (2, 3, 24, 40, 6, 5, True),
    (1, 16, 64, 64, 13, 11, True),
    (2, 24, 8, 96, 7, 3, False),
    (1, 40, 40, 24, 1, 1, True),
    (1, 48, 96, 96, 15, 14, True),
]
# N, C, H, W, stride, padding, ceil_mode
MAX_POOL = [
    (2, 1, 5, 7, (2, 2), (0, 0), True),
    (1, 3, 9, 10, (1, 1), (1, 1), False),
    (2, 24, 8, 6, (2, 2), (0, 0), True),
    (1, 40, 10, 17, (2, 1), (1, 0), False),
    (1, 96, 2, 8, (1, 2), (1, 1), True),
    (1, 8, 19, 5, (4, 3), (0, 1), True),
]


def launcher(op):
    import importlib

    return getattr(importlib.import_module(f"fastconv.kernels.gpu.{op}"), op)


def sentinel(monkeypatch):
    """Fills every output with NaN before the kernel runs, so that an element it does not write shows."""
    from fastconv.kernels.gpu import launch

    allocate = launch.outputs

    def filled(*arguments):
        tensors = allocate(*arguments)
        for tensor in tensors:
            tensor.fill_(float("nan"))
        return tensors

    monkeypatch.setattr(launch, "outputs", filled)


def fixed_order(monkeypatch, device):
    """In the interpreter, dot products whose rows do not depend on where they stand: BLAS adds up the rows at an edge in another order."""
    if device == "cpu":
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a.astype(dtype), b.astype(dtype)))


def randn(shape, dtype, device, channels_last=False):
    x = torch.randn(shape).to(dtype).to(device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def double(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def magnitudes(*tensors):
    return [None if tensor is None else tensor.double().abs() for tensor in tensors]


def check(x, y, wanted, magnitude, depth):
    """y within the bound of `depth` fp32 accumulations of terms that sum to `magnitude`, then one rounding to y's dtype; in x's layout."""
    assert y.dtype == x.dtype
    assert y.shape == wanted.shape
    if y.numel() == 0:
        return
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    # 4 more operations for the activation itself (whose results are at most 1.5 times the magnitude), 2^-25: half of fp16's smallest step
    fp32 = (depth + 6) * 2.0**-24
    bound = STEEPEST * fp32 / (1 - fp32) * (magnitude + 3) + DTYPES[y.dtype] * wanted.abs() * (1 + fp32) + 2.0**-25
    error = (y.double() - wanted).abs()
    worst = (error / bound).nan_to_num(nan=float("inf")).max().item()
    assert worst <= 1, f"error is {worst:.3g} times the bound"


def check_depthwise(dtype, device, case, channels_last):
    n, c, h, w, k, stride, padding, activation, with_bias = case
    x, weight = randn((n, c, h, w), dtype, device, channels_last), randn((c, 1, k, k), dtype, device)
    bias = randn((c,), dtype, device) if with_bias else None
    y = launcher("depthwise")(x, weight, bias, stride, padding, activation)
    options = {"stride": stride, "padding": padding}
    wanted = reference.depthwise(*double(x, weight, bias), **options, activation=activation)
    check(x, y, wanted, reference.depthwise(*magnitudes(x, weight, bias), **options), k * k + 1)


def gradient_launchers():
    from fastconv.kernels.gpu import depthwise_backward

    return depthwise_backward.depthwise_backward_input, depthwise_backward.depthwise_backward_weight


def check_depthwise_gradients(dtype, device, case, channels_last):
    n, c, h, w, k, stride, padding = case
    x, weight = randn((n, c, h, w), dtype, device, channels_last), randn((c, 1, k, k), dtype, device)
    options = {"stride": stride, "padding": padding}
    grad = randn(reference.depthwise(x.double(), weight.double(), **options).shape, dtype, device, channels_last)
    of_input, of_weight = gradient_launchers()
    wanted, magnitude = [reference.depthwise_backward_input(*f(grad, weight), (h, w), **options) for f in (double, magnitudes)]
    check(grad, of_input(grad, weight, (h, w), stride, padding), wanted, magnitude, k * k)
    wanted, magnitude = [reference.depthwise_backward_weight(*f(grad, x), (k, k), **options) for f in (double, magnitudes)]
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN: an element not written shows
    try:
        found = of_weight(grad, x, (k, k), stride, padding)
        again = of_weight(grad, x, (k, k), stride, padding)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, again)
    assert found.is_contiguous()
    check(grad, found, wanted, magnitude, grad[:, 0].numel())


def check_splits(device, monkeypatch):
    """The weight's sums over one program, over several, and over more than there are tiles."""
    from fastconv.kernels.gpu import depthwise_backward

    for programs in (1, 3, 500):
        monkeypatch.setattr(depthwise_backward, "PROGRAMS", programs)
        check_depthwise_gradients(torch.float32, device, (5, 24, 7, 9, 3, (1, 1), (1, 1)), True)
        check_depthwise_gradients(torch.float32, device, (2, 3, 13, 9, 5, (2, 2), (2, 2)), True)


def check_gradients_stay_local(device):
    """An infinite gradient at the corner reaches the taps and pixels that its window holds; what lies outside the image adds nothing."""
    of_input, of_weight = gradient_launchers()
    grad, x = torch.ones(1, 2, 4, 4, device=device), torch.ones(1, 2, 4, 4, device=device)
    grad[0, 1, 0, 0] = float("inf")
    found = of_weight(grad, x, (3, 3), (1, 1), (1, 1))
    wanted = torch.zeros_like(found, dtype=torch.bool)
    wanted[1, 0, 1:, 1:] = True
    assert torch.equal(found.isinf(), wanted)
    assert not found.isnan().any()
    found = of_input(grad, torch.ones(2, 1, 3, 3, device=device), (4, 4), (1, 1), (1, 1))
    wanted = torch.zeros_like(found, dtype=torch.bool)
    wanted[0, 1, :2, :2] = True
    assert torch.equal(found.isinf(), wanted)


# op: (x, the other tensors, the rest)
DIFFERENTIATED = {
    "depthwise": ((2, 24, 7, 9), [(24, 1, 3, 3), (24,)], {"stride": (1, 2), "activation": "hardswish"}),
    "pointwise": ((2, 24, 5, 7), [(40, 24, 1, 1), (40,)], {"activation": "relu6"}),
    "fire_expand": ((1, 16, 5, 6), [(24, 16, 1, 1), (24,), (8, 16, 3, 3), (8,)], {}),
    "fire": ((1, 24, 5, 6), [(16, 24, 1, 1), (16,), (24, 16, 1, 1), (24,), (8, 16, 3, 3), (8,)], {}),
    "separable": (
        (2, 24, 7, 8), [(24, 1, 5, 5), (24,), (16, 24, 1, 1), (16,)],
        {"stride": 2, "padding": 2, "depthwise_activation": "relu", "activation": "silu"},
    ),
    "inverted_residual": (
        (2, 8, 7, 6), [(24, 8, 1, 1), (24,), (24, 1, 3, 3), (24,), (8, 24, 1, 1), (8,)], {"activation": "hardswish", "residual": True},
    ),
    "stem": ((1, 3, 9, 11), [(16, 3, 3, 3), (16,)], {"activation": "relu"}),
    "max_pool": ((2, 24, 5, 7), [], {"padding": 1}),
    "global_avg_pool": ((2, 24, 5, 7), [], {}),
}  # fmt: skip


def check_backward(op, device):
    """The gradients of a public operator, all through the kernels, beside the float64 reference's."""
    import fastconv

    shape, others, rest = DIFFERENTIATED[op]
    tensors = [randn(shape, torch.float32, device, True), *(randn(other, torch.float32, device) for other in others)]
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    wide = [tensor.double().requires_grad_() for tensor in tensors]
    y, wanted = getattr(fastconv.ops, op)(*ours, **rest), getattr(reference, op)(*wide, **rest)
    grad = torch.randn_like(wanted)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else what is cuDNN's in ours is tf32, as in torch
        gradients = torch.autograd.grad(y, ours, grad.float())
    for one, other in zip(gradients, torch.autograd.grad(wanted, wide, grad)):
        assert ((one.double() - other).norm() / other.norm()).item() < 1e-5


def check_pointwise(dtype, device, case, channels_last):
    n, c, o, h, w, activation, with_bias, with_residual = case
    x, weight = randn((n, c, h, w), dtype, device, channels_last), randn((o, c, 1, 1), dtype, device)
    bias = randn((o,), dtype, device) if with_bias else None
    residual = randn((n, o, h, w), dtype, device, not channels_last) if with_residual else None
    y = launcher("pointwise")(x, weight, bias, residual, activation)
    x64, weight64, bias64, residual64 = double(x, weight, bias, residual)
    wanted = reference.pointwise(x64, weight64, bias64, residual=residual64, activation=activation)
    x64, weight64, bias64, residual64 = magnitudes(x, weight, bias, residual)
    check(x, y, wanted, reference.pointwise(x64, weight64, bias64, residual=residual64), c + 2)


def check_fire_expand(dtype, device, case, channels_last):
    n, c, e1, e3, h, w, with_bias = case
    x = randn((n, c, h, w), dtype, device, channels_last)
    w1, w3 = randn((e1, c, 1, 1), dtype, device), randn((e3, c, 3, 3), dtype, device)
    b1, b3 = (randn((e1,), dtype, device), randn((e3,), dtype, device)) if with_bias else (None, None)
    y = launcher("fire_expand")(x, w1, b1, w3, b3)
    # magnitudes are not negative, so the reference's relu leaves them
    check(x, y, reference.fire_expand(*double(x, w1, b1, w3, b3)), reference.fire_expand(*magnitudes(x, w1, b1, w3, b3)), 9 * c + 1)


def check_max_pool(dtype, device, case, channels_last, tile=None):
    """Exact, NaN and infinities included; below zero, so that padding must not count as zeros."""
    n, c, h, w, stride, padding, ceil_mode = case
    c = c if channels_last else min(c, 4)  # each is an image of its own then
    x = -randn((n, c, h, w), dtype, device, channels_last).abs()
    for value, share in ((float("nan"), 0.04), (float("inf"), 0.04), (float("-inf"), 0.3)):
        x[torch.rand(x.shape, device=device) < share] = value
    y = launcher("max_pool")(x, stride, padding, ceil_mode, tile)
    wanted = reference.max_pool(x, stride=stride, padding=padding, ceil_mode=ceil_mode)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
    channels_last = channels_last and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def check_max_pool_tiles(device):
    from fastconv.kernels.gpu import configs

    for tile in sorted({tile for tiles in configs.MAX_POOL.values() for tile in tiles}, key=str):
        check_max_pool(torch.float32, device, (1, 2 if tile.channels == 1 else 24, 11, 9, (2, 2), (1, 1), False), True, tile)


def check_nan(device, activation):
    """NaN, infinities and the activations' corners come out as ATen has them."""
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), -4.0, -3.0, -1.0, -0.0, 0.0, 2.0, 3.0, 6.0, 7.0], device=device)
    x = values.view(1, 1, 3, 4)
    y = launcher("pointwise")(x, torch.ones(1, 1, 1, 1, device=device), None, None, activation)
    torch.testing.assert_close(y, reference.ACTIVATIONS[activation](x), equal_nan=True)


def check_nan_stays_local(device):
    """A NaN pixel reaches exactly the outputs whose window holds it, and a NaN weight exactly its channel."""
    x = torch.ones(1, 3, 6, 6, device=device)
    x[0, 1, 2, 2] = float("nan")
    y = launcher("depthwise")(x, torch.ones(3, 1, 3, 3, device=device), None, (1, 1), (1, 1), "relu")
    wanted = torch.zeros_like(y, dtype=torch.bool)
    wanted[0, 1, 1:4, 1:4] = True
    assert torch.equal(y.isnan(), wanted)
    one, three = torch.ones(2, 3, 1, 1, device=device), torch.ones(2, 3, 3, 3, device=device)
    one[1, 0] = float("nan")
    y = launcher("fire_expand")(x.nan_to_num(1.0), one, None, three, None)
    assert torch.equal(y.isnan().flatten(2).all(2), torch.tensor([[False, True, False, False]], device=device))
    assert y.isnan().sum() == 36


def check_empty(dtype, device):
    x = torch.empty(0, 24, 8, 8, dtype=dtype, device=device)
    ones = {k: torch.ones(24, 1 if k == 5 else 24, k, k, dtype=dtype, device=device) for k in (1, 3, 5)}
    assert launcher("depthwise")(x, ones[5], None, (2, 2), (2, 2)).shape == (0, 24, 4, 4)
    of_input, of_weight = gradient_launchers()
    assert of_input(x, ones[5], (15, 16), (2, 2), (2, 2)).shape == (0, 24, 15, 16)
    assert torch.equal(of_weight(x, x, (5, 5), (1, 1), (2, 2)), torch.zeros_like(ones[5]))
    assert launcher("pointwise")(x, ones[1]).shape == (0, 24, 8, 8)
    assert launcher("fire_expand")(x, ones[1], None, ones[3], None).shape == (0, 48, 8, 8)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        assert launcher("max_pool")(image, (2, 2), (0, 0), True).shape == (0, 24, 4, 4)


def check_weight_order(device):
    """A weight laid out by kernel_order gives the same bits, and is not copied again."""
    from fastconv.kernels.gpu import launch

    x = torch.randn(1, 24, 6, 6, device=device)
    weights = ("depthwise", (24, 1, 3, 3)), ("depthwise", (24, 1, 5, 5)), ("pointwise", (8, 24, 1, 1)), ("pointwise", (8, 1, 1, 1))
    for op, shape in weights:
        weight = torch.randn(shape, device=device)
        ordered = launch.kernel_order(weight)
        assert torch.equal(ordered, weight)
        assert launch.kernel_order(ordered).data_ptr() == ordered.data_ptr()
        image = x if shape[1] != 1 or op == "depthwise" else x[:, :1]
        assert torch.equal(launcher(op)(image, ordered), launcher(op)(image, weight))


def check_batch_invariance(dtype, device):
    """An image gives the same bits alone and in a batch."""
    x = randn((3, 40, 9, 9), dtype, device, channels_last=True)
    weights = {"depthwise": (40, 1, 3, 3), "pointwise": (96, 40, 1, 1)}
    for op, shape in weights.items():
        weight = randn(shape, dtype, device)
        assert torch.equal(launcher(op)(x, weight)[1:2], launcher(op)(x[1:2].contiguous(memory_format=torch.channels_last), weight))
    w1, w3 = randn((24, 40, 1, 1), dtype, device), randn((24, 40, 3, 3), dtype, device)
    expand = launcher("fire_expand")
    assert torch.equal(expand(x, w1, None, w3, None)[2:], expand(x[2:].contiguous(memory_format=torch.channels_last), w1, None, w3, None))


def layouts(cases):
    """Each case in channels_last, and in NCHW, which the launchers copy: two of those, the others with `-m slow` (or on a GPU)."""
    found = []
    for i, case in enumerate(cases):
        for name, channels_last in (("channels_last", True), ("nchw", False)):
            marks = [pytest.mark.slow] if not channels_last and i not in (2, 3) else []
            found.append(pytest.param(case, channels_last, id=f"{case}-{name}", marks=marks))
    return found


class Checks:
    """The tests themselves, for a subclass that says where (`device`) and has a fixture `dtype`."""

    device: str

    @pytest.mark.parametrize(("case", "channels_last"), layouts(DEPTHWISE))
    def test_depthwise(self, dtype, case, channels_last, monkeypatch):
        sentinel(monkeypatch)
        check_depthwise(dtype, self.device, case, channels_last)

    @pytest.mark.parametrize(("case", "channels_last"), layouts(GRADIENTS))
    def test_depthwise_gradients(self, dtype, case, channels_last, monkeypatch):
        sentinel(monkeypatch)
        check_depthwise_gradients(dtype, self.device, case, channels_last)

    @pytest.mark.slow  # 10 s in the interpreter
    def test_splits_of_a_weight_gradient(self, monkeypatch):
        check_splits(self.device, monkeypatch)

    def test_gradients_stay_local(self):
        check_gradients_stay_local(self.device)

    @pytest.mark.parametrize("op", DIFFERENTIATED)
    def test_backward(self, op):
        check_backward(op, self.device)

    @pytest.mark.parametrize(("case", "channels_last"), layouts(POINTWISE))
    def test_pointwise(self, dtype, case, channels_last, monkeypatch):
        sentinel(monkeypatch)
        check_pointwise(dtype, self.device, case, channels_last)

    @pytest.mark.parametrize(("case", "channels_last"), layouts(FIRE_EXPAND))
    def test_fire_expand(self, dtype, case, channels_last, monkeypatch):
        sentinel(monkeypatch)
        check_fire_expand(dtype, self.device, case, channels_last)

    @pytest.mark.parametrize(("case", "channels_last"), layouts(MAX_POOL))
    def test_max_pool(self, dtype, case, channels_last, monkeypatch):
        sentinel(monkeypatch)
        check_max_pool(dtype, self.device, case, channels_last)

    def test_every_tile_of_max_pool(self, monkeypatch):
        sentinel(monkeypatch)
        check_max_pool_tiles(self.device)

    @pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
    def test_corners_of_activations(self, activation):
        check_nan(self.device, activation)

    def test_nan_stays_local(self):
        check_nan_stays_local(self.device)

    def test_wide_offsets(self, dtype, monkeypatch):
        """The 64-bit variant that images past 2^31 elements take, on small ones."""
        from fastconv.kernels.gpu import launch

        monkeypatch.setattr(launch, "INT32_MAX", 0)
        sentinel(monkeypatch)
        check_depthwise(dtype, self.device, DEPTHWISE[3], True)
        check_depthwise_gradients(dtype, self.device, GRADIENTS[2], True)
        check_fire_expand(dtype, self.device, FIRE_EXPAND[1], True)
        check_max_pool(dtype, self.device, MAX_POOL[2], True)

    def test_empty_batch(self, dtype):
        check_empty(dtype, self.device)

    def test_weight_order(self):
        check_weight_order(self.device)

    def test_batch_invariance(self, dtype, monkeypatch):
        fixed_order(monkeypatch, self.device)
        check_batch_invariance(dtype, self.device)
