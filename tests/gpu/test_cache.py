"""Triton's cache directory: read-only, full, in the way, or shared by processes that compile at once. With the compiler, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Compiles two kernels for sm_90 and prints the hashes of their binaries, the warnings and whether a later call recompiled.
CHILD = """
import builtins, errno, hashlib, json, os, sys, warnings
sys.path.insert(0, {tests!r})
import torch, triton
import driver
driver.install(compiler=True)
from fastconv.kernels.gpu import depthwise, pointwise
{before}
x = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
def run():
    depthwise.depthwise(x, torch.ones(16, 1, 3, 3), None)
    pointwise.pointwise(x, torch.ones(8, 16, 1, 1), torch.ones(8))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    run()
    {after}
kernels = [(module, getattr(module, f"{{module.__name__.rpartition('.')[2]}}_kernel")) for module in (depthwise, pointwise)]
compiled = [kernel for _, jit in kernels for kernel in jit.device_caches[None][0].values()]
print(json.dumps({{
    "binaries": [hashlib.sha256(kernel.asm["cubin"]).hexdigest() for kernel in compiled],
    "warnings": [str(item.message) for item in caught if "fastconv" in str(item.message)],
    "launches": [name for name, _ in driver.launches],
}}))
"""
FULL = """
real = builtins.open
def full(file, mode="r", *rest, **more):
    if "w" in mode and str(file).startswith({directory!r}):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    return real(file, mode, *rest, **more)
builtins.open = full
"""
READ_ONLY = """
real = os.makedirs
def refuse(path, *rest, **more):
    if str(path).startswith({directory!r}) and not os.path.isdir(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    return real(path, *rest, **more)
os.makedirs = refuse
"""


def start(directory: Path, before: str = "", after: str = "") -> subprocess.Popen:
    code = CHILD.format(tests=str(Path(__file__).parent), before=before.format(directory=str(directory)), after=after)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(directory), "FASTCONV_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen) -> dict:
    output, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors[-4000:]
    found = json.loads(output.splitlines()[-1])
    assert found["launches"] == ["depthwise_kernel", "pointwise_kernel"]
    assert len(found["binaries"]) == 2
    return found


@pytest.mark.parametrize("processes", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_bug_31_processes_share_a_directory(processes, tmp_path):
    """triton#2688, #11512, PR#4295: a race. All compile the same at once: each runs, and what they leave behind is whole and used."""
    children = [start(tmp_path) for _ in range(processes)]
    found = [finish(child) for child in children]
    assert not any(result["warnings"] for result in found)
    assert not list(tmp_path.rglob("tmp.pid*"))
    groups = list(tmp_path.rglob("__grp__*.json"))
    assert len(groups) == 2
    for group in groups:
        for path in json.loads(group.read_text())["child_paths"].values():
            assert Path(path).stat().st_size
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert finish(start(tmp_path))["binaries"] == found[0]["binaries"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == times  # loaded, not compiled


@pytest.mark.parametrize("how", ["read-only", "full", "a file"])
def test_a_directory_that_cannot_be_written(how, tmp_path):
    directory = tmp_path / "cache"
    if how == "a file":
        directory.write_text("")
    else:
        directory.mkdir()
    found = finish(start(directory, {"read-only": READ_ONLY, "full": FULL, "a file": ""}[how]))
    (warning,) = found["warnings"]
    assert f"Triton's cache directory {directory} cannot be written" in warning
    assert {"read-only": "Read-only file system", "full": "No space left", "a file": "Not a directory"}[how] in warning
    assert not list(tmp_path.rglob("*.cubin"))


def test_what_a_read_only_directory_holds_is_used(tmp_path):
    first = finish(start(tmp_path))
    compiles = "import triton.compiler.compiler as c; c.ASTSource.make_ir = None"  # a compilation would fail
    found = finish(start(tmp_path, READ_ONLY + compiles))
    assert found["binaries"] == first["binaries"]
    assert not found["warnings"]


def test_other_errors_are_not_hidden(tmp_path):
    """An OSError that is not about writing."""
    broken = "import triton.compiler.compiler as c\ndef fail(*_): raise FileNotFoundError(2, 'gone')\nc.ASTSource.make_ir = fail"
    child = start(tmp_path, broken)
    _, errors = child.communicate(timeout=300)
    assert child.returncode != 0
    assert "FileNotFoundError" in errors
