"""The kernel core by itself, compiled without torch: natively, and for aarch64 under qemu where a cross compiler and qemu are installed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from core import programs
from mutants_list import MUTANTS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.xdist_group("core")  # one process compiles the kernels for all

compiles = pytest.mark.skipif(shutil.which(programs.compiler()[-1]) is None, reason="compiles C++")
aarch64 = pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")), reason="needs g++-aarch64-linux-gnu and qemu-user"
)


def run(command: list[str], isas: list[str]) -> list[str]:
    """The lines it prints, after checking that it succeeds and that each instruction set is there."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert {isa for isa in isas if any(isa in line.split(":")[0].split() for line in lines)} == set(isas), done.stdout
    return lines


def ends() -> list[str]:
    """The plainest and the widest instruction set of this machine, and with AVX-512 the matrix unit, emulated; `make exact` has all. (To
    compile one takes half a minute.)"""
    isas = [isa for isa in pytest.importorskip("fastconv._C").isas() if isa != "amx"]
    cpuinfo = Path("/proc/cpuinfo")
    emulated = ["amx"] if cpuinfo.exists() and "avx512_vbmi" in cpuinfo.read_text() else []
    return list(dict.fromkeys((isas[0], isas[-1], *emulated)))


@compiles
def test_exact_cases_between_unmapped_pages():
    """One shape in 50 of `make exact`."""
    lines = run([str(programs.build("exact", ends())), "--one-in", "50", "--seed", "3"], ends())
    pattern = re.compile(r"(\w+) \w+: (\d+) distinct cases, (\d+) runs, (\d+) border and (\d+) interior elements equal")
    for line in lines:
        op, cases, runs, border, interior = pattern.match(line).groups()
        assert int(runs) == 2 * int(cases) > 500, line  # end-aligned and start-aligned
        assert int(interior) > 0, line
        if op not in ("strassen", "digits"):  # products alone and in blocks, few of which are in the sample
            assert (int(border) > 0) == (op != "pointwise"), line


@compiles
def test_the_list_of_exact_cases_is_long_and_has_none_twice():
    program = str(programs.build("exact", ends()))
    least = dict(depthwise=230_000, pointwise=50_000, fire_expand=20_000, fire=20_000, separable=20_000, inverted_residual=20_000)
    least["strassen"] = 20_000
    least["digits"] = 20_000
    for op, count in least.items():
        lines = subprocess.run([program, "--list", "--op", op], capture_output=True, text=True, check=True).stdout.splitlines()
        assert len(set(lines)) == len(lines) >= count, op


def test_every_mutant_fits_the_sources():
    """Its text stands there once; `make mutants` would leave it out otherwise. Eighty is the least."""
    assert [f"{m.file}: {m.breaks}" for m in MUTANTS if (ROOT / m.file).read_text().count(m.find) != 1] == []
    assert len({(m.file, m.find, m.replace) for m in MUTANTS}) == len(MUTANTS) >= 80


@compiles
def test_what_trains_a_first_convolution_equals_plain_loops():
    for line in run([str(programs.build("check_training", ends()))], ends()):
        assert int(line.split()[1]) > 150, line


@compiles
def test_the_core_equals_plain_loops_on_integers():
    for line in run([str(programs.build("check_kernels", ends()))], ends()):
        assert int(line.split()[1]) > 2000, line


@pytest.mark.slow
@aarch64
@pytest.mark.parametrize(("name", "arguments"), [("check_kernels", []), ("exact", ["--one-in", "40"])])
def test_the_aarch64_core_under_qemu(name, arguments):
    isas = ["scalar", "neon"]
    program = programs.build(name, isas, [*programs.QUICK, "-static"], ["aarch64-linux-gnu-g++"])
    assert len(run(["qemu-aarch64", str(program), *arguments], isas)) >= 2


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("sanitizer", programs.SANITIZERS)
def test_sanitizers(sanitizer):
    if sanitizer == "memory" and programs.clang() is None:
        pytest.skip("needs clang")
    programs.sanitize([sanitizer])


@compiles
@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_a_team_runs_every_piece_once(tmp_path, sanitizer):
    program = tmp_path / "check_team"
    flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
    command = [*os.environ.get("CXX", "g++").split(), "-std=c++20", "-O1", "-g", *flags, f"-I{ROOT}", "-pthread"]
    built = subprocess.run([*command, str(ROOT / "tests/core/check_team.cpp"), "-o", str(program)], capture_output=True, text=True)
    if built.returncode and sanitizer:
        pytest.skip(f"no {sanitizer} sanitizer here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program), "300"], capture_output=True, text=True, timeout=300)
    if sanitizer and "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is not one the sanitizer knows")
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr
