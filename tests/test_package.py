"""The package as its users get it: sdist, wheel, a missing Triton, a missing extension, and documents that name real files."""

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from installed import CONVOLVE, PYPROJECT, ROOT, VERSION, python

import fastconv
from fastconv import _extension


def test_the_version_is_one():
    assert importlib.metadata.version("fastconv") == VERSION
    assert getattr(fastconv, "__version__", VERSION) == VERSION


def test_the_installed_metadata_names_the_extras_and_the_command():
    metadata = importlib.metadata.metadata("fastconv")
    assert {"test", "bench", "peers", "dev"} <= set(metadata.get_all("Provides-Extra"))
    [command] = [entry for entry in importlib.metadata.entry_points(group="console_scripts") if entry.name == "fastconv"]
    assert command.value == "fastconv.cli:main"


def test_every_package_folder_is_shipped():
    """A new sub-package that pyproject.toml does not list would work in a checkout and be missing from the wheel."""
    listed = set(re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*?)\]", PYPROJECT, re.MULTILINE | re.DOTALL).group(1)))
    folders = {"fastconv", "fastconv.kernels", "fastconv.kernels.gpu", "fastconv.benchmarks", "fastconv.benchmarks.report"}
    folders |= {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "fastconv").rglob("__init__.py")}
    assert listed == folders


def test_the_sdist_has_what_a_build_and_a_reader_need(sdist):
    tracked = [
        "fastconv/**/*.py",
        "fastconv/schemas.inc",
        "csrc/*",
        "kernels/cpu/*",
        "kernels/gpu/*.py",
        "kernels/gpu/tables/*.json",
        "benchmarks/**/*.py",
        "tests/**/*.py",
        "docs/**/*.md",
    ]
    tracked += ["setup.py", "pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "LICENSE", "requirements/*", ".ci/run"]
    files = [file.relative_to(ROOT) for pattern in tracked for file in ROOT.glob(pattern) if file.is_file()]
    assert len(files) > 50
    assert [str(file) for file in files if not (sdist / file).exists()] == []


def test_the_wheel_has_python_the_schemas_and_one_extension(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    ours = [*(ROOT / "fastconv").rglob("*.py"), ROOT / "fastconv/schemas.inc", *(ROOT / "kernels").rglob("*.py")]
    for file in [*ours, *(ROOT / "kernels/gpu").glob("tables/*.json")]:
        relative = file.relative_to(ROOT).as_posix()
        assert (relative if relative.startswith("fastconv/") else f"fastconv/{relative}") in names
    assert len([name for name in names if re.fullmatch(r"fastconv/_C\..*\.so", name)]) == 1
    assert not [name for name in names if name.startswith(("tests", "kernels", "csrc", "build"))]


def test_an_installed_wheel_works_outside_the_checkout(site):
    script = """
import importlib, pkgutil
import fastconv, fastconv._C, fastconv.kernels
found = [fastconv.__file__, fastconv._C.__file__]
for module in pkgutil.walk_packages(fastconv.kernels.__path__, "fastconv.kernels."):
    found.append(importlib.import_module(module.name).__file__)
print("\\n".join(found))
"""
    files = python(script + CONVOLVE, site).stdout.split()
    assert all(Path(file).is_relative_to(site) for file in files), files
    kernels = {Path(file).name for file in files if "gpu" in Path(file).parts}
    assert {"depthwise.py", "pointwise.py", "fire_expand.py"} <= kernels


def test_an_installed_wheel_has_the_command(site):
    done = python("from fastconv.cli import main; main(['--version'])", site)
    assert done.stdout.strip() == f"fastconv, version {VERSION}"
    assert (site / "bin" / "fastconv").exists()


def test_it_imports_and_computes_without_triton(site):
    python("sys.modules['triton'] = None\n" + CONVOLVE, site)


def test_it_warns_in_one_line_and_computes_without_the_extension(bare):
    done = python(CONVOLVE + "assert not fastconv._extension.available", bare)
    lines = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(lines) == 1
    assert "fastconv: the compiled extension is not available" in lines[0]


def test_a_silenced_backend_does_not_warn_without_the_extension(bare):
    assert python(CONVOLVE, bare, FASTCONV_BACKEND="aten").stderr == ""


def test_models_give_the_same_logits_without_the_extension(bare):
    script = """
import torch, fastconv
model = fastconv.models.squeezenet1_1().eval()
x = torch.randn(1, 3, 65, 64)
with torch.no_grad():
    torch.testing.assert_close(model(x), torch.fx.symbolic_trace(model)(x), rtol=1e-4, atol=1e-5)
"""
    python(script, bare, FASTCONV_BACKEND="aten")


def test_the_extension_of_this_checkout_is_loaded():
    assert _extension.available, _extension.reason


@pytest.mark.parametrize("document", sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]))
def test_every_path_a_document_names_exists(document):
    text = (ROOT / document).read_text()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    top = {path.name for path in ROOT.iterdir() if path.name not in ("build", "dist", "out")}
    named = {path.rstrip("/") for path in re.findall(r"`([\w.][\w./-]*)`", text) if path.split("/")[0] in top and "/" in path}
    links = set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert named or links or document.startswith("docs/decisions"), "no path found: the pattern of this test is out of date"
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    assert [link for link in sorted(links) if not (ROOT / document).parent.joinpath(link).exists()] == []


def test_ci_runs_the_command_that_the_readme_names():
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "make test" in (ROOT / "README.md").read_text()


def test_the_toolchain_check_names_what_is_missing(monkeypatch):
    missing = runpy.run_path(str(ROOT / "requirements/check.py"))["missing"]
    assert missing() is None
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "no C++ compiler (no-such-compiler not found): install g++" in missing()
    monkeypatch.setenv("CXX", "false")
    assert "false does not compile C++20" in missing()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "Python's headers are missing (no /nowhere/Python.h)" in missing()
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert "venv module is missing" in missing()
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert "is Python 3.9: install Python 3.10 or later" in missing()


@pytest.mark.parametrize("first", ["fastconv.nn", "fastconv.models", "fastconv.optimize", "fastconv.cli", "fastconv.optimize.planned"])
def test_the_public_names_do_not_depend_on_what_was_imported_first(first):
    """`optimize` is a function and the package it lives in; importing a part of the package must not hide the function."""
    script = f"import {first}, fastconv; print(*[callable(getattr(fastconv, name)) for name in ('optimize', 'explain', 'revert')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 3, done.stderr


def test_importing_it_imports_neither_torchs_compiler_nor_triton():
    """Which would take ten times as long as fastconv itself; nor does a first result need them."""
    script = """
import sys, torch, fastconv
loaded = {"torch._dynamo", "triton", "sympy"} & set(sys.modules)
fast = fastconv.optimize(fastconv.models.squeezenet1_1())
with torch.no_grad():
    fast(torch.randn(1, 3, 64, 64))
print(loaded or {"torch._dynamo", "triton", "sympy"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_an_extension_of_other_sources_is_refused_with_a_reason():
    code = """
import sys, types
sys.modules["fastconv._C"] = types.ModuleType("fastconv._C")
import fastconv
print(fastconv._extension.reason)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "interface None, wanted" in done.stdout
    assert "build it again" in done.stdout
    registered = """
import torch
library = torch.library.Library("fastconv", "DEF")
library.define("pointwise(Tensor x) -> Tensor")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", registered + code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fastconv: the compiled extension does not fit: it was built from other sources")
    assert last.endswith("build it again")
