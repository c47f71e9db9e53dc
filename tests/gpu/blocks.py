"""What test_interpreter.py (CPU, Triton's interpreter) and test_device.py (GPU) both check of the block kernels."""

from dataclasses import replace

import pytest
import torch
from bounds import Bounded
from cases import ACTIVATIONS, fixed_order, launcher, randn, sentinel

from fastconv import reference

# N, C, O, H, W, K, stride, padding, depthwise activation, activation, bias, residual
SEPARABLE = [
    (2, 1, 3, 5, 7, 3, (1, 1), (1, 1), "relu", None, True, False),
    (1, 3, 24, 1, 1, 5, (1, 1), (2, 2), None, "relu6", False, True),
    (2, 24, 40, 9, 11, 3, (2, 2), (1, 1), "relu6", "relu6", True, False),
    (1, 40, 96, 10, 17, 5, (1, 2), (4, 1), "silu", "hardswish", True, True),
    (1, 96, 24, 13, 6, 3, (1, 1), (1, 0), "hardsigmoid", "silu", False, False),
    (1, 64, 136, 7, 7, 5, (2, 2), (2, 2), "hardswish", "hardsigmoid", True, False),
    (1, 32, 16, 20, 33, 3, (1, 1), (1, 1), "relu6", None, True, True),
]
# N, C, E, O, H, W, K, stride, padding, (expand, depthwise, last) activation, bias, residual
INVERTED_RESIDUAL = [
    (2, 1, 3, 1, 5, 7, 3, (1, 1), (1, 1), ("relu", "relu", None), True, True),
    (1, 3, 24, 40, 1, 1, 5, (1, 1), (2, 2), (None, "relu6", "relu"), True, False),
    (2, 24, 96, 24, 9, 11, 3, (1, 1), (1, 1), ("relu6", "relu6", None), True, True),
    (1, 16, 40, 24, 10, 17, 3, (2, 2), (1, 1), ("hardswish", "silu", None), True, False),
    (1, 40, 96, 40, 9, 8, 5, (1, 1), (2, 2), ("hardsigmoid", "hardswish", "hardswish"), True, True),
    (1, 96, 24, 136, 7, 5, 5, (2, 2), (2, 2), ("silu", "relu", None), False, False),
    (1, 160, 48, 160, 7, 7, 3, (1, 1), (1, 1), ("relu6", "relu6", None), True, True),
    (1, 8, 16, 8, 6, 6, 3, (2, 1), (0, 2), ("hardsigmoid", None, None), True, False),
]
# N, C, S, E1, E3, H, W, bias
FIRE = [
    (1, 1, 3, 1, 5, 7, 5, True),
    (2, 3, 24, 40, 8, 5, 9, False),
    (1, 96, 16, 64, 64, 9, 13, True),
    (1, 40, 24, 8, 96, 1, 1, True),
    (1, 256, 48, 72, 24, 6, 7, True),
]
# N, C, E1, E3, H, W, stride, padding, ceil_mode, bias
FIRE_POOL = [
    (2, 1, 3, 1, 7, 9, (2, 2), (0, 0), True, True),
    (1, 3, 24, 40, 8, 6, (2, 2), (0, 0), True, False),
    (1, 24, 40, 72, 9, 11, (2, 2), (1, 1), False, True),
    (1, 40, 96, 24, 5, 5, (1, 1), (1, 0), False, True),
    (1, 16, 64, 64, 12, 13, (2, 2), (0, 0), False, True),
]
# N, C, O, H, W, (KH, KW), stride, padding, activation, bias
STEM = [
    (2, 3, 24, 15, 17, (3, 3), (2, 2), (1, 1), "hardswish", True),
    (1, 3, 96, 23, 22, (7, 7), (2, 2), (0, 0), "relu", True),
    (1, 1, 3, 5, 7, (3, 5), (1, 2), (2, 0), None, False),
    (1, 4, 40, 9, 9, (5, 1), (3, 1), (1, 0), "silu", True),
    (1, 3, 130, 8, 8, (3, 3), (2, 2), (1, 1), "relu6", True),
    (2, 3, 24, 11, 13, (7, 7), (2, 2), (3, 2), None, True),
    (1, 4, 40, 9, 70, (5, 5), (1, 1), (0, 0), "relu", True),
    (1, 2, 24, 9, 9, (8, 5), (2, 1), (1, 1), None, False),
]
# as of STEM, then the pool's stride, padding and ceil_mode
STEM_POOL = [
    (2, 3, 24, 15, 17, (3, 3), (2, 2), (1, 1), "hardswish", True, (2, 2), (0, 0), True),
    (1, 3, 130, 23, 22, (3, 3), (2, 2), (0, 0), "relu", True, (2, 2), (0, 0), True),
    (2, 3, 64, 19, 24, (3, 3), (2, 2), (0, 0), "relu", False, (2, 2), (0, 0), False),
    (1, 1, 3, 9, 11, (3, 5), (1, 2), (2, 0), None, False, (1, 2), (1, 1), False),
    (1, 4, 40, 9, 9, (2, 4), (1, 1), (1, 0), "silu", True, (2, 1), (0, 1), True),
]
# N, C, O, H, W, activation, bias
HEAD = [
    (2, 1, 3, 5, 7, "relu", True),
    (1, 3, 24, 1, 1, None, False),
    (3, 96, 40, 7, 7, "hardswish", True),
    (1, 40, 136, 13, 13, "relu6", True),
]
# N, C, E (0: no expand), S, O, H, W, K, stride, activation, gate, residual
SQUEEZE_EXCITE = [
    (2, 24, 40, 8, 24, 9, 11, 5, (1, 1), "hardswish", "hardsigmoid", True),
    (1, 3, 24, 3, 40, 7, 7, 3, (2, 2), "relu", "sigmoid", False),
    (2, 16, 0, 8, 16, 9, 8, 3, (2, 2), "relu", "hardsigmoid", False),
]
OPS = ("separable", "inverted_residual", "fire", "fire_pool", "stem", "stem_pool", "head")


def _weights(dtype, device, with_bias, *shapes):
    """Weight and bias of each shape, scaled so that results keep the size of their inputs."""
    found = []
    for shape in shapes:
        depth = shape[1] * shape[2] * shape[3]
        found.append((torch.randn(shape) * depth**-0.5).to(dtype).to(device))
        found.append(randn(shape[:1], dtype, device) if with_bias else None)
    return found


def check_separable(dtype, device, case, channels_last, tile=None):
    n, c, o, h, w, k, stride, padding, between, activation, with_bias, with_residual = case
    x = randn((n, c, h, w), dtype, device, channels_last)
    wd, bd, wp, bp = _weights(dtype, device, with_bias, (c, 1, k, k), (o, c, 1, 1))
    d = Bounded.exact(x).conv(wd, bd, stride, padding, c).activate(between).rounded(dtype)
    y = d.conv(wp, bp)
    residual = randn(y.value.shape, dtype, device, not channels_last) if with_residual else None
    y = y.plus(residual).activate(activation)
    y.holds(x, launcher("separable")(x, wd, bd, wp, bp, stride, padding, between, activation, residual, tile))


def staged(tile, op, x, depthwise_weight, out_channels, stride, padding):
    """Whether the expanded values pass through shared memory, in x's dtype; elsewhere they stay in fp32. tile: None for the one chosen."""
    from fastconv.kernels.gpu import configs, inverted_residual, launch

    problem = inverted_residual.problem(op, x, depthwise_weight, out_channels, stride, padding)
    return isinstance(tile or configs.config(problem, launch.arch(x.device)), configs.StagedTile)


def check_inverted_residual(dtype, device, case, channels_last, tile=None):
    n, c, e, o, h, w, k, stride, padding, activations, with_bias, with_residual = case
    x = randn((n, c, h, w), dtype, device, channels_last)
    we, be, wd, bd, wp, bp = _weights(dtype, device, with_bias, (e, c, 1, 1), (e, 1, k, k), (o, e, 1, 1))
    d = Bounded.exact(x).conv(we, be).activate(activations[0])
    if staged(tile, "inverted_residual", x, wd, o, stride, padding):
        d = d.rounded(dtype)
    y = d.conv(wd, bd, stride, padding, e).activate(activations[1]).rounded(dtype).conv(wp, bp)
    residual = randn(y.value.shape, dtype, device, channels_last) if with_residual else None
    y = y.plus(residual).activate(activations[2])
    y.holds(x, launcher("inverted_residual")(x, we, be, wd, bd, wp, bp, residual, stride, padding, *activations, tile))


def check_fire(dtype, device, case, channels_last, tile=None):
    n, c, s, e1, e3, h, w, with_bias = case
    x = randn((n, c, h, w), dtype, device, channels_last)
    ws, bs, w1, b1, w3, b3 = _weights(dtype, device, with_bias, (s, c, 1, 1), (e1, s, 1, 1), (e3, s, 3, 3))
    squeezed = Bounded.exact(x).conv(ws, bs).activate("relu").rounded(dtype)
    _cat(squeezed, w1, b1, w3, b3).holds(x, launcher("fire")(x, ws, bs, w1, b1, w3, b3, tile))


def _cat(x, w1, b1, w3, b3):
    one, three = x.conv(w1, b1).activate("relu"), x.conv(w3, b3, padding=(1, 1)).activate("relu")
    return Bounded(torch.cat([one.value, three.value], 1), torch.cat([one.error, three.error], 1))


def check_fire_pool(dtype, device, case, channels_last, tile=None):
    n, c, e1, e3, h, w, stride, padding, ceil_mode, with_bias = case
    x = randn((n, c, h, w), dtype, device, channels_last)
    w1, b1, w3, b3 = _weights(dtype, device, with_bias, (e1, c, 1, 1), (e3, c, 3, 3))
    y = _cat(Bounded.exact(x), w1, b1, w3, b3).max_pool(stride, padding, ceil_mode)
    y.holds(x, launcher("fire_pool")(x, w1, b1, w3, b3, stride, padding, tuple(y.value.shape[2:]), tile))


def check_stem(dtype, device, case, channels_last, tile=None):
    n, c, o, h, w, k, stride, padding, activation, with_bias = case
    x = randn((n, c, h, w), dtype, device, channels_last)
    weight, bias = _weights(dtype, device, with_bias, (o, c, *k))
    y = Bounded.exact(x).conv(weight, bias, stride, padding).activate(activation)
    y.holds(x, launcher("stem")(x, weight, bias, stride, padding, activation, tile))


def check_stem_pool(dtype, device, case, channels_last, tile=None):
    n, c, o, h, w, k, stride, padding, activation, with_bias, *pool = case
    x = randn((n, c, h, w), dtype, device, channels_last)
    weight, bias = _weights(dtype, device, with_bias, (o, c, *k))
    y = Bounded.exact(x).conv(weight, bias, stride, padding).activate(activation).max_pool(*pool)
    result = launcher("stem_pool")(x, weight, bias, stride, padding, activation, *pool[:2], tuple(y.value.shape[2:]), tile)
    assert result.is_contiguous(memory_format=torch.channels_last)
    like = channels_last and not x.is_contiguous()  # one channel is no image of channels
    y.holds(x, result if like else result.contiguous())


def check_head(dtype, device, case, channels_last, tile=None):
    n, c, o, h, w, activation, with_bias = case
    x = randn((n, c, h, w), dtype, device, channels_last)
    weight, bias = _weights(dtype, device, with_bias, (o, c, 1, 1))
    y = launcher("head")(x, weight, bias, activation, tile)
    Bounded.exact(x).conv(weight, bias).activate(activation).mean().holds(y, y)


def check_squeeze_excite(dtype, device, case, channels_last, fused):
    n, c, e, s, o, h, w, k, stride, activation, gate_activation, with_residual = case
    x = randn((n, c, h, w), dtype, device, channels_last)
    inner, padding = e or c, (k // 2, k // 2)
    we, be, wd, bd, w1, b1, w2, b2, wp, bp = _weights(
        dtype, device, True, (inner, c, 1, 1), (inner, 1, k, k), (s, inner, 1, 1), (inner, s, 1, 1), (o, inner, 1, 1)
    )
    d = Bounded.exact(x)
    if e:
        d = d.conv(we, be).activate(activation)
        d = d if fused else d.rounded(dtype)
    d = d.conv(wd, bd, stride, padding, inner).activate(activation)
    # the fused kernel sums before it rounds, the pass over the stored result after: the bound allows either
    stored = d.rounded(dtype)
    gate = stored.mean().rounded(dtype).conv(w1, b1).activate("relu").rounded(dtype).conv(w2, b2).activate(gate_activation).rounded(dtype)
    y = stored.times(gate).rounded(dtype).conv(wp, bp)
    residual = randn(y.value.shape, dtype, device, channels_last) if with_residual else None
    run = launcher("squeeze_excite")
    weights = (we if e else None, be if e else None, wd, bd, (w1, b1, w2, b2), wp, bp, residual)
    result = run(x, *weights, stride, padding, activation, activation, "relu", gate_activation, None, fused)
    y.plus(residual).holds(randn((1, 2, 2, 2), dtype, device, channels_last=True), result)


CHECKS = {op: globals()[f"check_{op}"] for op in OPS}


def tiles(op, device):
    """Every tile that ships for the operation, once; to the interpreter, tiles that differ in warps or stages are one."""
    from fastconv.kernels.gpu import configs

    found = {tile for table in configs.TABLES[op].values() for row in table.values() for tile in row}
    if device == "cpu":
        found = {replace(tile, num_warps=4, num_stages=1) for tile in found}
    return sorted(found, key=str)


# a problem for all tiles of an operation: no dimension a multiple of what a tile holds
EACH_TILE = {
    "separable": (1, 40, 72, 9, 13, 3, (1, 1), (1, 1), "relu6", "relu", True, True),
    "inverted_residual": (1, 24, 40, 40, 6, 13, 3, (2, 2), (1, 1), ("relu6", "relu6", None), True, False),
    "fire": (1, 40, 24, 40, 72, 5, 13, True),
    "fire_pool": (1, 24, 40, 24, 9, 13, (2, 2), (0, 0), True, True),
    "stem": (1, 3, 40, 15, 27, (3, 3), (2, 2), (1, 1), "relu", True),
    "stem_pool": (1, 3, 40, 27, 31, (3, 3), (2, 2), (1, 1), "relu", True, (2, 2), (0, 0), True),
    "head": (2, 40, 72, 9, 9, "relu", True),
}


def call(op, device):
    """x -> the operation on it: x of 24 channels, 9 x 9; pixels and channels fit no tile."""
    generator = torch.Generator().manual_seed(0)

    def weights(*shapes):
        found = []
        for shape in shapes:
            found += [torch.randn(shape, generator=generator), torch.randn(shape[:1], generator=generator)]
        return [tensor.to(device) for tensor in found]

    run = launcher(op)
    if op == "separable":
        w = weights((24, 1, 3, 3), (40, 24, 1, 1))
        return lambda x: run(x, *w, (2, 2), (1, 1), "relu")
    if op == "inverted_residual":
        w = weights((40, 24, 1, 1), (40, 1, 3, 3), (24, 40, 1, 1))
        return lambda x: run(x, *w, x)
    if op == "fire":
        w = weights((8, 24, 1, 1), (40, 8, 1, 1), (24, 8, 3, 3))
        return lambda x: run(x, *w)
    if op == "fire_pool":
        w = weights((40, 24, 1, 1), (24, 24, 3, 3))
        return lambda x: run(x, *w, (2, 2), (0, 0), (4, 4))
    if op == "stem":
        w = weights((24, 3, 3, 3))
        return lambda x: run(x[:, :3].contiguous(), *w)
    if op == "stem_pool":
        w = weights((24, 3, 3, 3))
        return lambda x: run(x[:, :3].contiguous(), *w, (2, 2), (1, 1), "relu", (2, 2), (0, 0), (2, 2))
    w = weights((40, 24, 1, 1))
    return lambda x: run(x, *w, "relu")


SLOW_IN_THE_INTERPRETER = ("separable", "inverted_residual", "fire", "fire_pool")  # to try with every tile


class BlockChecks:
    """The tests themselves, for a subclass that says where (`device`) and has a fixture `dtype`."""

    device: str

    @pytest.mark.parametrize("case", SEPARABLE, ids=str)
    def test_separable(self, dtype, case, monkeypatch):
        sentinel(monkeypatch)
        check_separable(dtype, self.device, case, True)

    @pytest.mark.parametrize("case", INVERTED_RESIDUAL, ids=str)
    def test_inverted_residual(self, dtype, case, monkeypatch):
        sentinel(monkeypatch)
        check_inverted_residual(dtype, self.device, case, True)

    @pytest.mark.parametrize("case", FIRE, ids=str)
    def test_fire(self, dtype, case, monkeypatch):
        sentinel(monkeypatch)
        check_fire(dtype, self.device, case, True)

    @pytest.mark.parametrize("case", FIRE_POOL, ids=str)
    def test_fire_pool(self, dtype, case, monkeypatch):
        sentinel(monkeypatch)
        check_fire_pool(dtype, self.device, case, True)

    @pytest.mark.parametrize("case", STEM, ids=str)
    def test_stem(self, dtype, case, monkeypatch):
        sentinel(monkeypatch)
        check_stem(dtype, self.device, case, True)

    @pytest.mark.parametrize("case", STEM_POOL, ids=str)
    def test_stem_pool(self, dtype, case, monkeypatch):
        sentinel(monkeypatch)
        check_stem_pool(dtype, self.device, case, True)

    def test_a_stem_and_its_pool_have_the_same_bits_in_one_kernel(self, dtype):
        """So the form may depend on anything. (In the interpreter on integers: sums of numpy's products depend on a tile's shape.)"""
        from fastconv.kernels.gpu.blocks import max_pool

        x, weight, bias = (randn(shape, dtype, self.device, len(shape) == 4) for shape in ((2, 3, 35, 30), (24, 3, 3, 3), (24,)))
        if self.device == "cpu":
            x, weight, bias = ((3 * tensor).round() for tensor in (x, weight, bias))
        y = launcher("stem")(x, weight, bias, (2, 2), (1, 1), "relu")
        for ceil_mode, size in ((True, (9, 7)), (False, (8, 7))):
            one = launcher("stem_pool")(x, weight, bias, (2, 2), (1, 1), "relu", (2, 2), (0, 0), size)
            assert torch.equal(one, max_pool(y, (2, 2), (0, 0), ceil_mode))

    @pytest.mark.parametrize("case", HEAD, ids=str)
    def test_head(self, dtype, case):
        check_head(dtype, self.device, case, True)

    @pytest.mark.parametrize("fused", [True, False], ids=["fused", "parts"])
    @pytest.mark.parametrize("case", SQUEEZE_EXCITE, ids=str)
    def test_squeeze_excite(self, dtype, case, fused, monkeypatch):
        sentinel(monkeypatch)
        check_squeeze_excite(dtype, self.device, case, True, fused)

    @pytest.mark.parametrize("op", OPS)
    def test_nchw(self, op, monkeypatch):
        sentinel(monkeypatch)
        CHECKS[op](torch.float32, self.device, globals()[op.upper()][1], False)

    @pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.slow) if op in SLOW_IN_THE_INTERPRETER else op for op in OPS])
    def test_every_tile(self, op, monkeypatch):
        """Each tile of the tables gives the right result, whatever shapes the tables choose it for."""
        sentinel(monkeypatch)
        for tile in tiles(op, self.device):
            CHECKS[op](torch.float32, self.device, EACH_TILE[op], True, tile)

    @pytest.mark.parametrize("op", ["separable", "inverted_residual", "fire", "fire_pool", "stem", "stem_pool"])
    def test_wide_block_offsets(self, op, monkeypatch):
        """The 64-bit variant that images past 2^31 elements take, on small ones."""
        from fastconv.kernels.gpu import launch

        monkeypatch.setattr(launch, "INT32_MAX", 0)
        sentinel(monkeypatch)
        CHECKS[op](torch.float32, self.device, globals()[op.upper()][2], True)
        if op == "stem":  # by rows, and two elements at a time
            CHECKS[op](torch.float16, self.device, STEM[1], True)

    def test_a_stems_loads_stay_in_their_windows(self, dtype):
        """A NaN pixel reaches exactly the outputs whose window holds it: not those whose row ends before it within a pair."""
        mask = torch.zeros(1, 1, 11, 24, device=self.device)
        mask[0, 0, 6, 13] = 1
        x = torch.ones(1, 3, 11, 24, dtype=dtype, device=self.device).contiguous(memory_format=torch.channels_last)
        x[0, :, 6, 13] = float("nan")
        y = launcher("stem")(x, torch.ones(8, 3, 7, 7, dtype=dtype, device=self.device), None, (2, 2), (0, 0))
        touched = torch.nn.functional.conv2d(mask, torch.ones(1, 1, 7, 7, device=self.device), stride=2) > 0
        assert torch.equal(y.isnan(), touched.expand_as(y))

    def test_a_stems_weight_is_laid_out_once(self):
        from fastconv.kernels.gpu import launch

        for shape in ((24, 3, 7, 7), (8, 3, 3, 3), (8, 1, 3, 5), (8, 4, 5, 1)):
            weight = torch.randn(shape, device=self.device)
            ordered = launch.stem_order(weight)
            assert torch.equal(ordered, weight)
            assert launch.stem_order(ordered) is ordered

    @pytest.mark.parametrize("op", OPS)
    def test_block_batch_invariance(self, op, monkeypatch):
        """An image gives the same bits alone and in a batch."""
        fixed_order(monkeypatch, self.device)
        run = call(op, self.device)
        x = torch.randn(3, 24, 9, 9).to(self.device).contiguous(memory_format=torch.channels_last)
        assert torch.equal(run(x)[1:2], run(x[1:2].contiguous(memory_format=torch.channels_last)))

    @pytest.mark.parametrize("op", OPS)
    def test_empty_batch_of_blocks(self, op):
        y = call(op, self.device)(torch.empty(0, 24, 9, 9, device=self.device))
        assert y.shape[0] == 0

    @pytest.mark.parametrize("op", ["separable", "inverted_residual", "fire", "fire_pool"])
    def test_nan_stays_in_its_windows(self, op):
        """A NaN pixel reaches exactly the outputs whose window holds it."""
        x = torch.ones(1, 24, 9, 9, device=self.device)
        run = call(op, self.device)
        assert not run(x).isnan().any()
        x[0, 5, 4, 4] = float("nan")
        mask = torch.zeros(1, 1, 9, 9, device=self.device)
        mask[0, 0, 4, 4] = 1
        ones = torch.ones(1, 1, 3, 3, device=self.device)
        stride = 2 if op == "separable" else 1
        touched = torch.nn.functional.conv2d(mask, ones, padding=1, stride=stride) > 0
        y = run(x).isnan()
        if op == "inverted_residual" or op == "separable":
            assert torch.equal(y, touched.expand_as(y))
            return
        # the 1x1 expand sees its own pixel only
        own = mask > 0
        if op == "fire_pool":
            own, touched = (torch.nn.functional.max_pool2d(t.float(), 3, 2) > 0 for t in (own, touched))
        assert torch.equal(y[:, :40], own.expand_as(y[:, :40]))
        assert torch.equal(y[:, 40:], touched.expand_as(y[:, 40:]))

    @pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
    def test_corners_of_activations_between(self, activation):
        """NaN, infinities and the activations' corners come out of the middle of a block as ATen has them."""
        values = torch.tensor([float("nan"), float("inf"), float("-inf"), -4.0, -3.0, -1.0, -0.0, 0.0, 2.0, 3.0, 6.0, 7.0])
        x = values.view(1, 1, 3, 4).to(self.device)
        one = torch.ones(1, 1, 1, 1, device=self.device)
        centre = torch.zeros(1, 1, 3, 3, device=self.device)
        centre[0, 0, 1, 1] = 1
        finite = x.isfinite()
        x = torch.where(finite, x, 0.0)  # a non-finite neighbour times a zero tap is NaN, in ATen too
        y = launcher("separable")(x, centre, None, one, None, (1, 1), (1, 1), activation)
        torch.testing.assert_close(y, reference.ACTIVATIONS[activation](x))
        alone = values.view(-1, 1, 1, 1).to(self.device)
        wanted = reference.inverted_residual(alone, one, None, centre, None, one, None, activation=activation)
        y = launcher("inverted_residual")(alone, one, None, centre, None, one, None, None, (1, 1), (1, 1), activation, activation)
        torch.testing.assert_close(y, wanted, equal_nan=True)
