"""The `weights=` argument: a checkpoint file, or torchvision's pretrained weights."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastconv.models._torchvision import import_torchvision

Weights = str | os.PathLike | Enum | None
M = TypeVar("M", bound=nn.Module)

_PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_WRAPPERS = ("state_dict_ema", "state_dict", "model_state_dict", "model")  # timm, Lightning, torchvision's references
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, Lightning


def load_weights(model: M, weights: Weights, name: str, progress: bool = True) -> M:
    """Load `weights` strictly into `model`, built as `name`, and return it.

    Raises FileNotFoundError, ImportError (torchvision is needed and missing), RuntimeError (download failed), TypeError or ValueError
    (not weights, or not this model's).
    """
    if weights is None:
        return model
    if isinstance(weights, Enum) or (isinstance(weights, str) and not _is_path(weights)):
        member = _torchvision_weights(weights, name)
        return _load_strictly(model, _download(member, name, progress), str(member), name)
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(f"{name}: weights must be None, a path, a torchvision weights enum or its name, got {type(weights).__name__}")
    return _load_strictly(model, read_state_dict(weights), os.fspath(weights), name)


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint: .safetensors, or a torch.save file read with `weights_only=True`.

    The usual wrappers ({"state_dict": ...}) and key prefixes ("module.") are taken off. Raises FileNotFoundError, or ValueError if
    the file is damaged or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"weights: {path} is damaged or holds more than tensors; nothing else is loaded (weights_only)") from error
    except Exception as error:  # a damaged file raises EOFError, OSError, IndexError, RuntimeError, SafetensorError, ...
        raise ValueError(f"weights: {path} cannot be read, it may be truncated: {_first_line(error)}") from error
    if isinstance(state, Mapping):
        state = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"weights: {path} holds no state_dict, got {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"weights: {path} holds no state_dict: {key!r} is a {type(value).__name__}")
        kind = _not_dense(value)
        if kind:
            raise ValueError(f"weights: {path} must hold dense tensors, {key!r} is {kind}")
    state = dict(state)
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _not_dense(value: Tensor) -> str | None:
    """What kind of tensor has no values to copy, or not the ones it shows."""
    if value.is_nested or value.layout != torch.strided:
        return "a nested one" if value.is_nested else str(value.layout)
    return "on the meta device" if value.is_meta else str(value.dtype) if value.is_quantized else None


def _is_path(text: str) -> bool:
    return Path(text).suffix in (".safetensors", *_PICKLED) or os.sep in text or Path(text).is_file()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _torchvision_weights(weights: str | Enum, name: str) -> Enum:
    """The member of torchvision's weights enum for `name`."""
    if name == "mobilenet_v1":
        raise ValueError(
            f"mobilenet_v1: torchvision has no weights for it, got {weights!r}; "
            "give the path of a checkpoint of timm's mobilenetv1_100 (.pth or .safetensors)"
        )
    try:
        torchvision = import_torchvision()
    except ImportError as error:
        raise ImportError(f"{name}: weights={weights!r} is no file, and for pretrained weights {error}") from error
    enum = torchvision.models.get_model_weights(name)
    if isinstance(weights, enum):
        return weights
    if isinstance(weights, Enum):
        raise TypeError(f"{name}: weights must be of {enum.__name__}, got {weights}")
    member = enum.__members__.get(weights.removeprefix(f"{enum.__name__}."))
    if member is None:
        raise ValueError(f"{name}: weights must be a file or one of {', '.join(enum.__members__)}, got {weights!r}")
    return member


def _download(member: Enum, name: str, progress: bool) -> Mapping[str, Tensor]:
    try:
        return member.get_state_dict(progress=progress, check_hash=True)
    except Exception as error:  # no network, no such file, a broken download: URLError, OSError, RuntimeError, UnpicklingError
        raise RuntimeError(
            f"{name}: {member} could not be fetched from {member.url} ({_first_line(error)}); download it elsewhere and give its path"
        ) from error


def _load_strictly(model: M, state: Mapping[str, Tensor], source: str, name: str) -> M:
    own, wrong = model.state_dict(), {}
    for key, value in state.items():
        if key in own and own[key].shape != value.shape:
            wrong[key] = f"{key} is {tuple(value.shape)} and must be {tuple(own[key].shape)}"
        elif key in own and own[key].is_floating_point() and not value.is_floating_point():
            wrong[key] = f"{key} is {value.dtype} and must be floating point"
    result = model.load_state_dict({key: value for key, value in state.items() if key not in wrong}, strict=False)
    problems = [*wrong.values(), *(f"{key} is missing" for key in result.missing_keys if key not in wrong)]
    problems += [f"{key} is not in the model" for key in result.unexpected_keys]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{name}: {source} does not fit: {', '.join(problems[:8])}{more}")
    return model
