"""The compiled libraries as files: which instructions stand where, how they are linked, and what they ask of torch."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from core import programs

from fastconv import _extension

pytestmark = [
    pytest.mark.skipif(not _extension.available, reason="the compiled extension is missing"),
    pytest.mark.skipif(not (shutil.which("objdump") and shutil.which("readelf") and shutil.which("c++filt")), reason="needs binutils"),
]

PREFIXES = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3}
VEX, EVEX = {0xC4, 0xC5}, {0x62}  # first bytes of AVX's and AVX-512's encodings; in 64-bit code they are nothing else


def printed(*command: str | Path, **options) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, **options).stdout


@pytest.fixture(scope="module", params=["_C", "libfastconv"])
def library(request) -> Path:
    extension = Path(sys.modules["fastconv._C"].__file__)
    path = extension if request.param == "_C" else extension.with_name("libfastconv.so")
    if not path.exists():
        pytest.skip(f"{path.name} is missing")
    return path


def encodings(file: Path) -> dict[str, Counter]:
    """By function, how many of its instructions have each encoding."""
    found: dict[str, Counter] = {}
    for line in printed("objdump", "-d", "-w", file).splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            counts = found.setdefault(header[1], Counter())
        elif len(fields := line.split("\t")) > 2:
            code = bytes.fromhex(fields[1])
            first = next((byte for byte in code if byte not in PREFIXES), 0)
            counts["EVEX" if first in EVEX else "VEX" if first in VEX else "other"] += 1
    names = printed("c++filt", input="\n".join(found)).splitlines()
    return dict(zip(names, found.values(), strict=True))


def misplaced(functions: dict[str, Counter]) -> list[str]:
    """Functions that a CPU without AVX, or without AVX-512, might run, and could not."""
    return [
        f"{name}: {dict(counts)}"
        for name, counts in functions.items()
        if (counts["EVEX"] and not any(f"fastconv::{isa}::" in name for isa in ("avx512", "amx")))
        or (counts["VEX"] and not any(f"fastconv::{isa}::" in name for isa in ("avx2", "avx512", "amx")))
    ]


@pytest.mark.skipif(programs.platform.machine() != "x86_64", reason="x86-64's encodings")
def test_bug_32_wide_instructions_stand_in_their_own_functions():
    """atopile#1838: a wheel built on a machine with AVX-512 stopped at an illegal instruction everywhere else. (libfastconv.so is linked
    from the same objects.)"""
    functions = encodings(Path(sys.modules["fastconv._C"].__file__))
    assert misplaced(functions) == []
    of_isa = {
        isa: sum((counts for name, counts in functions.items() if f"fastconv::{isa}::" in name), Counter())
        for isa in ("scalar", "avx2", "avx512")
    }
    assert of_isa["avx512"]["EVEX"] > 10_000  # what is looked for can be seen
    assert of_isa["avx2"]["VEX"] > 10_000
    assert of_isa["scalar"]["other"] > 10_000


@pytest.mark.skipif(programs.platform.machine() != "x86_64" or not shutil.which(programs.compiler()[0]), reason="compiles x86-64")
def test_the_gate_sees_a_shared_function_and_a_static_initialiser(tmp_path):
    """The two ways such code gets out: a function of no namespace that the linker takes from any object, and what runs at loading."""
    source = tmp_path / "leak.cpp"
    source.write_text("""
        template <class T> __attribute__((noinline)) T sum(const T* x) { T s = 0; for (int i = 0; i < 64; ++i) s += x[i]; return s; }
        float values[64], total = sum(values);
        namespace fastconv::avx512 { __attribute__((visibility("default"))) float inside(const float* x) { return x[0] * 2 + x[1]; } }
    """)
    built = tmp_path / "leak.so"
    printed(*programs.compiler(), "-O3", "-ffast-math", *programs.ISA_FLAGS["avx512"], "-shared", "-fPIC", source, "-o", built)
    found = misplaced(encodings(built))
    assert any("sum<float>" in line for line in found), found
    assert any("_GLOBAL__sub_I" in line for line in found), found
    assert not any("inside" in line for line in found)


def test_the_link_is_hardened(library):
    """Full RELRO, no code on the stack, no segment both writable and executable, no search path; canaries where arguments are checked."""
    dynamic, headers = printed("readelf", "-dW", library), printed("readelf", "-lW", library)
    assert re.search(r"\(FLAGS\).*BIND_NOW", dynamic)
    assert "GNU_RELRO" in headers
    assert re.search(r"GNU_STACK.* RW ", headers)
    assert not re.search(r"LOAD.* RWE ", headers)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    assert "TEXTREL" not in dynamic
    assert "__stack_chk_fail" in printed("nm", "-D", "--undefined-only", library)


def test_it_asks_torch_for_its_stable_interface_alone(library):
    """docs/decisions/0001: so that one build runs on every torch from 2.10 on. C++ symbols are the C++ library's, never torch's."""
    needed = set(re.findall(r"NEEDED.*\[(.+?)\]", printed("readelf", "-dW", library)))
    assert {name for name in needed if "torch" in name or "c10" in name} <= {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
    assert not {name for name in needed if "python" in name or "omp" in name}  # neither a Python nor a second OpenMP comes with it
    mangled = [line.split()[-1].split("@")[0] for line in printed("nm", "-D", "--undefined-only", library).splitlines()]
    names = printed("c++filt", input="\n".join(mangled)).splitlines()
    assert [name for name in names if re.search(r"\b(at|c10|torch|caffe2)::", name)] == []
    shims = {name for name in mangled if name.startswith(("torch_", "aoti_torch_"))}
    assert {"torch_parallel_for", "torch_call_dispatcher", "aoti_torch_library_init_impl"} <= shims
    python = [name for name in mangled if re.match(r"_?Py", name)]
    assert bool(python) == (library.name != "libfastconv.so")


def test_it_exports_its_entry_alone(library):
    """Everything else is hidden: no function of ours can take, or be taken by, one of the same name in another library."""
    exported = [line.split()[-1] for line in printed("nm", "-D", "--defined-only", library).splitlines() if line.split()[1] in "TDBV"]
    assert [name for name in printed("c++filt", input="\n".join(exported)).split("\n") if name and "fastconv::" in name] == []
    if library.name != "libfastconv.so":
        assert "PyInit__C" in exported
