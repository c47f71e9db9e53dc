"""Gradients of every public operator: against finite differences, and against ATen's through the reference."""

import functools
import gc
import itertools

import pytest
import torch
import torch._dynamo.testing
from harness import ACTIVATIONS, channels_last, check_autocast, check_nonfinite, check_registrations, reals
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastconv import ops, reference

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSORS = {  # the tensors of each operator, x first
    "depthwise": ("x", "weight", "bias"),
    "pointwise": ("x", "weight", "bias", "residual"),
    "fire_expand": ("x", "weight1x1", "bias1x1", "weight3x3", "bias3x3"),
    "fire": ("x", "squeeze_weight", "squeeze_bias", "weight1x1", "bias1x1", "weight3x3", "bias3x3"),
    "separable": ("x", "depthwise_weight", "depthwise_bias", "pointwise_weight", "pointwise_bias", "residual"),
    "inverted_residual": (
        "x", "expand_weight", "expand_bias", "depthwise_weight", "depthwise_bias", "project_weight", "project_bias",
    ),
    "stem": ("x", "weight", "bias"),
    "max_pool": ("x",),
    "global_avg_pool": ("x",),
    "depthwise_backward_input": ("grad", "weight"),
    "depthwise_backward_weight": ("grad", "x"),
}  # fmt: skip
CHAINS = tuple(TENSORS)[:7]


def case(op, *, batch=2, c=5, out=4, k=3, height=6, width=7, stride=(1, 1), padding=(1, 1), activation=None, residual=True, seed=0):
    """(tensors by name, the other arguments) of an operator, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    geometry = {"stride": stride, "padding": padding}
    size = [(extent + 2 * p - k) // s + 1 for extent, s, p in zip((height, width), stride, padding)]
    x, filters, grad = draw(batch, c, height, width), draw(c, 1, k, k), draw(batch, c, *size)
    if op == "depthwise":
        return {"x": x, "weight": filters, "bias": draw(c)}, {**geometry, "activation": activation}
    if op == "pointwise":
        tensors = {"x": x, "weight": draw(out, c, 1, 1), "bias": draw(out)}
        return tensors | ({"residual": draw(batch, out, height, width)} if residual else {}), {"activation": activation}
    if op == "fire_expand":
        values = x, draw(out, c, 1, 1), draw(out), draw(out + 1, c, 3, 3), draw(out + 1)
        return dict(zip(TENSORS[op], values)), {}
    if op == "fire":
        values = x, draw(3, c, 1, 1), draw(3), draw(out, 3, 1, 1), draw(out), draw(out + 1, 3, 3, 3), draw(out + 1)
        return dict(zip(TENSORS[op], values)), {}
    if op == "separable":
        tensors = dict(zip(TENSORS[op], (x, filters, draw(c), draw(out, c, 1, 1), draw(out))))
        more = {**geometry, "depthwise_activation": activation, "activation": activation}
        return tensors | ({"residual": draw(batch, out, *size)} if residual else {}), more
    if op == "inverted_residual":
        added = residual and size == [height, width]
        last = c if added else out
        values = x, draw(out, c, 1, 1), draw(out), draw(out, 1, k, k), draw(out), draw(last, out, 1, 1), draw(last)
        return dict(zip(TENSORS[op], values)), {**geometry, "activation": activation, "residual": added}
    if op == "stem":
        return {"x": x, "weight": draw(out, c, k, k), "bias": draw(out)}, {**geometry, "activation": activation}
    if op == "max_pool":
        return {"x": x}, {"stride": stride, "padding": tuple(min(p, 1) for p in padding), "ceil_mode": residual}
    if op == "global_avg_pool":
        return {"x": x}, {}
    if op == "depthwise_backward_input":
        return {"grad": grad, "weight": filters}, {"input_size": (height, width), **geometry}
    return {"grad": grad, "x": x}, {"kernel_size": (k, k), **geometry}


def gradients(function, tensors, rest, wanted, grad=None):
    """The gradients of the tensors named, for the output's gradient (default: of its sum, which is a single expanded element)."""
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    y = function(**leaves, **rest)
    return torch.autograd.grad(y.sum() if grad is None else y, [leaves[name] for name in wanted], grad)


def agree(op, tensors, rest, wanted=None, grad=None, dtype=torch.float32):
    """Ours in `dtype` beside the reference's in float64, each within 64 roundings of the largest gradient."""
    wanted = tuple(tensors) if wanted is None else wanted
    expected = gradients(getattr(reference, op), tensors, rest, wanted, grad)
    ours = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    found = gradients(getattr(ops, op), ours, rest, wanted, None if grad is None else grad.to(dtype))
    for name, one, other in zip(wanted, found, expected):
        assert one.dtype == dtype
        assert one.shape == other.shape
        scale = other.abs().max() if other.numel() else 0
        error = (one.double() - other).abs().max().item() if other.numel() else 0.0
        assert error <= 64 * torch.finfo(dtype).eps * max(scale, 1), f"{op}, {name}: off by {error:.3g}, the largest is {scale:.3g}"
        if name in ("x", "grad") and op != "global_avg_pool":  # whose gradient is one number an image and channel, expanded
            last = ours[name].is_contiguous(memory_format=torch.channels_last) and not ours[name].is_contiguous()
            assert one.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), (op, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", TENSORS)
def test_first_and_second_derivatives(op, activation):
    """Finite differences, in float64."""
    tensors, rest = case(op, batch=2, c=2, out=3, height=4, width=5, stride=(1, 2), activation=activation)
    if activation is not None and "activation" not in rest:
        return
    names = tuple(tensors)

    def call(*values):
        return getattr(ops, op)(**dict(zip(names, values)), **rest)

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    for i, leaf in enumerate(leaves):  # some of them constants
        leaf.requires_grad_(i % 2 == 0)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


F = torch.func
TRANSFORMS = {  # of a function of one tensor, to be called with a few of them stacked
    "grad": lambda f: lambda many: F.grad(f)(many[0]),
    "vjp": lambda f: lambda many: F.vjp(f, many[0])[1](many[1].sum()),
    "jvp": lambda f: lambda many: F.jvp(f, (many[0],), (many[1],)),
    "jacfwd of jacrev": lambda f: lambda many: F.hessian(f)(many[0]),
    "jacrev of jacrev": lambda f: lambda many: F.jacrev(F.jacrev(f))(many[0]),
    "grad of grad": lambda f: lambda many: F.grad(lambda x: (F.grad(f)(x) ** 2).sum())(many[0]),
    "gradients of each": lambda f: F.vmap(F.grad(f)),
    "each one's tangent": lambda f: lambda many: F.vmap(lambda x: F.jvp(f, (x,), (x,)))(many),
    "second derivatives of each": lambda f: F.vmap(F.grad(lambda x: (F.grad(f)(x) ** 2).sum())),
    "functionalize": lambda f: lambda many: F.functionalize(F.grad(f))(many[0]),
}


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", TENSORS)
def test_torch_func(op, transform, layout):
    """With respect to an image and to a weight."""
    tensors, rest = case(op, batch=1, c=2, out=2, height=3, width=4, activation="silu", residual=op != "inverted_residual")
    if layout == "channels_last":
        tensors = {name: channels_last(tensor) for name, tensor in tensors.items()}
    for name in list(tensors)[:2]:
        many = torch.stack([tensors[name], tensors[name] * 0.5, -tensors[name]])

        def function(package, name=name):
            return lambda value: (getattr(package, op)(**{**tensors, name: value}, **rest) ** 2).sum()

        found, expected = (TRANSFORMS[transform](function(package))(many) for package in (ops, reference))
        torch.testing.assert_close(found, expected)


def test_torch_func_runs_the_kernels():
    """Gradients through the operators' own backward, in no other way than autograd's."""
    tensors, rest = case("separable", activation="relu", residual=False)
    values = [tensor.float().requires_grad_() for tensor in tensors.values()]

    def loss(*values):
        return (ops.separable(**dict(zip(tensors, values)), **rest) ** 2).sum()

    expected = torch.autograd.grad(loss(*values), values)
    with torch.no_grad():
        found = F.grad(loss, tuple(range(len(values))))(*values)
        compiled = torch.compile(F.grad(loss), backend="aot_eager", fullgraph=True)(*values)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(compiled, expected[0])


def test_tangents_are_not_lost():
    """Forward mode outside torch.func, where no weight wants a gradient."""
    x, weight, tangent = reals(1, 8, 5, 5), reals(4, 8, 1, 1), reals(1, 8, 5, 5)
    with torch.autograd.forward_ad.dual_level():
        y = ops.pointwise(torch.autograd.forward_ad.make_dual(x, tangent), weight)
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(found, reference.pointwise(tangent, weight))


@pytest.mark.parametrize("op", ["depthwise_backward_input", "depthwise_backward_weight"])
@pytest.mark.parametrize(("k", "stride", "padding"), [(3, (2, 2), (1, 0)), (5, (1, 1), (2, 2)), (2, (3, 1), (0, 1)), (7, (1, 2), (3, 3))])
def test_the_family_is_closed(op, k, stride, padding):
    """Any kernel size, and once more than second derivatives."""
    tensors, rest = case(op, c=2, k=k, height=8, width=7, stride=stride, padding=padding)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def call(*values):
        return getattr(ops, op)(**dict(zip(tensors, values)), **rest)

    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    third = functools.partial(torch.autograd.functional.vhp, lambda *values: (call(*values) ** 2).sum(), tuple(leaves))
    expected = functools.partial(
        torch.autograd.functional.vhp,
        lambda *values: (getattr(reference, op)(**dict(zip(tensors, values)), **rest) ** 2).sum(), tuple(leaves),
    )  # fmt: skip
    directions = tuple(torch.randn_like(leaf) for leaf in leaves)
    for one, other in zip(third(directions)[1], expected(directions)[1]):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("op", TENSORS)
@given(data=st.data())
@SETTINGS
def test_against_aten(op, data):
    draw = data.draw
    k, pairs = draw(st.sampled_from((3, 5))), st.tuples(st.integers(1, 2), st.integers(1, 2))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    size, few = st.integers(k, 11), st.integers(1, 67)
    tensors, rest = case(
        op, batch=draw(st.integers(0 if op in CHAINS else 1, 3)), c=draw(few), out=draw(few), k=k, height=draw(size), width=draw(size),
        stride=draw(pairs), padding=padding, activation=draw(st.sampled_from((None, "silu"))), residual=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    if op.startswith("fire"):  # relu: keep every sum away from its kink
        tensors = {name: tensor.abs() if "bias" in name else tensor.abs() * 0.1 for name, tensor in tensors.items()}
    if draw(st.booleans()):
        tensors = {name: channels_last(tensor) for name, tensor in tensors.items()}
    wanted = draw(st.sets(st.sampled_from(tuple(tensors)), min_size=1).map(sorted).map(tuple))
    y = getattr(reference, op)(**tensors, **rest)
    grad = {
        "of the sum": None,
        "dense": torch.randn_like(y),
        "channels_last": channels_last(torch.randn_like(y)),
        "transposed": torch.randn_like(y.transpose(2, 3)).transpose(2, 3),
        "one channel for all": torch.randn_like(y[:, :1]).expand_as(y),
    }[draw(st.sampled_from(("of the sum", "dense", "channels_last", "transposed", "one channel for all")))]
    agree(op, tensors, rest, wanted, grad)


@pytest.mark.parametrize("op", CHAINS)
def test_every_subset_of_inputs(op):
    """Only what is asked for, each as if all were."""
    tensors, rest = case(op, activation="silu")
    every = dict(zip(tensors, gradients(getattr(ops, op), tensors, rest, tuple(tensors))))
    for size in range(1, len(tensors) + 1):
        for wanted in itertools.combinations(tensors, size):
            for name, one in zip(wanted, gradients(getattr(ops, op), tensors, rest, wanted)):
                torch.testing.assert_close(one, every[name], msg=f"{wanted}: {name}")


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", ["depthwise", "pointwise", "separable", "inverted_residual", "stem"])
def test_activations(op, activation, layout):
    """In float64, where what is recomputed and what the reference computed lie on the same side of every kink."""
    tensors, rest = case(op, c=9, out=9, stride=(2, 1), activation=activation)
    tensors = {name: 2 * (tensor if layout == "NCHW" else channels_last(tensor)) for name, tensor in tensors.items()}
    grad = torch.randn_like(getattr(reference, op)(**tensors, **rest))
    agree(op, tensors, rest, grad=grad, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kinks_nan_and_infinities(activation, dtype):
    """Every corner of an activation has ATen's gradient, NaN included: x reaches the activation as it is."""
    values = [torch.nan, torch.inf, -torch.inf, -7.0, -3.0, -2.0, -0.0, 0.0, 1e-30, 2.0, 3.0, 6.0, 7.0, 1e30, -1e30, 0.5]
    x = torch.tensor(values, dtype=dtype).view(1, 1, 4, 4)
    one, grad = torch.ones(1, 1, 1, 1, dtype=dtype), torch.randn(1, 1, 4, 4, dtype=dtype)
    grads = [
        gradients(package.pointwise, {"x": x, "weight": one}, {"activation": activation}, ("x",), grad) for package in (ops, reference)
    ]
    assert torch.equal(grads[0][0].nan_to_num(nan=12345.0), grads[1][0].nan_to_num(nan=12345.0))
    # the form that has derivatives of its own agrees
    leaf = x.clone().requires_grad_()
    (again,) = torch.autograd.grad(ops.pointwise(leaf, one, activation=activation), leaf, grad, create_graph=True)
    torch.testing.assert_close(again.detach(), grads[1][0], equal_nan=True)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_nonfinite_gradients(stride):
    """As in ATen's float32; its float64 multiplies padding with them, too, and gives a weight NaN from taps outside the image."""
    tensors, rest = case("depthwise_backward_input", c=9, height=7, width=6, stride=stride)
    weight, grad = tensors["weight"], tensors["grad"].float()
    check_nonfinite(
        lambda grad: ops.depthwise_backward_input(grad, weight.float(), **rest),
        lambda grad: reference.depthwise_backward_input(grad, weight, **rest),
        grad,
    )
    tensors, rest = case("depthwise_backward_weight", c=9, height=7, width=6, stride=stride)
    x = tensors["x"].float().abs() + 1
    for value, is_value in ((torch.nan, torch.isnan), (torch.inf, torch.isposinf), (-torch.inf, torch.isneginf)):
        for index in ((0, 0, 0, 0), (-1, -1, -1, -1), (0, 4, 1, 1)):
            spoiled, only = grad.clone(), torch.zeros_like(grad)
            spoiled[index], only[index] = value, 1
            reached = reference.depthwise_backward_weight(only, x, **rest) != 0
            assert torch.equal(is_value(ops.depthwise_backward_weight(spoiled, x, **rest)), reached), (value, index)


@pytest.mark.parametrize("op", TENSORS)
def test_empty_batch(op):
    """Images get empty gradients, weights zeros; of the pools and the family, too."""
    tensors, rest = case(op, batch=0)
    for name, one in zip(tensors, gradients(getattr(ops, op), tensors, rest, tuple(tensors))):
        assert one.shape == tensors[name].shape
        assert not one.any()


SAVED = {  # what stays in memory between the passes: inputs, and "y", the output
    ("depthwise", "relu6"): {"x", "weight", "bias", "y"},
    ("depthwise", "silu"): {"x", "weight", "bias"},
    ("pointwise", None): {"x", "weight", "bias"},
    ("pointwise", "hardswish"): {"x", "weight", "bias", "residual"},
    ("separable", "relu"): {"x", "depthwise_weight", "depthwise_bias", "pointwise_weight", "pointwise_bias", "y"},
    ("inverted_residual", "hardswish"): set(TENSORS["inverted_residual"]),
    ("fire", None): {*TENSORS["fire"], "y"},
    ("fire_expand", None): {*TENSORS["fire_expand"], "y"},
    ("max_pool", None): {"x"},
    ("global_avg_pool", None): set(),
}


def saved(op, tensors, rest):
    """Names of the tensors that the forward pass saves; fails where one is neither an input nor the output."""
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor):
        y = getattr(ops, op)(**tensors, **rest)
    known = {tensor.data_ptr(): name for name, tensor in {**tensors, "y": y}.items()}
    return {known[tensor.data_ptr()] for tensor in packed}


@pytest.mark.parametrize(("op", "activation"), SAVED, ids=str)
def test_saved_tensors(op, activation):
    tensors, rest = case(op, activation=activation)
    assert saved(op, {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}, rest) == SAVED[op, activation]


@pytest.mark.parametrize("op", ["depthwise", "pointwise"])
def test_a_frozen_layer_keeps_no_image(op):
    """x is neither part of its own gradient nor of the slope."""
    tensors, rest = case(op, activation="relu6")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    tensors["x"].requires_grad_()
    assert saved(op, tensors, rest) == {"weight", "bias", "y"}


@pytest.mark.parametrize("op", TENSORS)
def test_nothing_outlives_the_backward(op):
    """No cycle keeps a recomputed image until the garbage collector comes."""
    tensors, rest = case(op, activation="hardswish")
    leaves = {name: tensor.float().requires_grad_() for name, tensor in tensors.items()}
    grad = torch.randn_like(getattr(ops, op)(**leaves, **rest))

    def living():
        return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = living()
        torch.autograd.grad(getattr(ops, op)(**leaves, **rest), list(leaves.values()), grad)
        assert living() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", CHAINS + ("max_pool", "global_avg_pool"))
def test_many_gradients_at_once(op, dtype, layout):
    """is_grads_batched, and vmap over autograd.grad: as one after the other."""
    tensors, rest = case(op, activation="silu")
    leaves = [(tensor if layout == "NCHW" else channels_last(tensor)).to(dtype).requires_grad_() for tensor in tensors.values()]
    y = getattr(ops, op)(**dict(zip(tensors, leaves)), **rest)
    grads = torch.randn(3, *y.shape, dtype=dtype)
    single = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in grads]
    batched = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda grad: torch.autograd.grad(y, leaves, grad, retain_graph=True))(grads)
    for i, expected in enumerate(zip(*single)):
        for found in (batched[i], mapped[i]):
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", TENSORS)
def test_vmap_of_an_operator(op):
    """Over images alone, and over every tensor."""
    tensors, rest = case(op, activation="relu")
    call, names = getattr(ops, op), tuple(tensors)
    function = lambda *values: call(**dict(zip(names, values)), **rest)  # noqa: E731
    images = [name in ("x", "residual", "grad") for name in names]
    for mapped in (images, [True] * len(names)):
        many = [torch.stack([tensor, 2 * tensor, -tensor], 1) if there else tensor for tensor, there in zip(tensors.values(), mapped)]
        found = torch.func.vmap(function, in_dims=tuple(1 if there else None for there in mapped))(*many)
        for i in range(3):
            torch.testing.assert_close(found[i], function(*(value.select(1, i) if there else value for value, there in zip(many, mapped))))


def test_compiled_training():
    """torch.compile takes forward and backward into one graph for every size."""
    tensors, rest = case("separable", activation="relu6", residual=False)
    weights = {name: tensor.float().requires_grad_() for name, tensor in tensors.items() if name != "x"}

    def loss(x):
        return (ops.separable(x, **weights, **rest) ** 2).sum()

    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counted, fullgraph=True, dynamic=True)
    for size in (6, 8, 9):
        x = reals(2, 5, size, size + 1).requires_grad_()
        for one, other in zip(*(torch.autograd.grad(function(x), [x, *weights.values()]) for function in (compiled, loss))):
            torch.testing.assert_close(one, other)
    assert counted.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """A region around the forward pass alone, or around both: the same gradients, in the parameters' own dtype."""
    tensors, rest = case("inverted_residual", activation="hardswish", stride=(1, 1))
    leaves = [tensor.float().requires_grad_() for tensor in tensors.values()]

    def loss():
        return ops.inverted_residual(**dict(zip(tensors, leaves)), **rest).float().pow(2).mean()

    with torch.autocast("cpu", dtype=dtype):
        inside = torch.autograd.grad(loss(), leaves)
        y = loss()
    for one, other, leaf in zip(inside, torch.autograd.grad(y, leaves), leaves):
        assert one.dtype == leaf.dtype
        assert torch.equal(one, other)
    y = loss()  # outside: a region around the backward alone changes nothing
    expected = torch.autograd.grad(y, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=dtype):
        assert all(map(torch.equal, torch.autograd.grad(y, leaves), expected))


@pytest.mark.parametrize("op", ["depthwise_backward_input", "depthwise_backward_weight"])
def test_registrations_of_the_family(op):
    tensors, rest = case(op, stride=(2, 1))
    first, second = (tensor.float() for tensor in tensors.values())
    size = list(rest.get("input_size", rest.get("kernel_size")))
    check_registrations(getattr(torch.ops.fastconv, op).default, first, second, size, [2, 1], [1, 1])
    call = functools.partial(getattr(ops, op), first, second, size, stride=(2, 1), padding=1)

    def specification():
        dtype = torch.get_autocast_dtype("cpu")
        return getattr(reference, op)(first.to(dtype), second.to(dtype), size, stride=(2, 1), padding=1)

    check_autocast(call, specification)
