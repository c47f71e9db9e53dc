"""Where triton is missing, fastconv imports and says so; where it is forced, it raises."""

import os
import subprocess
import sys

HIDE = "import sys; sys.modules['triton'] = None; "  # an import of it then raises ModuleNotFoundError


def run(code, **environment):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", HIDE + code], env=os.environ | environment, capture_output=True, text=True)


def test_import_and_reason():
    child = run("import fastconv, fastconv.kernels.gpu.configs; from fastconv.ops import _cuda; print(_cuda.available())")
    assert child.returncode == 0, child.stderr
    assert "triton is not installed" in child.stdout


def test_forced_backend_raises():
    child = run("import fastconv", FASTCONV_BACKEND="triton")
    assert child.returncode != 0
    assert "ImportError: FASTCONV_BACKEND=triton: triton is not installed" in child.stderr
