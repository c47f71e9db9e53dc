"""fastconv: SqueezeNet and MobileNet through fused kernels inside PyTorch. `fastconv.optimize(model)` is the one line."""

# A checkout's Python finds the compiled extension and the Triton kernels of an installed wheel.
__path__ = __import__("pkgutil").extend_path(__path__, __name__)

from fastconv import models, nn, ops, reference
from fastconv.nn._replace import replace
from fastconv.optimize import explain, optimize, revert

__all__ = ["explain", "models", "nn", "ops", "optimize", "reference", "replace", "revert"]
__version__ = "0.1.0"
