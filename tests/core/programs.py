"""Builds the programs of this folder out of the kernel core, without torch, and runs them. Objects are kept under build/core.

python tests/core/programs.py exact [arguments of exact.cpp]
python tests/core/programs.py sanitize [address undefined thread memory]
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ISA_FLAGS = {
    "scalar": [],
    "neon": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}
NATIVE = {"x86_64": ["scalar", "avx2", "avx512"], "aarch64": ["scalar", "neon"]}.get(platform.machine(), ["scalar"])
# As setup.py compiles the kernels; what is compiled is the shipped code.
SHIPPED = ["-O3", "-g0"]
QUICK = ["-O1", "-g0"]
FLAGS = ["-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", f"-I{ROOT}"]

# What each is built and run with. exact runs on blocks of malloc then, and the core takes no more scratch memory than it asks for.
SANITIZERS = {
    # One call a check: inlined into the kernels they take gcc minutes to compile.
    "address": ["-fsanitize=address", "--param", "asan-instrumentation-with-call-threshold=0"],
    "undefined": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
    "memory": ["-fsanitize=memory", "-fno-sanitize-recover=all"],
}


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def clang() -> list[str] | None:
    """The newest clang++, which alone has the memory sanitizer."""
    names = ["clang++", *(f"clang++-{version}" for version in range(25, 13, -1))]
    return next(([name] for name in names if shutil.which(name)), None)


def build(name: str, isas: list[str], options: list[str] = QUICK, cxx: list[str] | None = None, root: Path = ROOT) -> Path:
    """tests/core/<name>.cpp with the kernels of these instruction sets; compiles what is older than its sources."""
    cxx = cxx or compiler()
    flags = [*FLAGS, *options, *(f"-DFASTCONV_HAS_{isa.upper()}=1" for isa in isas)]
    flags[flags.index(f"-I{ROOT}")] = f"-I{root}"
    folder = root / "build" / "core" / hashlib.sha1(" ".join([*cxx, *flags]).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    headers = max(file.stat().st_mtime for file in (root / "kernels/cpu").glob("*.h"))
    jobs = []
    for isa in isas:
        jobs.append(([f"-DFASTCONV_ISA={isa}", f"-DFASTCONV_ISA_IS_{isa.upper()}", *ISA_FLAGS[isa]], "kernels/cpu/kernels.cpp", isa))
    jobs += [([], f"kernels/cpu/{source}.cpp", source) for source in ("blocks", "isa")]
    jobs.append(([], f"tests/core/{name}.cpp", name))

    def compile_one(job) -> Path:
        own, source, target = job
        object_file, source = folder / f"{target}.o", root / source
        if not object_file.exists() or object_file.stat().st_mtime < max(headers, source.stat().st_mtime):
            part = folder / f"{target}.{os.getpid()}.o"  # two processes may build at a time
            subprocess.run([*cxx, *flags, *own, "-c", str(source), "-o", str(part)], check=True)
            part.replace(object_file)
        return object_file

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = folder / name
    if not program.exists() or program.stat().st_mtime < max(file.stat().st_mtime for file in objects):
        part = folder / f"{name}.{os.getpid()}"
        subprocess.run([*cxx, *options, *map(str, objects), "-o", str(part), "-pthread"], check=True)
        part.replace(program)
    return program


def run(command: list[str]) -> float:
    """Runs it with its output shown; returns the seconds it took. Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def sanitize(names: list[str]) -> None:
    """The edge lattice under each sanitizer, without suppressions; stops at the first report."""
    for name in names:
        cxx = compiler()
        if name == "memory":
            cxx = clang()
            if cxx is None:
                sys.exit("sanitize: the memory sanitizer needs clang (apt-get install clang); the others passed")
        options = ["-O1", "-g1", *SANITIZERS[name], *([] if name == "thread" else ["-DFASTCONV_EXACT_SCRATCH"])]
        program = build("exact", NATIVE, options, cxx)
        # Threads that really run are slow to start, and a race shows in any case that two of them share.
        seconds = run([str(program), "--heap", *(["--threads", "--one-in", "40"] if name == "thread" else [])])
        print(f"{name} sanitizer: no report, {seconds:.0f} s", flush=True)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["exact"]:
        seconds = run([str(build("exact", NATIVE, SHIPPED)), *arguments[1:]])
        if "--list" not in arguments:
            print(f"exact: all equal, no byte outside its arguments, {seconds:.0f} s")
    elif arguments[:1] == ["sanitize"]:
        sanitize(arguments[1:] or list(SANITIZERS))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
