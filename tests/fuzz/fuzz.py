"""Coverage-guided fuzzing of what takes its arguments from outside, from the saved corpus on. Failures are left in out/fuzz.

python tests/fuzz/fuzz.py [--seconds 60] [--save] [operators arguments checkpoints]

operators: every compiled operator, packed weights and programs included, by libFuzzer under the address and undefined-behaviour sanitizers
(clang and its runtime).
arguments: the public functions' checks in Python; checkpoints: files given as `weights=`; both by atheris (pip install atheris).
--save: what reached something new joins tests/fuzz/corpus; of the operators' inputs, the smallest that reach as much.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from core import programs  # noqa: E402

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
OUT = ROOT / "out" / "fuzz"
# A tensor larger than this is refused as one that the machine has no memory for.
MEGABYTES = 64
SANITIZER = f"allocator_may_return_null=1:max_allocation_size_mb={MEGABYTES}:quarantine_size_mb=32:detect_leaks=0"
# Every report ends the run. vptr would look into torch's classes, which are not instrumented.
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"]
LIMITS = ["-timeout=30", "-rss_limit_mb=4096"]


def jobs() -> list[tuple[list[str], Path, str]]:
    """(flags, source, name) of tests/fuzz/operators.cpp with csrc and the portable kernels, all of it instrumented."""
    from torch.utils import cpp_extension

    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    options = ["-O1", "-g1", "-fsanitize=fuzzer-no-link,address", *UNDEFINED, "-DFASTCONV_EXACT_SCRATCH", "-w"]
    core = programs.core_jobs(["scalar"], [*options, "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes])
    flags = core[-1][0]
    sources = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.stem not in ("module", "watch", "direct", "benchmark")]
    return core + [(flags, path, path.stem) for path in [*sources, ROOT / "tests/fuzz/operators.cpp"]]


def build() -> Path:
    import torch

    cxx = programs.clang()
    if cxx is None:
        sys.exit("fuzz: operators need clang and its libFuzzer (apt-get install clang)")
    folder = ROOT / "build" / "fuzz"
    libraries = Path(torch.__file__).parent / "lib"
    linking = [
        "-fsanitize=fuzzer,address,undefined",
        f"-L{libraries}",
        f"-Wl,-rpath,{libraries}",
        "-Wl,--no-as-needed",
        "-lc10",
        "-ltorch",
        "-ltorch_cpu",
    ]
    return programs.link([*cxx, *linking], programs.compile_all(cxx, jobs(), folder), folder, "operators")


def command(target: str) -> list[str]:
    return [str(build())] if target == "operators" else [sys.executable, str(ROOT / "tests" / "fuzz" / "python_targets.py"), target]


def run(target: str, seconds: int, save: bool) -> None:
    found, saved = OUT / target, CORPUS / target
    found.mkdir(parents=True, exist_ok=True)
    saved.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"ASAN_OPTIONS": SANITIZER, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    fuzzer = command(target)
    options = [*LIMITS, f"-artifact_prefix={OUT}/{target}-", "-print_final_stats=1", "-reload=0"]
    options.append(f"-max_total_time={seconds}" if seconds else "-runs=0")
    if target == "operators":
        options.append("-close_fd_mask=2")  # torch prints what it refuses
    subprocess.run([*fuzzer, *options, str(found), str(saved)], check=True, env=environment, cwd=OUT)
    if save and target == "operators":
        small = OUT / f"{target}-small"
        shutil.rmtree(small, ignore_errors=True)
        small.mkdir()
        # By edges alone: how often one is taken would keep three times as many.
        merge = [*fuzzer, *LIMITS, "-merge=1", "-use_counters=0", str(small), str(saved), str(found)]
        subprocess.run(merge, check=True, env=environment, cwd=OUT)
        shutil.rmtree(saved)
        shutil.copytree(small, saved)
    elif save:  # atheris cannot merge
        shutil.copytree(found, saved, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["operators", "arguments", "checkpoints"])
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60); 0: the saved corpus alone")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    for target in given.targets:
        run(target, given.seconds, given.save)


if __name__ == "__main__":
    main()
