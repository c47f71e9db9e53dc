"""Importing torchvision, which fastconv needs only for its pretrained weights and their category names."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_schemas: list[torch.library.Library] = []  # a Library's definitions live as long as it does


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators are missing (a torchvision built for another torch).

    Such a torchvision fails to import only because it registers fake kernels for `torchvision::nms` and `qnms`; their schemas are
    then defined here, after which everything but its detection operators works. Raises ImportError if it is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError("torchvision is not installed (pip install torchvision)", name="torchvision") from None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
    return importlib.import_module("torchvision")
