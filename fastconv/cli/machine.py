"""Facts about this machine and this installation, for `doctor` and for the JSON of `demo` and `bench`."""

import importlib
import importlib.metadata
import os
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastconv import _extension


def version(distribution: str = "fastconv") -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The CPU's marketing name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def compiled() -> ModuleType | None:
    """The compiled extension, or None where it is missing."""
    return importlib.import_module("fastconv._C") if _extension.available else None


def openmp_runtimes() -> list[str] | None:
    """Paths of the OpenMP runtimes loaded into this process; None without threadpoolctl."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return None
    return sorted({library["filepath"] for library in threadpool_info() if library["user_api"] == "openmp"})


def triton_state() -> str:
    """Whether the Triton kernels can run here."""
    try:
        import triton
    except ImportError:
        return "not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"{triton.__version__}, interpreter (TRITON_INTERPRET=1)"
    return f"{triton.__version__}, {'on the GPU' if torch.cuda.is_available() else 'no GPU to run on'}"


def gpus() -> list[str]:
    """One line per GPU that torch sees."""
    lines = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        lines.append(f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB")
    return lines


def facts() -> dict[str, Any]:
    """What a timing depends on: written beside every recorded number."""
    extension = compiled()
    return {
        "fastconv": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": _extension.backend(),
        "isa": extension.isa() if extension else None,
    }
