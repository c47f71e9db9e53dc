"""Every tile that ships, compiled for sm_80, sm_90 and gfx942 with no GPU: no spills, shared memory that fits, wide loads, matrix units.

Every sixth in the default run, of each operation and architecture some; the others with `-m slow`.
"""

import itertools

import compiling
import pytest

from fastconv.benchmarks import blocks
from fastconv.kernels.gpu import configs

pytest.importorskip("triton")

# What a block may use: 99 KiB serves sm_86, sm_89 and sm_120 too, which run sm_80's table (sm_80 itself has 163 KiB).
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
REGISTERS = {"sm_80": 65536, "sm_90": 65536, "gfx942": 4 * 64 * 512}
SPILL = 192  # bytes of a thread
TENSOR_CORES = {"sm_80": ("mma.sync",), "sm_90": ("wgmma", "mma.sync"), "gfx942": ("mfma",)}
JOBS = [job if number % 6 == 0 else pytest.param(job, marks=pytest.mark.slow) for number, job in enumerate(compiling.jobs())]


@pytest.fixture(scope="session")
def chosen(request) -> list[dict]:
    """The jobs of the tests that were selected."""
    return [
        item.callspec.params["job"] for item in request.session.items if item.name.startswith("test_binary[") and "job" in item.fixturenames
    ]


@pytest.fixture(scope="session")
def facts(pytestconfig, chosen):
    """Compiled in parallel on first use, and kept in pytest's cache until a kernel, its job or triton changes."""
    cache = getattr(pytestconfig, "cache", None)  # absent under -p no:cacheprovider
    known = cache.get("fastconv/gpu-binaries", {}) if cache else {}
    known = {key: known[key] for key in map(compiling.key, compiling.jobs()) if key in known}
    found = compiling.compile_all(chosen, known)
    if cache and found != known:
        cache.set("fastconv/gpu-binaries", found)
    return found


@pytest.mark.parametrize("job", JOBS, ids=compiling.name)
def test_binary(job, facts):
    binary = facts[compiling.key(job)]
    # with its registers capped, a staged block spills a little, and more programs a multiprocessor more than repay that (decision 19)
    assert binary["stack"] <= (SPILL if job["op"] == "staged" and "maxnreg" in job["options"] else 0), "registers spill"
    assert binary["shared"] <= SHARED_LIMIT[job["arch"]]
    lanes = 64 if job["arch"] == "gfx942" else 32
    assert binary["registers"] * lanes * job["options"]["num_warps"] <= REGISTERS[job["arch"]]
    if job["op"].startswith("staged"):
        assert binary["tensor_cores"] == "wgmma"
        return
    # The rest is biases and gates; a block loads taps per use, a stem pixels of few channels.
    if compiling.aligned(job) and job["op"] not in configs.BLOCKS and fills_loads(job):
        gated = job["op"] == "pointwise" and "gate_ptr" not in job["constants"]
        assert binary["wide_loads"] >= (0.7 if gated else 0.75)
    if job["op"].startswith(("depthwise", "max_pool")) or (job["dtype"] == "f32" and job["arch"] != "gfx942"):
        assert binary["tensor_cores"] is None  # ieee fp32 has no tensor-core instruction there
    elif job["op"] in configs.BLOCKS:
        assert binary["tensor_cores"] in TENSOR_CORES[job["arch"]]
    else:
        assert binary["tensor_cores"] == TENSOR_CORES[job["arch"]][0]


def fills_loads(job: dict) -> bool:
    """Whether a tile has 16 bytes for every thread. Some of gfx942, whose warps have 64 threads, and some of depthwise have 8, and one of
    fire_expand, of its weights."""
    if job["arch"] == "gfx942":
        return False
    c = job["constants"]
    loaded = {"depthwise": ("LANES", "CHANNELS"), "fire_expand": ("CHANNELS", "DEPTH")}.get(job["op"])
    item = 2 if job["dtype"] in ("f16", "bf16") else 4
    return loaded is None or c[loaded[0]] * c[loaded[1]] * item >= 512 * job["options"]["num_warps"]


def test_blocks_of_64_lanes_take_wgmma(chosen, facts):
    """What 64 lanes are for: sm_90's warpgroup instruction, twice the rate of mma.sync."""
    all_wide = [
        job
        for job in compiling.jobs()
        if job["op"] in configs.BLOCKS and (job["arch"], job["dtype"], job["constants"].get("LANES")) == ("sm_90", "bf16", 64)
    ]
    assert len(all_wide) > 20
    wide = [job for job in all_wide if job in chosen]
    if not wide:
        pytest.skip("none of their binaries was selected")
    assert {facts[compiling.key(job)]["tensor_cores"] for job in wide} == {"wgmma"}


def shipped(op: str, arch: str) -> set:
    table = {"max_pool": configs.MAX_POOL, "pointwise": configs.POINTWISE[arch], "fire_expand": configs.FIRE_EXPAND[arch]}[op]
    return {(dtype, tile) for kind, tiles in table.items() for tile in tiles for dtype in compiling.DTYPES[kind]}


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
@pytest.mark.parametrize("op", ["max_pool", "pointwise", "fire_expand"])
def test_every_tile_is_chosen_and_no_other(op, arch):
    chosen = set()
    for dtype in ("f32", "f16", "bf16") if op == "max_pool" or arch == "gfx942" else ("f32", "tf32", "f16", "bf16"):  # tf32 is NVIDIA's
        for size in (7, 13, 14, 15, 56):
            for in_channels in (1, 3, 16, 24, 32, 40, 48, 64, 96, 160, 960):
                for out_channels in (1, 16, 24, 32, 64, 72, 96, 128, 1000):
                    problem = configs.Problem(op, dtype, size, size, in_channels, out_channels)
                    chosen.add((dtype, configs.config(problem, arch)))
    assert chosen == shipped(op, arch)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_every_depthwise_tile_is_chosen(kernel, stride):
    for kind, dtype, aligned in (("half", "bf16", 8), ("f32", "tf32", 4), ("narrow", "f16", 1)):
        chosen = {
            depthwise_tile(dtype, size, channels, kernel, stride)
            for size in (4, 7, 8, 13, 14, 16, 28, 56, 112)
            for channels in (3, 8, 16, 24, 32, 40, 64, 72, 96, 120, 960)
            if channels % aligned == 0 and not (aligned == 1 and channels % 8 == 0)
        }
        assert chosen == set(configs.DEPTHWISE[kind][kernel, stride])


def depthwise_tile(dtype: str, size: int, channels: int, kernel: int = 3, stride: int = 1):
    geometry = (kernel, (stride, stride), (kernel // 2, kernel // 2), 0, (size * stride, size * stride))
    return configs.config(configs.Problem("depthwise", dtype, size, size, channels, channels, *geometry), "sm_90")


def gradient_tiles(op: str, kernel: int) -> set:
    return {
        configs.config(configs.Problem(op, dtype, 14, 14, channels, channels, kernel), arch)
        for arch in configs.ARCHITECTURES
        for dtype in ("f32", "f16", "bf16")
        for channels in (1, 3, 16, 24, 32, 64, 72, 96, 960)
    }


@pytest.mark.parametrize("kernel", configs.DEPTHWISE_WEIGHT)
def test_every_tile_of_a_depthwise_gradient_is_chosen_and_fits_its_kernel(kernel):
    chosen = gradient_tiles("depthwise_backward_weight", kernel)
    assert chosen == {tile for tiles in configs.DEPTHWISE_WEIGHT[kernel].values() for tile in tiles}
    assert all(kernel % tile.tap_rows == 0 for tile in chosen)
    assert gradient_tiles("depthwise_backward_input", kernel) == {tile for tiles in configs.DEPTHWISE_INPUT.values() for tile in tiles}


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
@pytest.mark.parametrize("op", configs.BLOCKS)
def test_every_block_gets_a_tile_of_its_table(op, arch):
    for dtype in ("f32", "f16", "bf16"):
        for size in (1, 7, 14, 55, 112):
            for channels in (1, 3, 16, 24, 96, 160, 512):
                for between in (0,) if op in ("separable", "fire_pool", "stem", "stem_pool", "head") else (1, 48, 960):
                    problem = configs.Problem(op, dtype, size, size, channels, 24, 3, (1, 1), (1, 1), between)
                    tiles = configs.TABLES[op][arch][configs.kind(problem)] + configs.staged(problem, arch)
                    assert configs.config(problem, arch) in tiles


def test_few_images_take_other_tiles_of_the_same_bits():
    """As many images as a benchmark has run with the table's form; one image with smaller tiles, which are no other channels at a time in
    a product's order: a bias in a spare channel stays there, sums of tiles stay as they are."""
    for block in blocks.blocks("bf16"):
        p = block.problem
        form = configs.choice(p, "sm_90")
        assert configs.few(p, form, "sm_90", 256) == form
        one = configs.few(p, form, "sm_90", 1)
        if isinstance(form, configs.StagedFireTile):
            assert one is None
        elif not isinstance(form, configs.StagedTile) or p.op == "expand_depthwise":
            assert one == form
        elif form.tiles(p.height, p.width) < 64:
            assert one.tiles(p.height, p.width) > form.tiles(p.height, p.width)
            assert (one.spare, one in configs.STAGED_FEW[p.stride[0]]) == (form.spare, not form.spare)
    for (op, arch), rows in configs.FEW.items():
        chosen = set()
        for c, o, size in itertools.product((16, 24, 32, 96, 192, 960), (16, 64, 256, 1000), (7, 14, 28)):
            problem = configs.Problem(op, "bf16", size, size, c, o)
            chosen.add(configs.matmul(problem, arch, 1))
            assert configs.matmul(problem, arch, 1 << 16) == configs.config(problem, arch)
            assert configs.matmul(problem, "sm_80", 1) == configs.config(problem, "sm_80")
        assert {tile for *_, tile in rows} <= chosen


def test_depthwise_tiles_leave_few_places_idle():
    """Of images that networks have: output pixels by channels that a tile computes for nothing."""
    for channels in (16, 24, 32, 40, 64, 72, 88, 96, 120, 144, 184, 200, 240, 480, 576, 672, 960):
        for size, most in ((112, 1.34), (56, 1.34), (28, 1.84), (14, 1.84)):
            for kernel in (3, 5):
                for stride in (1, 2):
                    tile = depthwise_tile("bf16", size, channels, kernel, stride)
                    places = tile.tiles(size, size) * tile.lanes * tile.run * -(-channels // tile.channels) * tile.channels
                    assert places <= most * size * size * channels
