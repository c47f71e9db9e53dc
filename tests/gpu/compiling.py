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
DTYPES = {"half": ("f16", "bf16"), "half small": ("f16", "bf16"), "tf32": ("tf32",), "f32": ("f32",)}


def jobs() -> list[dict]:
    """One entry per kernel binary: the operation, architecture, dtype and constants, each at its heaviest (bias, residual, silu)."""
    found = []
    for arch in configs.ARCHITECTURES:
        for kind, tiles in configs.DEPTHWISE.items():
            for dtype in DTYPES[kind]:
                for tile in tiles:
                    for kernel, stride in ((3, 1), (5, 2)):  # the stride changes one multiplier, and no register
                        constants = {"K": kernel, "STRIDE_H": stride, "STRIDE_W": stride, "ALIGN": 8, "WIDE": False, "ACTIVATION": "silu"}
                        constants |= {"ROWS": tile.rows, "COLS": tile.cols, "CHANNELS": tile.channels}
                        options = {"num_warps": tile.num_warps, "num_stages": 3}
                        found.append({"op": "depthwise", "arch": arch, "dtype": dtype, "constants": constants, "options": options})
        for op, table in (("pointwise", configs.POINTWISE), ("fire_expand", configs.FIRE_EXPAND)):
            for kind, tiles in table[arch].items():
                for dtype in DTYPES[kind]:
                    for tile in tiles:
                        constants = {"ALIGN_IN": 8, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
                        constants |= {"PIXELS": tile.pixels, "CHANNELS": tile.channels, "DEPTH": tile.depth}
                        if op == "pointwise":
                            constants |= {"ALIGN_OUT": 8, "ACTIVATION": "silu"}
                        else:
                            constants |= {"ALIGN_1X1": 8, "ALIGN_3X3": 8, "WIDE": False}
                        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
                        found.append({"op": op, "arch": arch, "dtype": dtype, "constants": constants, "options": options})
    return found


def name(job: dict) -> str:
    c = job["constants"]
    tile = (c["ROWS"], c["COLS"], c["CHANNELS"]) if job["op"] == "depthwise" else (c["PIXELS"], c["CHANNELS"], c["DEPTH"])
    variant = f"-k{c['K']}s{c['STRIDE_H']}" if job["op"] == "depthwise" else f"-stages{job['options']['num_stages']}"
    return f"{job['op']}-{job['arch']}-{job['dtype']}-{'x'.join(map(str, tile))}{variant}"


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
