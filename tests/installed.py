"""The package as its users get it: an sdist, a wheel, a folder it is installed into, and Python running there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.search(r'^version = "(.+)"', PYPROJECT, re.MULTILINE).group(1)

# An editable installation of this checkout finds fastconv wherever Python runs; these tests are about the copy on PYTHONPATH.
WITHOUT_CHECKOUT = """
import sys
import sysconfig
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.path[:] = [entry for entry in sys.path if "__editable__" not in entry]
"""

CONVOLVE = """
import torch, fastconv
x, weight = torch.randn(2, 5, 9, 7), torch.randn(5, 1, 3, 3)
expected = torch.nn.functional.conv2d(x, weight, padding=1, groups=5).relu()
torch.testing.assert_close(fastconv.ops.depthwise(x, weight, activation="relu"), expected)
"""


def python(script: str, site: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script with the package of this folder, away from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", **environment}
    done = subprocess.run([sys.executable, "-c", WITHOUT_CHECKOUT + script], cwd=site, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "checkout"
    built = (".git", ".venv", "build", "dist", "out", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*built))
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    [archive] = folder.glob("fastconv-*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / f"fastconv-{VERSION}"


@pytest.fixture(scope="session")
def wheel(sdist: Path) -> Path:
    """A wheel built from the sdist, so that nothing of the checkout can slip in; unoptimised, for it is not its speed that is tested."""
    compiler = sdist.parent / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(sdist.parent / "dist"), str(sdist)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CXX": str(compiler)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [path] = (sdist.parent / "dist").glob("fastconv-*.whl")
    return path


@pytest.fixture(scope="session")
def site(wheel: Path) -> Path:
    """A folder with the wheel installed, outside the checkout."""
    folder = wheel.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the Python files alone, as an installation without a compiler would leave them."""
    keep_python = shutil.ignore_patterns("*.so", "__pycache__", "kernels", "benchmarks")
    shutil.copytree(ROOT / "fastconv", tmp_path / "fastconv", ignore=keep_python)
    shutil.copytree(ROOT / "kernels", tmp_path / "fastconv" / "kernels", ignore=keep_python)
    return tmp_path
