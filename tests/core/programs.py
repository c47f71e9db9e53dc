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
# The matrix unit is emulated here, whatever the machine has.
ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512"], "-mavx512vbmi", "-DFASTCONV_ISA_IS_AVX512"]
ISA_SOURCES = {"amx": "kernels/cpu/amx.cpp"}
EMULATED = ["-DFASTCONV_EMULATED_TILES"]
NATIVE = {"x86_64": ["scalar", "avx2", "avx512", "amx"], "aarch64": ["scalar", "neon"]}.get(platform.machine(), ["scalar"])
# As setup.py compiles the kernels; what is compiled is the shipped code.
SHIPPED = ["-O3", "-g0"]
QUICK = ["-O1", "-g0"]
FLAGS = ["-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

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


def compile_one(command: list[str], source: Path, folder: Path, name: str) -> Path:
    """The object of a source, compiled unless the same text has been compiled by the same command before."""
    text = subprocess.run([*command, "-E", "-P", str(source)], check=True, capture_output=True).stdout
    key = hashlib.sha1(" ".join(command).encode() + text).hexdigest()[:16]
    target = folder / f"{name}-{key}.o"
    if not target.exists():
        part = folder / f"{name}-{key}.{os.getpid()}.o"  # two processes may build at a time
        subprocess.run([*command, "-c", str(source), "-o", str(part)], check=True)
        part.replace(target)
    return target


def link(command: list[str], objects: list[Path], folder: Path, name: str) -> Path:
    key = hashlib.sha1(" ".join([*command, *(file.name for file in objects)]).encode()).hexdigest()[:16]
    target = folder / f"{name}-{key}"
    if not target.exists():
        part = folder / f"{name}-{key}.{os.getpid()}"
        subprocess.run([*command, *map(str, objects), "-o", str(part), "-pthread"], check=True)
        part.replace(target)
    return target


def core_jobs(isas: list[str], flags: list[str], root: Path = ROOT) -> list[tuple[list[str], Path, str]]:
    """(flags, source, name) of every object of the core."""
    if "amx" in isas and "avx512" not in isas:  # whose kernels it has, but for a few
        isas = [*isas, "avx512"]
    flags = [*FLAGS, f"-I{root}", *flags, *EMULATED, *(f"-DFASTCONV_HAS_{isa.upper()}=1" for isa in isas)]
    jobs = []
    for isa in isas:
        own = [f"-DFASTCONV_ISA={isa}", f"-DFASTCONV_ISA_IS_{isa.upper()}", *ISA_FLAGS[isa]]
        jobs.append(([*flags, *own], root / ISA_SOURCES.get(isa, "kernels/cpu/kernels.cpp"), isa))
    return [*jobs, *((flags, root / f"kernels/cpu/{name}.cpp", name) for name in ("training", "blocks", "isa"))]


def compile_all(cxx: list[str], jobs: list[tuple[list[str], Path, str]], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: compile_one([*cxx, *job[0]], job[1], folder, job[2]), jobs))


def build(name: str, isas: list[str], options: list[str] = QUICK, cxx: list[str] | None = None, root: Path = ROOT) -> Path:
    """tests/core/<name>.cpp with the kernels of these instruction sets."""
    cxx = cxx or compiler()
    jobs = core_jobs(isas, options, root)
    jobs.append((jobs[-1][0], root / f"tests/core/{name}.cpp", name))
    folder = root / "build" / "core"
    return link([*cxx, *options], compile_all(cxx, jobs, folder), folder, name)


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
        if name != "thread":  # it runs on one
            seconds += run([str(build("check_training", NATIVE, options, cxx))])
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
