"""Forced instruction sets and backends: each serves, or raises; none falls back in silence."""

import os
import subprocess
import sys
import textwrap

import pytest
from harness import ISAS

from fastconv import _extension

needs_extension = pytest.mark.skipif(not _extension.available, reason="the compiled extension is missing")

START = """
import sys, warnings
import torch
"""
CALL = """
from fastconv import _extension, ops, reference
x, weight = torch.randint(-4, 5, (1, 6, 5, 5)).float(), torch.randint(-4, 5, (6, 1, 3, 3)).float()
assert torch.equal(ops.depthwise(x, weight), reference.depthwise(x, weight))
options = {"stride": 1, "padding": 1, "activation": None}
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FASTCONV_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment | variables, capture_output=True, text=True, check=False, timeout=300
    )


def succeeds(code: str, **variables: str) -> str:
    done = run(code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(message: str, code: str, **variables: str) -> str:
    done = run(code, **variables)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr
    return done.stderr


@needs_extension
@pytest.mark.parametrize("name", ISAS)
def test_forced(name):
    assert succeeds(START + CALL + "print(_extension.isa(), ops.prepare_depthwise(weight, None, **options).kernel)", FASTCONV_ISA=name) == (
        f"{name} depthwise f32 {name}\n"
    )


@needs_extension
@pytest.mark.parametrize("name", ["avx1024", "AVX2", "neon" if "avx2" in ISAS else "avx512"])
def test_unknown_or_unsupported(name):
    error = fails(f"'{name}'", START + "import fastconv", FASTCONV_ISA=name)
    assert "\nRuntimeError: " in error


@needs_extension
def test_set_isa():
    extension = sys.modules["fastconv._C"]
    with pytest.raises(ValueError, match="avx1024"):
        extension.set_isa("avx1024")
    assert extension.isa() in extension.isas()


@needs_extension
def test_kernel_table(isa):
    rows = sys.modules["fastconv._C"].kernels()
    assert {row["isa"] for row in rows} == {isa}
    assert all(row.keys() == {"op", "dtype", "tile", "isa"} for row in rows)


def test_unknown_backend_or_switch():
    fails("FASTCONV_BACKEND must be one of auto, aten, cpu, triton, got 'cuda'", START + "import fastconv", FASTCONV_BACKEND="cuda")
    fails("FASTCONV_DISABLE must be 0 or 1, got 'false'", START + "import fastconv", FASTCONV_DISABLE="false")


@pytest.mark.parametrize(
    "variables", [{"FASTCONV_BACKEND": "aten"}, {"FASTCONV_DISABLE": "1"}, {"FASTCONV_DISABLE": "1", "FASTCONV_BACKEND": "cpu"}]
)
def test_aten(variables):
    """Public functions, operators and prepared kernels all go through the reference: the same bits on arbitrary numbers."""
    code = (
        START
        + CALL
        + """
assert _extension.backend() == "aten"
x, weight, project = torch.randn(2, 6, 9, 9), torch.randn(6, 1, 3, 3), torch.randn(7, 6, 1, 1)
from torch.utils._python_dispatch import TorchDispatchMode
class Names(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.append(func.name())
        return func(*args, **(kwargs or {}))
want = reference.separable(x, weight, None, project, None, depthwise_activation="relu")
assert torch.equal(ops.separable(x, weight, None, project, None, depthwise_activation="relu"), want)
assert torch.equal(torch.ops.fastconv.separable(x, weight, None, project, None, depthwise_activation="relu"), want)
prepared = ops.prepare_separable(weight, None, project, None, stride=1, padding=1, depthwise_activation="relu", activation=None)
seen = []
with Names():
    assert torch.equal(prepared(x), want)
assert prepared.kernel == "ATen (FASTCONV_BACKEND=aten)"
assert "fastconv::separable" in seen and not any(name.endswith("_packed") for name in seen), seen
assert torch.equal(ops.global_avg_pool(x), x.mean((2, 3), keepdim=True))
"""
    )
    done = run(code, **variables)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


@needs_extension
def test_cpu():
    """Compiled kernels or an error: another dtype, and a geometry that only ATen computes."""
    succeeds(
        START
        + CALL
        + """
def refused(message, call):
    try:
        call()
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError("not refused: " + message)

refused("depthwise: FASTCONV_BACKEND=cpu does not cover float64 on cpu", lambda: ops.depthwise(x.double(), weight.double()))
refused("depthwise: FASTCONV_BACKEND=cpu does not cover stride (3, 3)", lambda: ops.depthwise(x, weight, stride=3))
refused("depthwise: FASTCONV_BACKEND=cpu does not cover padding (3, 3)", lambda: ops.depthwise(x, weight, padding=3))
refused("max_pool: FASTCONV_BACKEND=cpu does not cover bfloat16 on cpu", lambda: ops.max_pool(x.bfloat16()))
refused("FASTCONV_BACKEND=cpu", lambda: torch.ops.fastconv.pointwise(x.double(), weight[:, :, :1, :1].expand(6, 6, 1, 1).double()))
refused("depthwise: FASTCONV_BACKEND=cpu does not cover float64 on cpu", lambda: ops.prepare_depthwise(weight.double(), None, **options))
assert ops.prepare_depthwise(weight, None, **options).kernel.startswith("depthwise f32 ")
""",
        FASTCONV_BACKEND="cpu",
    )


def test_triton():
    pytest.importorskip("triton")
    fails("FASTCONV_BACKEND=triton runs CPU tensors only in Triton's interpreter", START + CALL, FASTCONV_BACKEND="triton")
    code = (
        START
        + CALL
        + """
assert ops.prepare_depthwise(weight, None, **options).kernel == "depthwise triton"
assert torch.equal(ops.prepare_depthwise(weight, None, **options)(x), reference.depthwise(x, weight))
one, three, bias = weight[:, :, :1, :1].expand(6, 6, 1, 1).contiguous(), weight.expand(6, 6, 3, 3).contiguous(), torch.ones(6)
assert torch.equal(ops.fire(x, one, bias, one, bias, three, bias), reference.fire(x, one, bias, one, bias, three, bias))
def broken(*args, **kwargs):
    raise ZeroDivisionError
sys.modules["fastconv.kernels.gpu.blocks"].fire = broken
try:
    ops.fire(x, one, bias, one, bias, three, bias)
except ZeroDivisionError:
    print("the launcher ran")
"""
    )
    assert succeeds(code, FASTCONV_BACKEND="triton", TRITON_INTERPRET="1").endswith("the launcher ran\n")


MISSING = START + 'sys.modules["fastconv._C"] = None  # as if it were not built\n'


def test_without_the_extension():
    """One line of warning, then everything through ATen: operators, derivatives, prepared kernels."""
    code = (
        MISSING
        + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fastconv import _extension, ops, reference
(warning,) = [str(w.message) for w in caught if "fastconv" in str(w.message)]
assert warning == "fastconv: the compiled extension is not available (it was not built); running through ATen", warning
assert not _extension.available and _extension.isa() is None
"""
        + CALL
        + """
prepared = ops.prepare_depthwise(weight, None, **options)
assert torch.equal(prepared(x), reference.depthwise(x, weight))
assert prepared.kernel == "ATen (no compiled kernel)"
from torch import randn
params = randn(8, 6, 1, 1), None, randn(8, 1, 3, 3), None, randn(6, 8, 1, 1), None
torch.library.opcheck(torch.ops.fastconv.inverted_residual.default, (x.requires_grad_(), *params, [1, 1], [1, 1], "relu6", True))
last = x.detach().contiguous(memory_format=torch.channels_last)
assert ops.inverted_residual(last, *params).is_contiguous(memory_format=torch.channels_last)
"""
    )
    succeeds(code)


def test_forced_without_the_extension():
    fails("FASTCONV_BACKEND=cpu needs the compiled extension", MISSING + "import fastconv", FASTCONV_BACKEND="cpu")
    fails("FASTCONV_ISA=scalar needs the compiled extension", MISSING + "import fastconv", FASTCONV_ISA="scalar")
