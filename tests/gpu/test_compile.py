"""Every tile that ships, compiled for sm_80 and sm_90, no GPU needed: no spills, shared memory that fits, wide loads, tensor cores."""

import compiling
import pytest

from fastconv.kernels.gpu import configs

pytest.importorskip("triton")

# What a block may use: 99 KiB serves sm_86, sm_89 and sm_120 too, which run sm_80's table (sm_80 itself has 163 KiB).
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024}
JOBS = compiling.jobs()


@pytest.fixture(scope="session")
def facts(pytestconfig):
    """Compiled in parallel on first use, and kept in pytest's cache until a kernel, its job or triton changes."""
    cache = getattr(pytestconfig, "cache", None)  # absent under -p no:cacheprovider
    known = cache.get("fastconv/gpu-binaries", {}) if cache else {}
    known = {key: known[key] for key in map(compiling.key, JOBS) if key in known}
    found = compiling.compile_all(known)
    if cache and found != known:
        cache.set("fastconv/gpu-binaries", found)
    return found


@pytest.mark.parametrize("job", JOBS, ids=compiling.name)
def test_binary(job, facts):
    binary = facts[compiling.key(job)]
    assert binary["stack"] == 0, "registers spill"
    assert binary["shared"] <= SHARED_LIMIT[job["arch"]]
    assert binary["registers"] * 32 * job["options"]["num_warps"] <= 65536
    if compiling.aligned(job):
        assert binary["wide_loads"] >= 0.75  # the rest is biases
    # ieee fp32 has no tensor-core instruction
    matmul = job["op"] != "depthwise" and job["dtype"] != "f32"
    assert binary["tensor_cores"] == ({"sm_80": "mma.sync", "sm_90": "wgmma"}[job["arch"]] if matmul else None)


def shipped(op: str, arch: str) -> set:
    tables = {"depthwise": configs.DEPTHWISE, "pointwise": configs.POINTWISE[arch], "fire_expand": configs.FIRE_EXPAND[arch]}
    return {(dtype, tile) for kind, tiles in tables[op].items() for tile in tiles for dtype in compiling.DTYPES[kind]}


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
@pytest.mark.parametrize("op", ["depthwise", "pointwise", "fire_expand"])
def test_every_tile_is_chosen_and_no_other(op, arch):
    chosen = set()
    for dtype in ("f32", "f16", "bf16") if op == "depthwise" else ("f32", "tf32", "f16", "bf16"):
        for size in (7, 13, 14, 15, 56):
            for in_channels in (1, 3, 16, 24, 32, 40, 48, 64, 96, 160, 960):
                for out_channels in (1, 16, 24, 32, 64, 72, 96, 128, 1000):
                    problem = configs.Problem(op, dtype, size, size, in_channels, out_channels)
                    chosen.add((dtype, configs.config(problem, arch)))
    assert {(dtype.replace("tf32", "f32") if op == "depthwise" else dtype, tile) for dtype, tile in chosen} == shipped(op, arch)


def test_depthwise_tiles_leave_few_lanes_idle():
    for channels in (16, 24, 32, 40, 64, 72, 88, 96, 120, 144, 184, 200, 240, 480, 576, 672, 960):
        tile = configs.config(configs.Problem("depthwise", "bf16", 28, 28, channels, channels), "sm_90")
        assert -(-channels // tile.channels) * tile.channels <= 1.34 * channels
