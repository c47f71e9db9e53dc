"""The kernels in Triton's interpreter, on CPU tensors: every index, mask and epilogue, but no layout and no machine code.

TRITON_INTERPRET has to be set before triton is imported, so the checks run in a child pytest on this same file.
"""

import importlib.metadata
import os
import subprocess
import sys

import blocks
import cases
import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":

    class TestInterpreter(cases.Checks, blocks.BlockChecks):
        device = "cpu"

        # no bfloat16: the interpreter truncates where a GPU rounds to nearest
        @pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
        def dtype(self, request):
            return request.param

    def test_forced_backend_reaches_the_kernels(monkeypatch):
        """FASTCONV_BACKEND=triton: the public operator runs the Triton kernel on CPU tensors."""
        import fastconv
        from fastconv.kernels.gpu import pointwise

        launched = []
        kernel = pointwise.pointwise
        monkeypatch.setattr(pointwise, "pointwise", lambda **arguments: launched.append(1) or kernel(**arguments))
        x, weight = torch.randn(1, 3, 4, 4), torch.randn(8, 3, 1, 1)
        y = fastconv.ops.pointwise(x, weight, activation="relu")
        torch.testing.assert_close(y, fastconv.reference.pointwise(x, weight, activation="relu"))
        assert launched

    def test_forced_backend_refuses_what_it_does_not_cover():
        x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3)
        for arguments in ((x.double(), weight.double()), (x, weight, None, (3, 3)), (x, weight, None, (1, 1), (3, 3))):
            with pytest.raises(RuntimeError, match="depthwise: FASTCONV_BACKEND=triton does not cover"):
                torch.ops.fastconv.depthwise(*arguments)

else:

    def version(package):
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))

    @pytest.mark.skipif(
        version("triton") < (3, 7) and version("numpy") >= (2, 4), reason="before 3.7, triton's interpreter needs numpy < 2.4"
    )
    def test_in_a_child_with_the_interpreter():
        environment = os.environ | {"TRITON_INTERPRET": "1", "FASTCONV_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert child.returncode == 0, child.stdout[-8000:]
        assert " passed" in child.stdout
        assert "skipped" not in child.stdout
