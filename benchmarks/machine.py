"""What a timing depends on: the machine block of every recorded run."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastconv.cli import machine
from fastconv.optimize.profile import cache_sizes

PACKAGES = ("fastconv", "torch", "numpy", "onnx", "onnxruntime", "openvino", "executorch", "torchao", "ncnn", "pnnx", "MNN", "triton")


def block() -> dict[str, Any]:
    """CPU, instruction set, caches, memory, versions, and the commit this was measured at (None outside a checkout)."""
    extension = machine.compiled()
    commit = _git("rev-parse", "HEAD")
    return {
        **machine.facts(),
        "architecture": platform.machine(),
        "isas": list(extension.isas()) if extension else [],
        "caches": {level: f"{size >> 10} KiB" for level, size in cache_sizes().items()},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the checkout that this file lies in."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
