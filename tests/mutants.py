"""Breaks the sources on purpose, one line at a time, and checks that a test notices each: `make mutants`.

python tests/mutants.py [--list] [-k WORD] [--resume]

A mutant is a replacement in one file, made in a copy of the checkout (build/mutants). What it touches is compiled again, for one
instruction set, and the quickest test that ought to notice runs. Prints a line a mutant; the last says how many were caught, and the exit
status is 1 unless all were. Results are kept in build/mutants/results.json: --resume leaves out those that were tried before.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from core import programs
from mutants_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "mutants" / "tree"
OBJECTS = ROOT / "build" / "mutants" / "objects"
RESULTS = ROOT / "build" / "mutants" / "results.json"
CAUGHT, SURVIVED, SKIPPED = "caught", "SURVIVED", "skipped"


class Result(NamedTuple):
    outcome: str
    how: str  # what noticed, or why not
    seconds: float


def copy_tree() -> None:
    """The checkout's files, without what was built, but with the extension, so that Python's mutants need no compiler."""
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "out", "*.egg-info", "__pycache__", ".pytest_cache", ".hypothesis")
    shutil.rmtree(TREE, ignore_errors=True)
    shutil.copytree(ROOT, TREE, ignore=left_out)
    OBJECTS.mkdir(parents=True, exist_ok=True)


def extension_jobs() -> list[tuple[list[str], Path, str]]:
    """The objects of fastconv._C with the scalar kernels alone."""
    from torch.utils.cpp_extension import include_paths

    flags = ["-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-fwrapv", "-DNDEBUG"]
    jobs = programs.core_jobs(["scalar"], flags, TREE)
    include = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    torch_flags = [*jobs[-1][0], *include, "-DTORCH_TARGET_VERSION=0x020a000000000000", '-DFASTCONV_CXX_FLAGS=""']
    there = {source for _, source, _ in jobs} | {TREE / source for source in programs.ISA_SOURCES.values()}
    rest = [source for folder in ("kernels/cpu", "csrc") for source in sorted((TREE / folder).glob("*.cpp")) if source not in there]
    return [*jobs, *((torch_flags, source, source.stem) for source in rest)]


class Extension:
    """Builds the tree's extension; of a mutant, only the objects that it touches."""

    def __init__(self) -> None:
        self.base: list[Path] | None = None
        self.jobs = extension_jobs()

    def build(self, changed: str | None) -> None:
        from torch.utils.cpp_extension import library_paths

        cxx = programs.compiler()
        if self.base is None:
            self.base = programs.compile_all(cxx, self.jobs, OBJECTS)
        objects = list(self.base)
        for i, job in enumerate(self.jobs):
            source = job[1].relative_to(TREE).as_posix()
            header = changed is not None and changed.endswith(".h")
            core = header and changed.startswith("kernels") and f'"{changed}"' not in job[1].read_text()
            if source == changed or (header and (source.startswith("kernels") or not core)):  # a header of the core is seldom csrc's
                objects[i] = programs.compile_one([*cxx, *job[0]], job[1], OBJECTS, job[2])
        libraries = ["-Wl,--no-as-needed", *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
        built = programs.link([*cxx, "-shared", *libraries], objects, OBJECTS, "extension")
        for old in (TREE / "fastconv").glob("_C*.so"):
            old.unlink()
        shutil.copy(built, TREE / "fastconv" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
        # An extension that does not load would leave everything to ATen, and every mutant alive.
        subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", "import fastconv"], cwd=TREE, check=True)


def run(command: list[str], **environment: str) -> str | None:
    """Why it failed, in a line, or None if it did not."""
    try:
        done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, timeout=240, env={**os.environ, **environment})
    except subprocess.TimeoutExpired:
        return "ran for more than 240 s"
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))] or lines
    return (telling[-1] if telling else f"exit status {done.returncode}")[:160]


def notice(mutant: Mutant, extension: list[Extension]) -> str | None:
    """Runs the mutant's test in the tree; what it said when it failed, or None."""
    kind, _, rest = mutant.test.partition(" ")
    if kind in ("exact", "check_kernels"):
        arguments = rest.split()
        # The core always has the scalar kernels, which show most mutants, and compile in half the time; by a few shapes, too.
        tries = [(["scalar"], "60"), (["scalar", arguments[0]], "60"), (["scalar", arguments[0]], "3")]
        if kind == "check_kernels":  # which has no shares
            tries.pop()
        for isas, share in tries[arguments[0] == "scalar" :]:
            program = programs.build(kind, list(dict.fromkeys(isas)), [*programs.QUICK, "-w"], root=TREE)
            options = [] if kind == "check_kernels" else ["--op", arguments[1], "--one-in", share]
            if why := run([str(program), *options]):
                return why
        return None
    if kind == "check_team":
        flags = ["-std=c++20", "-O1", f"-I{TREE}", "-pthread"]
        program = programs.compile_one([*programs.compiler(), *flags], TREE / "tests/core/check_team.cpp", OBJECTS, "check_team")
        return run([str(programs.link(programs.compiler(), [program], OBJECTS, "team")), "100"])
    if not mutant.file.endswith(".py"):
        if not extension:
            extension.append(Extension())
        extension[0].build(mutant.file)
    return run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(rest)])


def try_one(mutant: Mutant, extension: list[Extension]) -> Result:
    file, start = TREE / mutant.file, time.perf_counter()
    text = file.read_text()
    if text.count(mutant.find) != 1:
        return Result(SKIPPED, f"its text stands {text.count(mutant.find)} times in {mutant.file}", 0)
    file.write_text(text.replace(mutant.find, mutant.replace))
    try:
        why = notice(mutant, extension)
    except subprocess.CalledProcessError as error:
        return Result(SKIPPED, f"it does not compile: {error.cmd[-3:]}", time.perf_counter() - start)
    finally:
        file.write_text(text)
    return Result(SURVIVED if why is None else CAUGHT, why or mutant.test, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="what there is, without running it")
    parser.add_argument("--resume", action="store_true", help="leave out what was tried before")
    parser.add_argument("-k", default="", help="only those whose description or file has this word")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.k in f"{mutant.breaks} {mutant.file} {mutant.test}"]
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.file}: {mutant.breaks}\n    - {mutant.find}\n    + {mutant.replace}\n    {mutant.test}")
        return
    copy_tree()
    results: dict[str, Result] = {}
    if RESULTS.exists():
        results = {name: Result(*kept) for name, kept in json.loads(RESULTS.read_text()).items()}
    extension: list[Extension] = []
    for number, mutant in enumerate(chosen, 1):
        name = f"{mutant.file}: {mutant.breaks}"
        if not (arguments.resume and name in results):
            results[name] = try_one(mutant, extension)
            RESULTS.write_text(json.dumps(results, indent=1))
        result = results[name]
        print(f"{number:3} {result.outcome:8} {name} ({result.seconds:.0f} s)\n             {result.how}", flush=True)
    outcomes = [results[f"{mutant.file}: {mutant.breaks}"].outcome for mutant in chosen]
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in (CAUGHT, SURVIVED, SKIPPED)))
    sys.exit(outcomes.count(CAUGHT) != len(outcomes))


if __name__ == "__main__":
    main()
