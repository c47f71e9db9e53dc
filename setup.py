"""Builds the one extension, fastconv._C, and from the same objects libfastconv.so, its operators without Python, for C++ programs.

Metadata is static, in pyproject.toml.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

# Every ISA compiles the same micro-kernel source; only these flags and its namespace differ.
ISA_FLAGS = {
    "x86_64": {
        "scalar": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": [
            "-mavx512f",
            "-mavx512vl",
            "-mavx512bw",
            "-mavx512dq",
            "-mfma",
            "-mprefer-vector-width=512",
            # gcc 12 warns of its own _mm512_max_ps
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
        ],
    },
    "aarch64": {"scalar": [], "neon": []},
}
# A matrix unit beside AVX-512's kernels: a source of its own, where the compiler knows the unit (gcc 11, clang 12).
ISA_FLAGS["x86_64"]["amx"] = [*ISA_FLAGS["x86_64"]["avx512"], "-mavx512vbmi", "-mamx-tile", "-mamx-int8"]
ISA_SOURCES = {"amx": "kernels/cpu/amx.cpp"}
ISAS = ISA_FLAGS.get({"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()), {"scalar": []})

CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
# Contraction gives every acc += x * w one FMA; no other fast-math, so NaN, Inf and -0 behave as in ATen.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
PYTHON_ONLY = ("module", "watch", "direct", "benchmark")  # sources of csrc that serve the Python module, not the operators
HARDENING = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack"]
# What checks arguments and lays out memory is hardened; the kernels' inner loops have no arrays that these would guard.
CHECKED = ["-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong"]


def compiles(flags):
    """Whether the compiler and its assembler take an ISA's flags and an instruction of its own."""
    source = 'int main() { asm volatile("tilerelease"); }'
    command = [*os.environ.get("CXX", "g++").split(), *flags, "-x", "c++", "-c", "-o", os.devnull, "-"]
    return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0


def require_toolchain():
    """Says in one sentence what to install, where the compiler's own message would be a page."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        raise PlatformError(f"fastconv: no C++ compiler ({compiler!r} not found): install one, e.g. `apt-get install g++`, or set CXX")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        raise PlatformError(f"fastconv: no Python headers ({header} not found): install them, e.g. `apt-get install python3-dev`")
    if find_spec("torch") is None:
        raise PlatformError("fastconv: no torch in this Python to build against: install it, then `pip install --no-build-isolation .`")


def place(built, path):
    """Puts a finished library into place at once: who imports meanwhile, or after a killed build, never finds half of one."""
    part = f"{path}.{os.getpid()}.part"
    shutil.copy2(built, part)
    os.replace(part, path)


class Build(build_ext):
    """Compiles kernels/cpu once per ISA and csrc once, in parallel, and links them into one module."""

    def build_extension(self, ext):
        require_toolchain()
        if "amx" in ISAS and not (sys.platform == "linux" and compiles(ISAS["amx"])):  # Linux alone is asked for the unit's use
            del ISAS["amx"]
        torch = Path(find_spec("torch").submodule_search_locations[0])  # found, not imported: its headers and libraries suffice
        include = [".", str(torch / "include"), str(torch / "include/torch/csrc/api/include"), sysconfig.get_paths()["include"]]
        isa_macros = [(f"FASTCONV_HAS_{isa.upper()}", "1") for isa in ISAS]
        all_flags = " ".join(CXX_FLAGS + KERNEL_FLAGS)
        torch_macros = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("FASTCONV_CXX_FLAGS", f'"{all_flags}"')]
        jobs = [(source, isa_macros + torch_macros, CXX_FLAGS + CHECKED, "torch") for source in ext.sources if source.startswith("csrc")]
        jobs += [(source, isa_macros, CXX_FLAGS + KERNEL_FLAGS + CHECKED, "core") for source in ext.sources if source.startswith("kernels")]
        for isa, flags in ISAS.items():
            macros = isa_macros + [("FASTCONV_ISA", isa), (f"FASTCONV_ISA_IS_{isa.upper()}", "1")]
            if isa == "amx":
                macros.append(("FASTCONV_ISA_IS_AVX512", "1"))
            jobs.append((ISA_SOURCES.get(isa, "kernels/cpu/kernels.cpp"), macros, CXX_FLAGS + KERNEL_FLAGS + flags, isa))

        def compile_one(job):
            source, macros, flags, folder = job
            return self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, folder),
                macros=macros,
                include_dirs=include,
                extra_postargs=flags,
                depends=ext.depends,
            )

        jobs.sort(key=lambda job: job[3] not in ISAS)  # the kernels take longest, so they start first
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [obj for result in pool.map(compile_one, jobs) for obj in result]
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        operators = [obj for obj in objects if Path(obj).stem not in PYTHON_ONLY]
        for linked, path in ((objects, target), (operators, os.path.join(os.path.dirname(target), self.library))):
            part = os.path.join(self.build_temp, os.path.basename(path))
            self.compiler.link_shared_object(
                linked,
                part,
                libraries=["c10", "torch", "torch_cpu"],
                library_dirs=[str(torch / "lib")],
                extra_postargs=HARDENING,
                target_lang="c++",
            )
            place(part, path)

    library = "libfastconv.so"

    def copy_extensions_to_source(self):
        package = self.get_finalized_command("build_py").get_package_dir("fastconv")
        for built in self.get_outputs():
            place(built, os.path.join(package, os.path.basename(built)))

    def get_outputs(self):
        return super().get_outputs() + [os.path.join(self.build_lib, "fastconv", self.library)]


sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
sources += sorted(str(path) for path in Path("kernels/cpu").glob("*.cpp") if path.name not in ("kernels.cpp", "amx.cpp"))
headers = sorted(str(path) for folder in ("csrc", "kernels/cpu") for path in Path(folder).glob("*.h")) + ["fastconv/schemas.inc"]
setup(ext_modules=[Extension("fastconv._C", sources=sources, depends=headers, language="c++")], cmdclass={"build_ext": Build})
