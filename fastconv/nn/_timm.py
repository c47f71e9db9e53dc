"""What our twins of timm's blocks share."""

from __future__ import annotations

from torch import nn

from fastconv.nn._training import gate_modules
from fastconv.nn._twin import member


def activations(layer: str, module: nn.Module, count: int) -> dict[str, nn.Module]:
    """What follows the norms bn1 to bn`count` of a block of timm's: act1 and so on, which timm's BatchNormAct2d holds itself."""
    found = {}
    for i in range(1, count + 1):
        norm = member(layer, module, f"bn{i}", nn.BatchNorm2d)
        if not isinstance(getattr(norm, "drop", nn.Identity()), nn.Identity):
            raise ValueError(f"{layer}: bn{i}.drop is not supported, got {type(norm.drop).__name__}")
        owner, name = (module, f"act{i}") if getattr(module, f"act{i}", None) is not None else (norm, "act")
        found[f"act{i}"] = member(layer, owner, name, nn.Module)
    return found


# Parts of timm's blocks that networks other than these use.
_OTHERS = ("conv_s2d", "bn_s2d", "aa")


def check_optional(layer: str, module: nn.Module) -> None:
    """ValueError where an optional part of a block of timm's is one that ours has not."""
    for name in (*_OTHERS, "se"):
        part = getattr(module, name, None)
        if not (part is None or isinstance(part, nn.Identity) or (name == "se" and gate_modules(part))):
            raise ValueError(f"{layer}: {name} is not supported, got {type(part).__name__}")


def adopt(module: nn.Module, kind: type[nn.Module], norms: int) -> None:
    """Makes a block of timm's a `kind` of ours: activations beside its norms, squeeze-excitation and stochastic depth or their absence,
    nothing else. Raises TypeError or ValueError, and leaves it as it was, where its norms are others. After check_optional."""
    member(kind.__name__, module, "has_skip", bool)
    found = activations(kind.__name__, module, norms)
    module.__class__ = kind
    for name in _OTHERS:
        module._modules.pop(name, None)
    for name, activation in found.items():
        norm = getattr(module, name.replace("act", "bn"))
        norm.__class__ = nn.BatchNorm2d
        norm._modules.clear()
        module.add_module(name, activation)
    for name in ("se", "drop_path"):
        if getattr(module, name, None) is None:
            module.add_module(name, nn.Identity())
