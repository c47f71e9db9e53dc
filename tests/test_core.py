"""The kernel core by itself, compiled without torch: natively, and for aarch64 under qemu where a cross compiler and qemu are installed."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
X86 = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"],
}
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", f"-I{ROOT}"]


def build(compiler: str, isas: dict[str, list[str]], folder: Path) -> Path:
    """The checking program with the kernels of these instruction sets, statically linked."""
    has = [f"-DFASTCONV_HAS_{isa.upper()}=1" for isa in isas]
    jobs = [(has, f"kernels/cpu/{name}.cpp", f"{name}.o") for name in ("isa", "blocks")]
    jobs.append((has, "tests/core/check_kernels.cpp", "check.o"))
    for isa, flags in isas.items():
        own = [f"-DFASTCONV_ISA={isa}", f"-DFASTCONV_ISA_IS_{isa.upper()}", *flags, *has]
        jobs.append((own, "kernels/cpu/kernels.cpp", f"{isa}.o"))

    def compile_one(job):
        flags, source, target = job
        subprocess.run([compiler, *FLAGS, *flags, "-c", str(ROOT / source), "-o", str(folder / target)], check=True)
        return str(folder / target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = folder / "check_kernels"
    subprocess.run([compiler, "-static", *objects, "-o", str(program)], check=True)
    return program


def check(command: list[str], isas: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == isas, done.stdout
    assert all(int(line.split()[1]) > 2000 for line in lines), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles the x86-64 instruction sets")
def test_the_core_equals_plain_loops_on_integers(tmp_path):
    fastconv_c = pytest.importorskip("fastconv._C")
    program = build(os.environ.get("CXX", "g++"), {"scalar": [], **X86}, tmp_path)
    check([str(program)], list(fastconv_c.isas()))


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")), reason="needs g++-aarch64-linux-gnu and qemu-user"
)
def test_the_aarch64_core_equals_plain_loops_under_qemu(tmp_path):
    program = build("aarch64-linux-gnu-g++", {"scalar": [], "neon": []}, tmp_path)
    check(["qemu-aarch64", str(program)], ["scalar", "neon"])


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++").split()[-1]) is None, reason="compiles C++")
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
