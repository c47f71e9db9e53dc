"""Finds the compiled extension and reads which backend the user asked for.

`FASTCONV_BACKEND` is read once, at import:

- `auto` (default): compiled kernels on CPU, Triton kernels on CUDA, ATen for what they do not cover;
- `aten`: the plain-torch reference everywhere (`FASTCONV_DISABLE=1` says the same);
- `cpu`: compiled kernels, or an error;
- `triton`: Triton kernels, or an error; CPU tensors only in Triton's interpreter (`TRITON_INTERPRET=1`).
"""

import os
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

BACKENDS = ("auto", "aten", "cpu", "triton")
INTERFACE = 11  # what Python expects of the extension, and the extension of Python: csrc/module.cpp has the same number


def _requested_backend() -> str:
    disable = os.environ.get("FASTCONV_DISABLE") or "0"
    if disable not in ("0", "1"):
        raise RuntimeError(f"FASTCONV_DISABLE must be 0 or 1, got {disable!r}")
    name = os.environ.get("FASTCONV_BACKEND") or "auto"
    if name not in BACKENDS:
        raise RuntimeError(f"FASTCONV_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return "aten" if disable == "1" else name


def _load() -> str | None:
    """Imports fastconv._C, which registers the operators. Returns why it could not, or None."""
    import torch  # the extension links to its libraries

    try:
        import fastconv._C  # noqa: F401
    except ModuleNotFoundError:
        wanted = f"_C{EXTENSION_SUFFIXES[0]}"
        built = sorted(path.name for path in Path(__file__).parent.glob("_C.*.so"))
        return f"it was built for another Python: {built[0]}, wanted {wanted}" if built and wanted not in built else "it was not built"
    except ImportError as error:
        if str(error).startswith("FASTCONV_ISA"):  # a forced instruction set that cannot serve is an error, never a fallback
            raise RuntimeError(str(error)) from error
        if "undefined symbol" in str(error):
            return f"it does not fit torch {torch.__version__} (2.10 or later is needed): {error}"
        return str(error)
    built = getattr(sys.modules["fastconv._C"], "interface", None)
    if built != INTERFACE:
        why = f"it was built from other sources than these (interface {built}, wanted {INTERFACE}): build it again"
        if hasattr(torch.ops.fastconv, "pointwise"):  # its operators are registered, so ATen's cannot be
            raise ImportError(f"fastconv: the compiled extension does not fit: {why}")
        return why
    return None


_backend = _requested_backend()
reason = _load()
available = reason is None

if not available:
    forced = [name for name in ("FASTCONV_ISA", "FASTCONV_BACKEND") if os.environ.get(name)]
    if "FASTCONV_ISA" in forced or _backend == "cpu":
        raise RuntimeError(f"{forced[0]}={os.environ[forced[0]]} needs the compiled extension, fastconv._C: {reason}")
    if _backend == "auto":
        warnings.warn(f"fastconv: the compiled extension is not available ({reason}); running through ATen", stacklevel=2)


def backend() -> str:
    """The backend in force: "auto", "aten", "cpu" or "triton"."""
    return _backend


def isa() -> str | None:
    """The instruction set that the compiled kernels use, or None without them."""
    return sys.modules["fastconv._C"].isa() if available else None
