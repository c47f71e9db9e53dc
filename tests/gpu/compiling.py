"""Compiles every configuration that ships for sm_80 and sm_90, without a GPU, and reads what the machine code needs.

`python tests/gpu/compiling.py` prints the table that test_compile.py checks.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path

from fastconv.kernels.gpu import configs

POINTER = {"f32": "*fp32", "tf32": "*fp32", "f16": "*fp16", "bf16": "*bf16"}
DTYPES = {"half": ("f16", "bf16"), "half small": ("f16", "bf16"), "tf32": ("tf32",), "f32": ("f32",), "narrow": ("f32", "f16", "bf16")}


def jobs() -> list[dict]:
    """One entry per binary: each tile that ships, in each dtype, at its heaviest (bias, residual, silu); then the two variants of a
    kernel that need more registers, with the tiles that serve them: channels of no alignment, and images past 2^31 elements."""
    found = []
    for arch in configs.ARCHITECTURES:
        for kind, tiles in configs.DEPTHWISE.items():
            for dtype in DTYPES[kind]:
                # K = 3 is the same code with fewer taps, stride 1 with another multiplier
                found += [_depthwise(arch, dtype, tile) for tile in tiles]
        for op, table in (("pointwise", configs.POINTWISE), ("fire_expand", configs.FIRE_EXPAND)):
            for kind, tiles in table[arch].items():
                found += [_matmul(op, arch, dtype, tile) for dtype in DTYPES[kind] for tile in tiles]
        for dtype in ("bf16", "f32"):
            found.append(_depthwise(arch, dtype, _tile("depthwise", arch, dtype, 3, 3), align=1))
            found.append(_matmul("fire_expand", arch, dtype, _tile("fire_expand", arch, dtype, 49, 64), align=1))
            for width in (32, 64, 128):
                job = _matmul("pointwise", arch, dtype, _tile("pointwise", arch, dtype, 49, width), align=1)
                found += [job] if job not in found else []
        found.append(_depthwise(arch, "bf16", _tile("depthwise", arch, "bf16", 64, 64), wide=True))
        found.append(_matmul("fire_expand", arch, "bf16", _tile("fire_expand", arch, "bf16", 64, 64), wide=True))
    return found


def _tile(op: str, arch: str, dtype: str, in_channels: int, out_channels: int):
    return configs.config(configs.Problem(op, dtype, 56, 56, in_channels, out_channels), arch)


def _depthwise(arch: str, dtype: str, tile, align: int = 8, wide: bool = False) -> dict:
    constants = {"K": 5, "STRIDE_H": 2, "STRIDE_W": 2, "ALIGN": align, "WIDE": wide, "ACTIVATION": "silu"}
    constants |= {"ROWS": tile.rows, "COLS": tile.cols, "CHANNELS": tile.channels}
    options = {"num_warps": tile.num_warps, "num_stages": 3}  # num_stages: triton's default, of no effect without a dot
    return {"op": "depthwise", "arch": arch, "dtype": dtype, "constants": constants, "options": options}


def _matmul(op: str, arch: str, dtype: str, tile, align: int = 8, wide: bool = False) -> dict:
    constants = {"ALIGN_IN": align, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    constants |= {"PIXELS": tile.pixels, "CHANNELS": tile.channels, "DEPTH": tile.depth}
    if op == "pointwise":
        constants |= {"ALIGN_OUT": align, "ACTIVATION": "silu"}
    else:
        constants |= {"ALIGN_1X1": align, "ALIGN_3X3": align, "WIDE": wide}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {"op": op, "arch": arch, "dtype": dtype, "constants": constants, "options": options}


def name(job: dict) -> str:
    c = job["constants"]
    tile = (c["ROWS"], c["COLS"], c["CHANNELS"]) if job["op"] == "depthwise" else (c["PIXELS"], c["CHANNELS"], c["DEPTH"])
    variant = f"-k{c['K']}s{c['STRIDE_H']}" if job["op"] == "depthwise" else f"-stages{job['options']['num_stages']}"
    variant += ("" if aligned(job) else "-unaligned") + ("-wide" if c.get("WIDE") else "")
    return f"{job['op']}-{job['arch']}-{job['dtype']}-{'x'.join(map(str, tile))}{variant}"


def aligned(job: dict) -> bool:
    return job["constants"].get("ALIGN", job["constants"].get("ALIGN_IN")) == 8


def compile_job(job: dict) -> dict:
    """Shared memory, registers, stack (spills included), the share of loaded bytes in 16-byte accesses, and the tensor-core instruction."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"fastconv.kernels.gpu.{job['op']}"), f"{job['op']}_kernel")
    signature, aligned = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in job["constants"]:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTER[job["dtype"]]
            aligned[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    source = ASTSource(kernel, signature, constexprs=job["constants"], attrs=aligned)
    target = GPUTarget("cuda", int(job["arch"].removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=job["options"])
    usage, ptx = _usage(compiled.asm["cubin"]), compiled.asm["ptx"]
    loads = [int(count or 1) * int(bits) for count, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)]
    loads += [8 * int(size, 16) for size in re.findall(r"cp\.async\S* \[.*\], \[.*\], (0x\w+)", ptx)]
    return {
        "shared": compiled.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "wide_loads": round(sum(bits for bits in loads if bits == 128) / sum(loads), 3),
        "tensor_cores": next((name for name in ("wgmma", "mma.sync") if name in ptx), None),
    }


def _usage(cubin: bytes) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def key(job: dict) -> str:
    """Changes when the job, a kernel source or triton changes."""
    import triton

    folder = Path(configs.__file__).parent
    sources = b"".join((folder / file).read_bytes() for file in (f"{job['op']}.py", "epilogue.py"))
    mine = Path(__file__).read_bytes()
    return hashlib.sha256(sources + mine + json.dumps(job, sort_keys=True).encode() + triton.__version__.encode()).hexdigest()


def compile_all(known: dict[str, dict]) -> dict[str, dict]:
    """{key(job): facts} of every job, compiling those missing from `known` in one process per core."""
    missing = [job for job in jobs() if key(job) not in known]
    if not missing:
        return known
    # spawn: triton and torch hold threads that do not survive a fork
    workers = min(len(missing), os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return known | {key(job): facts for job, facts in zip(missing, pool.map(compile_job, missing, chunksize=4), strict=False)}


if __name__ == "__main__":
    facts = compile_all({})
    for job in jobs():
        print(f"{name(job):55s}", *(f"{k} {v}" for k, v in facts[key(job)].items()))
