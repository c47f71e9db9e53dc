"""Compiles every configuration that ships for sm_80, sm_90 and gfx942, without a GPU, and reads what the machine code needs.

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

GRADIENTS = ("depthwise_backward_input", "depthwise_backward_weight", "depthwise_backward_sum")
FILES = {"expand_depthwise": "inverted_residual"} | dict.fromkeys(GRADIENTS, "depthwise_backward")  # operations in another's file
BLOCK_DTYPES = {"half": ("f16", "bf16"), "tf32": ("tf32",), "f32": ("f32",), "narrow": ("f32", "bf16")}
POINTER = {"f32": "*fp32", "tf32": "*fp32", "f16": "*fp16", "bf16": "*bf16"}
DTYPES = dict.fromkeys(("half", "half small", "half narrow"), ("f16", "bf16")) | {"tf32": ("tf32",), "f32": ("f32",)}
DTYPES |= dict.fromkeys(("narrow", "plane"), ("f32", "f16", "bf16"))


def jobs() -> list[dict]:
    """One entry per binary: each tile that ships, in each dtype, at its heaviest (bias, residual, silu); then the two variants of a
    kernel that need more registers, with the tiles that serve them: channels of no alignment, and images past 2^31 elements."""
    found = []
    for arch in configs.ARCHITECTURES:
        for kind, tables in configs.DEPTHWISE.items():
            for (kernel, stride), tiles in tables.items():
                for dtype in BLOCK_DTYPES[kind]:
                    align = 1 if kind == "narrow" else 8
                    # fp16 is bf16's code with another instruction: one tile of it
                    found += [_depthwise(arch, dtype, kernel, stride, tile, align) for tile in (tiles[:1] if dtype == "f16" else tiles)]
        for kernel in (3, 5):
            found.append(_depthwise(arch, "bf16", kernel, 1, configs.DEPTHWISE["half"][kernel, 1][0], wide=True))
        for kind, tiles in configs.MAX_POOL.items():
            found += [_max_pool(arch, dtype, tile, 8 if kind in ("half", "f32") else 1) for dtype in DTYPES[kind] for tile in tiles]
        found.append(_max_pool(arch, "bf16", configs.MAX_POOL["half"][0], stride=1))
        found.append(_max_pool(arch, "bf16", configs.MAX_POOL["half"][0], wide=True))
        found += [job for dtype in ("bf16", "f32") for job in _gradients(arch, dtype)]
        found += [_input_gradient(arch, "f16", configs.DEPTHWISE_INPUT["half"][0])]  # bf16's code with another instruction
        found += [_weight_gradient(arch, "f16", kernel, tables["half"][0]) for kernel, tables in configs.DEPTHWISE_WEIGHT.items()]
        for op, table in (("pointwise", configs.POINTWISE), ("fire_expand", configs.FIRE_EXPAND)):
            for kind, tiles in table[arch].items():
                align = 1 if kind == "half narrow" else 8
                found += [_matmul(op, arch, dtype, tile, align) for dtype in DTYPES[kind] for tile in tiles]
        for (op, known), rows in configs.FEW.items():
            tiles = dict.fromkeys(tile for *_, tile in rows if known == arch)
            found += [job for job in (_matmul(op, arch, "bf16", tile) for tile in tiles) if job not in found]
            found += [_matmul(op, arch, "bf16", tile, gate=True) for tile in tiles if op == "pointwise"]
        for dtype in ("bf16", "f32"):
            for op, width in (("fire_expand", 64), ("pointwise", 32), ("pointwise", 64), ("pointwise", 128)):
                job = _matmul(op, arch, dtype, _tile(op, arch, dtype, 49, width), align=1)
                found += [job] if job not in found else []
        # a gated projection holds its gate beside x; what is gated is never narrow, nor an image of many pixels
        found += [_matmul("pointwise", arch, "bf16", tile, gate=True) for tile in configs.POINTWISE[arch]["half"]]
        for op in configs.BLOCKS:
            for kind, tiles in configs.TABLES[op][arch].items():
                for dtype in BLOCK_DTYPES[kind]:
                    # fp16 is bf16's code with another instruction: one tile of it
                    those = tiles[:1] if dtype == "f16" else tiles
                    found += [job for tile in those for job in _block(op, arch, dtype, tile, kind == "narrow", tiles)]
            if op != "head":
                tiles = configs.TABLES[op][arch]["half"][:1]
                found += _block(op, arch, "bf16", tiles[0], False, tiles, wide=True)
        found.append(_matmul("fire_expand", arch, "bf16", _tile("fire_expand", arch, "bf16", 64, 64), wide=True))
    found += _staged()
    return found


def _staged() -> list[dict]:
    """Each tile of the kernels for Hopper, with its heaviest problem among MobileNet V2's early blocks and SqueezeNet's fires."""
    found = []
    for (kernel, stride), tiles in configs.STAGED.items():
        for tile in tiles:
            channels = 16 if tile.spare else 24
            blocks = [("inverted_residual", channels, 144, 24), ("separable", 32, 0, 16), ("expand_depthwise", 80, 480, 480)]
            for op, c, e, o in blocks:
                image = (14 * stride,) * 2
                problem = configs.Problem(op, "bf16", 14, 14, c, o, kernel, (stride,) * 2, (1, 1), e, image)
                if tile in configs.staged(problem, "sm_90"):
                    found.append(_staged_job(problem, tile))
    for stride, tiles in configs.STAGED_FEW.items():
        for tile in tiles:
            for op, c, e, o in (("inverted_residual", 24, 144, 24), ("separable", 32, 0, 64)):
                found.append(_staged_job(configs.Problem(op, "bf16", 14, 14, c, o, 3, (stride,) * 2, (1, 1), e, (14 * stride,) * 2), tile))
    problem = configs.Problem("inverted_residual", "f16", 14, 14, 24, 24, 3, (1, 1), (1, 1), 144)
    found += [_staged_job(problem, configs.STAGED[3, 1][0], wide) for wide in (False, True)]
    for tile in configs.STAGED_FIRE:
        for c, e, o in ((64, 16, 64), (512, 64, 256)):
            problem = configs.Problem("fire", "bf16", 13, 13, c, o, 3, (1, 1), (1, 1), e)
            if tile in configs.staged(problem, "sm_90"):
                constants = {"ALIGN_IN": 16, "ALIGN_BETWEEN": 16, "ALIGN_1X1": 16, "ALIGN_3X3": 16, "WIDE": False, "SIDE": configs.SIDE}
                constants |= {"CHANNELS": tile.channels, "BETWEEN": configs.padded(e), "DEPTH_IN": tile.depth_in, "WARPS": tile.num_warps}
                found.append({"op": "staged_fire", "arch": "sm_90", "dtype": "bf16", "constants": constants, "options": _capped(tile)})
    return found


def _staged_job(problem, tile, wide: bool = False) -> dict:
    expands, projects = problem.op != "separable", problem.op != "expand_depthwise"
    expanded = problem.between if expands else problem.in_channels
    constants = {"K": problem.kernel, "STRIDE_H": problem.stride[0], "STRIDE_W": problem.stride[1], "WIDE": wide}
    constants |= {"ALIGN_IN": 8, "ALIGN_BETWEEN": 16, "ALIGN_OUT": 8, "EXPAND": expands, "PROJECT": projects}
    depth_in = tile.depth_in(problem.in_channels)
    constants |= {"SPARE": expands and problem.in_channels < depth_in, "PARTIAL": expanded % tile.depth != 0}
    constants |= {"EXPAND_ACTIVATION": "silu" if expands else None, "DEPTHWISE_ACTIVATION": "silu", "ACTIVATION": None}
    constants |= {"STRIPS": tile.strips, "RUN": tile.run, "COLUMNS": tile.columns, "DEPTH": tile.depth, "DEPTH_IN": depth_in}
    constants |= {"CHANNELS": configs.padded(problem.out_channels) if projects else 16, "WARPS": tile.num_warps}
    missing = [] if expands else ["expand_ptr", "expand_bias_ptr"]
    missing += ["sums_ptr"] if projects else ["project_ptr", "project_bias_ptr", "residual_ptr"]
    constants |= dict.fromkeys(missing)
    return {"op": "staged", "arch": "sm_90", "dtype": problem.dtype, "constants": constants, "options": _capped(tile)}


def _capped(tile) -> dict:
    return {"num_warps": tile.num_warps} | ({"maxnreg": tile.registers} if tile.registers else {})


def _tile(op: str, arch: str, dtype: str, in_channels: int, out_channels: int):
    return configs.config(configs.Problem(op, dtype, 56, 56, in_channels, out_channels), arch)


def _depthwise(arch: str, dtype: str, kernel: int, stride: int, tile, align: int = 8, wide: bool = False) -> dict:
    """The stride of columns is a multiplier; that of rows decides which taps a row meets."""
    constants = {"K": kernel, "STRIDE_H": stride, "STRIDE_W": stride, "ALIGN": align, "WIDE": wide, "ACTIVATION": "silu"}
    return {"op": "depthwise", "arch": arch, "dtype": dtype, "constants": constants | tile.constants, "options": _options(arch, tile)}


def _options(arch: str, tile) -> dict:
    """As `launch.options`."""
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | ({} if arch == "gfx942" else {"maxnreg": 255})


def _max_pool(arch: str, dtype: str, tile, align: int = 8, stride: int = 2, wide: bool = False) -> dict:
    constants = {"STRIDE_H": stride, "STRIDE_W": stride, "ALIGN": align, "WIDE": wide} | tile.constants
    return {
        "op": "max_pool",
        "arch": arch,
        "dtype": dtype,
        "constants": constants,
        "options": {"num_warps": tile.num_warps, "num_stages": 3},
    }


def _gradients(arch: str, dtype: str) -> list[dict]:
    """Those of depthwise: every tile at stride 2 (at stride 1 the input's is the forward kernel), and the variants with one."""
    kind = "f32" if dtype == "f32" else "half"
    found = [_input_gradient(arch, dtype, tile) for tile in configs.DEPTHWISE_INPUT[kind]]
    found += [_input_gradient(arch, dtype, tile, align=1) for tile in configs.DEPTHWISE_INPUT["narrow"]]
    found += [_input_gradient(arch, dtype, configs.DEPTHWISE_INPUT[kind][0], stride=stride) for stride in ((1, 2), (2, 1))]
    for kernel, tables in configs.DEPTHWISE_WEIGHT.items():
        found += [_weight_gradient(arch, dtype, kernel, tile) for tile in tables[kind]]
        found += [_weight_gradient(arch, dtype, kernel, tile, align=1) for tile in tables["narrow"]]
    if dtype == "bf16":
        found.append(_input_gradient(arch, dtype, configs.DEPTHWISE_INPUT["half"][0], wide=True))
        found.append(_weight_gradient(arch, dtype, 3, configs.DEPTHWISE_WEIGHT[3]["half"][0], wide=True))
    for align in (8, 1):
        constants = {"TAPS": 25, "ALIGN": align, "SPLITS": 32, "CHANNELS": 32}
        options = {"num_warps": 4, "num_stages": 3}
        found.append({"op": "depthwise_backward_sum", "arch": arch, "dtype": dtype, "constants": constants, "options": options})
    return found


def _input_gradient(arch: str, dtype: str, tile, align: int = 8, wide: bool = False, stride: tuple[int, int] = (2, 2)) -> dict:
    constants = {"K": 5, "STRIDE_H": stride[0], "STRIDE_W": stride[1], "ALIGN": align, "WIDE": wide}
    constants |= {"ROWS": tile.rows, "COLS": tile.cols, "CHANNELS": tile.channels}
    options = {"num_warps": tile.num_warps, "num_stages": 3}
    return {"op": "depthwise_backward_input", "arch": arch, "dtype": dtype, "constants": constants, "options": options}


def _weight_gradient(arch: str, dtype: str, kernel: int, tile, align: int = 8, wide: bool = False) -> dict:
    constants = {"K": kernel, "STRIDE_H": 2, "STRIDE_W": 2, "ALIGN": align, "WIDE": wide}
    constants |= {"TAP_ROWS": tile.tap_rows, "PIXELS": tile.pixels, "CHANNELS": tile.channels}
    options = {"num_warps": tile.num_warps, "num_stages": 3}
    return {"op": "depthwise_backward_weight", "arch": arch, "dtype": dtype, "constants": constants, "options": options}


def _block(op: str, arch: str, dtype: str, tile, narrow: bool, tiles: tuple, wide: bool = False) -> list[dict]:
    """A tile at its heaviest: K = 5, stride 2, silu; where it may loop over input channels (the deepest of tiles), with that loop."""
    align = 1 if narrow else 8
    constants = {"PRECISION": "tf32" if dtype == "tf32" else "ieee", "WIDE": wide}
    if op == "head":
        constants |= {"PIXELS": tile.lanes, "CHANNELS": tile.channels, "DEPTH": tile.depth}
    else:
        constants |= tile.constants
    if op in ("separable", "inverted_residual", "expand_depthwise"):
        constants |= {"K": 5, "DEPTHWISE_ACTIVATION": "silu"}
    if op in ("separable", "inverted_residual", "expand_depthwise", "fire_pool", "stem", "stem_pool"):
        constants |= {"STRIDE_H": 2, "STRIDE_W": 2}
    if op in ("separable", "inverted_residual", "stem", "stem_pool", "head"):
        constants |= {"ACTIVATION": "silu", "ALIGN_OUT": align}
    if not op.startswith("stem"):
        constants |= {"ALIGN_IN": align}
    if op in ("inverted_residual", "expand_depthwise"):
        constants |= {"EXPAND_ACTIVATION": "silu", "ALIGN_BETWEEN": align}
    if op.startswith("fire"):
        constants |= {"ALIGN_1X1": align, "ALIGN_3X3": align} | ({"ALIGN_BETWEEN": align} if op == "fire" else {})
    if op == "expand_depthwise":
        del constants["CHANNELS"]
    if op == "stem_pool":
        constants |= {"C": 3, "KH": 3, "KW": 3, "POOL_H": 2, "POOL_W": 2, "EDGES": True}
    if op == "stem":
        constants |= {"C": 3, "KH": 7, "KW": 7, "STEPS": 7, "BY_ROWS": True, "EDGES": True, "PAIRS": False, "WRAPS": 0}
    job = {"op": op, "arch": arch, "dtype": dtype, "constants": constants, "options": _options(arch, tile)}
    if op == "stem":
        small = job | {"constants": constants | {"KH": 3, "KW": 3, "STEPS": 1, "BY_ROWS": False}}
        pairs = job | {"constants": constants | {"EDGES": False, "PAIRS": True, "WRAPS": 2}}
        return [job, small] + ([pairs] if dtype in ("f16", "bf16") else [])
    if not tile.depth_in:
        return [job]
    deepest = op == "fire" or tile.depth_in == max(other.depth_in for other in tiles)
    return [job | {"constants": constants | {"DEPTH_IN": tile.depth_in, "STEPS": steps}} for steps in ((1, 2) if deepest else (1,))]


def _matmul(op: str, arch: str, dtype: str, tile, align: int = 8, wide: bool = False, gate: bool = False) -> dict:
    constants = {"ALIGN_IN": align, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    constants |= {"PIXELS": tile.pixels, "CHANNELS": tile.channels, "DEPTH": tile.depth}
    if op == "pointwise":
        constants |= {"ALIGN_OUT": align, "ACTIVATION": "silu"} | ({} if gate else {"gate_ptr": None})
    else:
        constants |= {"ALIGN_1X1": align, "ALIGN_3X3": align, "WIDE": wide}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {"op": op, "arch": arch, "dtype": dtype, "constants": constants, "options": options}


def name(job: dict) -> str:
    c = job["constants"]
    fields = ("STRIPS", "RUN", "COLUMNS", "LANES", "ROWS", "COLS", "PIXELS", "BETWEEN", "CHANNELS", "DEPTH", "DEPTH_IN")
    variant = f"-k{c['K']}s{c['STRIDE_H']}" if "K" in c else f"-stages{job['options'].get('num_stages', 1)}"
    if "EXPAND" in c:
        variant += f"-{'expand' if c['EXPAND'] else 'load'}-{'project' if c['PROJECT'] else 'sum'}"
    variant += f"-registers{job['options']['maxnreg']}" if job["options"].get("maxnreg", 255) != 255 else ""
    if job["op"] == "stem":
        variant += "-pairs" if c["PAIRS"] else "-rows" if c["BY_ROWS"] else "-whole"
    variant += "-s1" if job["op"] == "max_pool" and c["STRIDE_H"] == 1 else ""
    variant += ("" if aligned(job) else "-unaligned") + ("-wide" if c.get("WIDE") else "") + ("-loop" if c.get("STEPS") == 2 else "")
    variant += "-gate" if job["op"] == "pointwise" and "gate_ptr" not in c else ""
    tile = "x".join(str(c[field]) for field in fields if field in c)
    return f"{job['op']}-{job['arch']}-{job['dtype']}-{tile}-warps{job['options']['num_warps']}{variant}"


def aligned(job: dict) -> bool:
    return next((value for key, value in job["constants"].items() if key.startswith("ALIGN")), 8) >= 8


def compile_job(job: dict) -> dict:
    """Shared memory, registers, stack (spills included), the share of loaded bytes in 16-byte accesses, and the tensor-core instruction."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    file = FILES.get(job["op"], job["op"])
    kernel = getattr(importlib.import_module(f"fastconv.kernels.gpu.{file}"), f"{job['op']}_kernel")
    if "PDL" in kernel.arg_names:  # as launch.Launcher has it
        job = job | {"constants": job["constants"] | {"PDL": job["arch"] == "sm_90"}}
    signature, aligned = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in job["constants"]:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument == "sums_ptr" else POINTER[job["dtype"]]
            aligned[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    if job["op"].startswith("staged"):
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(kernel, signature, constexprs=job["constants"], attrs=aligned)
    if job["arch"] == "gfx942":
        return _amd(triton.compile(source, target=GPUTarget("hip", job["arch"], 64), options=job["options"]))
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


def _amd(compiled) -> dict:
    """The same facts of a gfx942 binary; its spills are those of vector registers."""
    code = compiled.asm["amdgcn"]
    loads = [32 * int(words or 1) for words in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", code)]
    loads += [16 for _ in re.findall(r"(?:global|buffer)_load_(?:u|s)?short", code)]
    return {
        "shared": compiled.metadata.shared,
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "stack": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", code)[1])
        + int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)[1]),
        "wide_loads": round(sum(bits for bits in loads if bits == 128) / sum(loads), 3),
        "tensor_cores": "mfma" if "v_mfma" in code else None,
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
    sources = b"".join(
        (folder / file).read_bytes() for file in (f"{FILES.get(job['op'], job['op'])}.py", "march.py", "epilogue.py", "staged.py")
    )
    mine = Path(__file__).read_bytes()
    return hashlib.sha256(sources + mine + json.dumps(job, sort_keys=True).encode() + triton.__version__.encode()).hexdigest()


def compile_all(wanted: list[dict], known: dict[str, dict]) -> dict[str, dict]:
    """{key(job): facts} of the jobs, and what is known of others; compiles those missing from `known` in one process per core."""
    missing = [job for job in wanted if key(job) not in known]
    if not missing:
        return known
    # spawn: triton and torch hold threads that do not survive a fork
    workers = min(len(missing), len(os.sched_getaffinity(0)))
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return known | {key(job): facts for job, facts in zip(missing, pool.map(compile_job, missing, chunksize=4), strict=False)}


if __name__ == "__main__":
    facts = compile_all(jobs(), {})
    for job in jobs():
        print(f"{name(job):55s}", *(f"{k} {v}" for k, v in facts[key(job)].items()))
