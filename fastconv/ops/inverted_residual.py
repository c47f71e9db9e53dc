import torch
from torch import Tensor

from fastconv.ops import _checks, _cuda
from fastconv.ops._prepared import PreparedBlock, PreparedResidual, arrange, choose, pack, pack_depthwise, pack_pointwise
from fastconv.ops._register import overload, register


def _parts(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, stride, padding, activation, residual
):
    y = torch.ops.fastconv.pointwise(x, expand_weight, expand_bias, None, activation)
    y = torch.ops.fastconv.depthwise(y, depthwise_weight, depthwise_bias, stride, padding, activation)
    return torch.ops.fastconv.pointwise(y, project_weight, project_bias, x if residual else None, None)


_inverted_residual = register("inverted_residual", _parts)


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    activation: str | None = "relu6",
    residual: bool = False,
) -> Tensor:
    """MobileNet V2's block: 1x1 expand and depthwise, each with the activation, then a linear 1x1 projection (+ x).

    x: (N, C, H, W); expand_weight: (E, C, 1, 1); depthwise_weight: (E, 1, K, K), K = 3 or 5; project_weight: (Cout, E, 1, 1);
    biases: (E,), (E,), (Cout,). residual: add x, which then must have the output's shape.
    Returns (N, Cout, H', W') in x's dtype and memory format.
    Raises ValueError for a shape, value or device that does not fit, TypeError for a type or dtype.
    MobileNetV2 (Sandler et al., arXiv:1801.04381); specification: `fastconv.reference.inverted_residual`.
    """
    stride, padding = _checks.stride_padding("inverted_residual", stride, padding)
    args = (
        x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
        stride, padding, activation, residual,
    )  # fmt: skip
    _checks.inverted_residual(*args)
    return _inverted_residual(*args)


def prepare_inverted_residual(
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    *,
    stride,
    padding,
    expand_activation: str | None,
    depthwise_activation: str | None,
    squeeze_excite: tuple | None = None,
    activation: str | None = None,
    exact: bool = False,
    reduction: int = 1,
) -> PreparedResidual:
    """Binds MobileNet's block, V1 to V3, to its weights: returns call(x, residual=None).

    [1x1 expand] -> depthwise -> [squeeze-excitation] -> 1x1 projection (+ residual), each with its own activation.
    expand_weight: None for a block without an expand.
    squeeze_excite: (reduce_weight, reduce_bias, expand_weight, expand_bias, squeeze_activation, gate_activation): the depthwise's
    output y is multiplied by gate(expand(squeeze(reduce(mean of y's pixels)))), with 1x1 weights; the gate is "hardsigmoid" or "sigmoid".
    exact, reduction: see prepare_pointwise.
    """
    stride, padding = _checks.stride_padding("inverted_residual", stride, padding)
    *gate_weights, squeeze_activation, gate_activation = squeeze_excite or (None, None)
    after = (stride, padding, expand_activation, depthwise_activation, squeeze_activation, gate_activation, activation)
    weights = {
        "expand_weight": expand_weight,
        "expand_bias": expand_bias,
        "depthwise_weight": depthwise_weight,
        "depthwise_bias": depthwise_bias,
        "project_weight": project_weight,
        "project_bias": project_bias,
    }
    gates = {f"squeeze_excite_{i}": tensor for i, tensor in enumerate(gate_weights)}
    compiled, label = choose("inverted_residual", "inverted_residual_packed", **weights, **gates, stride=stride, padding=padding)
    if not compiled:
        expand_weight, expand_bias, *depthwise, project_weight, project_bias = arrange(label, *weights.values())
        gate = list(arrange(label, *gate_weights))
        args = (expand_weight, expand_bias, *depthwise, gate, project_weight, project_bias)
        if label.endswith("triton"):
            return PreparedBlock(_triton_block, args, label, after)
        return PreparedResidual(_block, args, label, after)
    place = {"exact": exact, "gated": bool(gate_weights)}
    project, kernel = pack_pointwise(project_weight, project_bias, label, **place, reduction=reduction)
    expand = (None, None)
    if expand_weight is not None:
        before = reduction // (stride[0] * stride[1])
        expand, expand_kernel = pack_pointwise(expand_weight, expand_bias, label, **place, reduction=before, strassen=False)
        kernel = max(kernel, expand_kernel, key=len)
    gate = [*pack(*gate_weights[:2]), *pack(*gate_weights[2:])] if gate_weights else []
    args = (*expand, *pack_depthwise(depthwise_weight, depthwise_bias), gate, *project)
    return PreparedResidual(overload("inverted_residual_packed"), args, kernel, after)


def _triton_block(x, *args):
    """_block through the Triton kernels, fused where that is faster."""
    _cuda.check_input("inverted_residual", x, args[2] if args[0] is None else args[0])
    return _cuda.run("inverted_residual", x, *args, file="blocks")


def _block(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, squeeze_excite, project_weight, project_bias, residual,
    stride, padding, expand_activation, depthwise_activation, squeeze_activation, gate_activation, activation,
):  # fmt: skip
    """inverted_residual_packed with plain weights, any dtype and device."""
    ops = torch.ops.fastconv
    y = x if expand_weight is None else ops.pointwise(x, expand_weight, expand_bias, None, expand_activation)
    y = ops.depthwise(y, depthwise_weight, depthwise_bias, stride, padding, depthwise_activation)
    if squeeze_excite:
        w1, b1, w2, b2 = squeeze_excite
        gate = ops.pointwise(ops.pointwise(ops.global_avg_pool(y), w1, b1, None, squeeze_activation), w2, b2, None, None)
        y = y * (torch.sigmoid(gate) if gate_activation == "sigmoid" else torch.nn.functional.hardsigmoid(gate))
    return ops.pointwise(y, project_weight, project_bias, residual, activation)
