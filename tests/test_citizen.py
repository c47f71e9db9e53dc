"""What users do with any torch module, done with ours: layers, a replaced network and an optimized one beside the plain network."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from harness import randomise_norms
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastconv
from fastconv.models._torchvision import import_torchvision

try:
    torchvision = import_torchvision()
    from torchvision.models import mobilenetv2, squeezenet
except ImportError as error:
    pytest.skip(f"needs torchvision: {error}", allow_module_level=True)

X = torch.randn(2, 3, 17, 20, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([1, 3])


def plain() -> nn.Sequential:
    """A layer of each kind, in torchvision's classes and torch's."""
    torch.manual_seed(0)
    net = nn.Sequential(
        OrderedDict(
            stem=torchvision.ops.Conv2dNormActivation(3, 8, 3, 2),
            block=mobilenetv2.InvertedResidual(8, 8, 1, 3),
            fire=squeezenet.Fire(8, 4, 8, 8),
            depthwise=nn.Conv2d(16, 16, 3, padding=1, groups=16),
            tanh=nn.Tanh(),
            pointwise=nn.Conv2d(16, 12, 1),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(12, 5),
        )
    )
    randomise_norms(net)
    return net.eval()


def replaced() -> nn.Module:
    return fastconv.replace(plain())


def optimized() -> nn.Module:
    return fastconv.optimize(plain())


each = pytest.mark.parametrize("make", [replaced, optimized], ids=["replaced", "optimized"])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return ((actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()).item()


def infer(module: Callable[[Tensor], Tensor], x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return module(x)


def step(module: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    """The loss of a step of training and all gradients."""
    module.zero_grad()
    loss = nn.functional.cross_entropy(module(x).float(), TARGET)
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad.clone() for name, parameter in module.named_parameters()}}


def agree(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert actual.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in actual.items():  # a bias before a norm has none but rounding
        assert (value - expected[name]).norm() <= tolerance * (expected[name].norm() + 1e-2 * largest), name


# Autocast and dtypes.


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inference(make, dtype):
    """No further from float64 than twice plain torch under autocast."""
    module, original, exact = make(), plain(), infer(plain().double(), X.double())
    with torch.autocast("cpu", dtype):
        actual, expected = infer(module), infer(original)
    assert actual.dtype == expected.dtype
    assert (actual - exact).norm() <= 2 * (expected - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert close(infer(module), infer(original))  # and out again


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_autocast_training(train):
    """Forward under autocast, backward outside or inside: gradients in the parameters' dtype, as far off as plain torch's."""

    def mixed(module):
        with torch.autocast("cpu", torch.bfloat16):
            return step(module.train(train))

    exact = {name: value.float() for name, value in step(plain().double().train(train), X.double()).items()}
    actual, expected = mixed(replaced()), mixed(plain())
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert (value - exact[name]).norm() <= 2 * (expected[name] - exact[name]).norm() + 2**-8 * exact[name].norm() + 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_cuda_by_shape(dtype):
    """On fake CUDA tensors, which need no device: dtype and memory format of the outputs."""
    enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with FakeTensorMode():
            x = torch.empty(2, 8, 9, 9, device="cuda").to(memory_format=torch.channels_last)
            filters, project = (torch.empty(*shape, device="cuda") for shape in ((8, 1, 3, 3), (6, 8, 1, 1)))
            expand = torch.empty(8, 8, 1, 1, device="cuda")
            for y in (
                fastconv.ops.depthwise(x, filters),
                fastconv.ops.pointwise(x, project),
                fastconv.ops.separable(x, filters, None, project, None),
                fastconv.ops.inverted_residual(x, expand, None, filters, None, project, None),
            ):
                assert y.dtype == dtype
                assert y.is_contiguous(memory_format=torch.channels_last)
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", before)


@each
@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.float64).float()])
def test_conversions(make, change):
    module, original = make(), plain()
    infer(module)
    module, original = change(module), change(original)
    x = X.to(next(original.parameters()).dtype)
    assert close(infer(module, x), infer(original, x), {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(x.dtype, 1e-5))


# torch.func.


@each
def test_functional_call(make):
    module, original = make(), plain()
    before = infer(module)
    other = {name: value * 1.1 if value.is_floating_point() else value for name, value in original.state_dict().items()}
    actual = infer(lambda x: torch.func.functional_call(module, other, (x,)))
    assert close(actual, infer(lambda x: torch.func.functional_call(original, other, (x,))))
    assert not torch.equal(actual, before)
    assert torch.equal(infer(module), before)


@each
def test_vmap_over_the_batch_and_over_models(make):
    module, original = make(), plain()
    assert close(infer(torch.vmap(lambda x: module(x[None])[0])), infer(original))
    models = [make().requires_grad_(False) for _ in range(2)]
    with torch.no_grad():
        models[1].head.weight.mul_(2)
    parameters, buffers = torch.func.stack_module_state(models)
    ensemble = torch.vmap(lambda p, b: torch.func.functional_call(module, (p, b), (X,)))(parameters, buffers)
    for y, model in zip(ensemble, models):
        assert close(y, infer(model))


def test_gradients_of_each_image():
    module, original = replaced(), plain()

    def gradients(net):
        parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

        def loss(parameters, x, target):
            return nn.functional.cross_entropy(torch.func.functional_call(net, parameters, (x[None],)), target[None])

        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, X, TARGET)

    agree(gradients(module), gradients(original))


def test_tangents_through_a_module():
    for make in (replaced, optimized):
        actual, expected = (torch.func.jvp(net, (X,), (X,)) for net in (make(), plain()))
        assert all(map(close, actual, expected))


# Copies and files.


@each
@pytest.mark.parametrize("warm", [False, True])
def test_copies_and_files(make, warm):
    module = make()
    expected = infer(module)
    if not warm:
        module = make()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for copied in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(infer(copied), expected)
        with torch.no_grad():
            copied.head.bias.add_(1)
        assert close(infer(copied), expected + 1)
    assert torch.equal(infer(module), expected)


@each
def test_state_dicts(make):
    module, original = make(), plain()
    infer(module)
    assert list(module.state_dict()) == list(original.state_dict())
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = plain()
    nn.init.ones_(other.head.weight)
    for target in (other, make()):
        target.load_state_dict(state, strict=True)
        assert close(infer(target), infer(original))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"head.bias\""):
        module.load_state_dict({key: value for key, value in state.items() if key != "head.bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"more\""):
        module.load_state_dict({**state, "more": X})
    with pytest.raises(RuntimeError, match=r"size mismatch for head.bias"):
        module.load_state_dict({**state, "head.bias": X})


@each
def test_shared_memory(make):
    module = make()
    expected = infer(module)
    module.share_memory()
    assert all(parameter.is_shared() for parameter in module.parameters())
    assert torch.equal(infer(module), expected)
    with torch.no_grad():
        module.head.bias.add_(1)
    assert close(infer(module), expected + 1)


# Weights that are computed from others.


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


REPARAMETRIZED = {
    "parametrize": lambda module: parametrize.register_parametrization(module, "weight", Scaled()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm by a hook": nn.utils.weight_norm,
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}
BY_HOOK = ("weight_norm by a hook", "pruned")
PLACES = {"depthwise": "depthwise", "pointwise": "pointwise", "in a block": "block.conv.2", "in a fire": "fire.expand3x3"}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", REPARAMETRIZED)
@each
def test_weights_made_from_others_are_never_stale(make, way, place, late):
    """Before or after replace and optimize; the weights they are made from move between calls."""

    def change(net):
        torch.manual_seed(1)  # spectral_norm's start
        REPARAMETRIZED[way](net.get_submodule(PLACES[place]))
        return net

    original = change(plain())
    module = make() if late else change(plain())
    if late:
        infer(module)
        change(module)
    elif make is replaced:
        fastconv.replace(module)
    else:
        if way in BY_HOOK:  # whose weight is part of a graph: as copy.deepcopy, until a call without gradients has made it anew
            with pytest.raises(RuntimeError, match=r"Only Tensors created explicitly .* deepcopy"):
                fastconv.optimize(module)
            infer(module)
        module = fastconv.optimize(module)
    for _ in range(2):
        assert close(infer(module), infer(original))
        for net in (module, original):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(1.25)
    if make is replaced:
        agree(step(module.train()), step(original.train()))


@pytest.mark.parametrize("place", PLACES)
def test_pruning_made_permanent(place):
    module, original = replaced(), plain()
    for net in (module, original):
        part = net.get_submodule(PLACES[place])
        prune.l1_unstructured(part, "weight", 0.5)
        infer(net)
        prune.remove(part, "weight")
        assert (part.weight == 0).any()
    assert close(infer(module), infer(original))
    assert close(infer(fastconv.optimize(module)), infer(original))


@each
def test_a_bias_taken_away(make):
    module, original = make(), plain()
    infer(module)
    for net in (module, original):
        net.depthwise.bias = None
        del net.pointwise.bias
        net.pointwise.register_parameter("bias", None)
    assert close(infer(module), infer(original))


# Hooks.


@pytest.mark.parametrize("place", ["stem", "stem.0", "block", "block.conv.0", "fire", "fire.squeeze", "depthwise", "pointwise", "head"])
@each
def test_hooks_see_what_they_see_in_plain_torch(make, place):
    """Forward and forward-pre hooks, registered after the first call: at each module's own inputs and outputs, which they may change."""
    module, original = make(), plain()
    infer(module)
    seen: list[list[Tensor]] = []
    for net in (module, original):
        found: list[Tensor] = []
        part = net.get_submodule(place)
        handles = [
            part.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].clone())),
            part.register_forward_hook(lambda _, args, y, found=found: found.append(y.clone()) or y * 1.5),
        ]
        found.append(infer(net))
        for handle in handles:
            handle.remove()
        found.append(infer(net))
        seen.append(found)
    assert len(seen[0]) == 4
    assert all(map(close, *seen))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("place", ["stem", "block", "block.conv.0", "fire", "depthwise", "pointwise"])
def test_backward_hooks(place, train):
    """On replaced modules. An optimized one runs them where its input wants a gradient."""
    for make in (replaced, optimized):
        seen = []
        for net in (make(), plain()):
            found: list[Tensor] = []
            part = net.train(train).get_submodule(place)
            part.register_full_backward_hook(lambda _, inputs, outputs, found=found: found.append(outputs[0].clone()))
            part.register_full_backward_pre_hook(lambda _, outputs, found=found: found.append(outputs[0].clone()))
            net(X.clone().requires_grad_()).square().sum().backward()
            seen.append(found)
        assert len(seen[0]) == 2
        assert all(close(*pair, 1e-4) for pair in zip(*seen))


# Modes.


@each
def test_inference_mode_and_gradients_in_turns(make):
    """A plan made in inference mode serves outside it, and never gets into a graph."""
    module, original = make(), plain()
    for _ in range(2):
        with torch.inference_mode():
            y = module(X)
            assert y.is_inference()
        assert close(y.clone(), infer(original))
        assert not infer(module).is_inference()
        x = X.clone().requires_grad_()
        gradients = [torch.autograd.grad(net(x).square().sum(), x)[0] for net in (module, original)]
        assert close(*gradients, 1e-4)
    if make is replaced:
        agree(step(module), step(original))


def test_requires_grad_toggled():
    module, original = replaced(), plain()
    for net in (module, original):
        net.requires_grad_(False)
    assert not module(X).requires_grad
    assert close(module(X), original(X))
    for net in (module, original):
        net.fire.requires_grad_(True)
        nn.functional.cross_entropy(net(X), TARGET).backward()
    wanted = {name for name, parameter in original.named_parameters() if parameter.grad is not None}
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None} == wanted
    for parameter, other in zip(module.fire.parameters(), original.fire.parameters()):
        assert close(parameter.grad, other.grad, 1e-4)


@each
def test_averaged_weights(make):
    """EMA over a training run: the average is a module like its model, and never runs with old weights."""
    rate = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    module, original = make(), plain()
    averages = [torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=rate, use_buffers=True) for net in (module, original)]
    for factor in (1.0, 1.2, 0.7):
        for net, average in zip((module, original), averages):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(factor)
            average.update_parameters(net)
            average.eval()
        assert close(*map(infer, averages))
    loader = [X, X + 1]
    for average in averages:
        torch.optim.swa_utils.update_bn(loader, average)
        average.eval()
    assert close(*map(infer, averages))


def test_optimizers_of_every_kind():
    """Steps that write weights as tensors, in place, fused or by foreach: inference between them is never stale."""
    for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop):
        for options in ({"foreach": True}, {"foreach": False}):
            module, original = replaced(), plain()
            for net in (module, original):
                optimizer = kind(net.parameters(), lr=1e-3, **options)
                for _ in range(2):
                    infer(net.eval())
                    step(net)
                    optimizer.step()
            assert close(infer(module), infer(original), 1e-4), kind


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_training(reentrant):
    def run(net, x):
        if isinstance(net, nn.Sequential) and not reentrant:
            return checkpoint_sequential(net, 3, x, use_reentrant=False)
        return checkpoint(net, x, use_reentrant=reentrant)

    results = []
    for net in (replaced(), plain()):
        net.train()
        x = X.clone().requires_grad_()
        nn.functional.cross_entropy(run(net, x), TARGET).backward()
        results.append({"x": x.grad, **{name: parameter.grad for name, parameter in net.named_parameters()}})
        results[-1] |= {name: buffer.float() for name, buffer in net.named_buffers()}
    agree(*results)


def test_a_compiled_step_of_training():
    """fullgraph: the original's operators, which the compiler fuses itself."""
    module, original = replaced().train(), plain().train()
    expected = step(original)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    nn.functional.cross_entropy(compiled(X), TARGET).backward()
    agree({name: parameter.grad for name, parameter in module.named_parameters()}, {k: v for k, v in expected.items() if k != "loss"})
    for buffer, other in zip(module.buffers(), original.buffers()):
        torch.testing.assert_close(buffer, other)


def test_synchronised_norms():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(replaced())
    assert sum(isinstance(part, nn.SyncBatchNorm) for part in module.modules()) == 4
    assert close(infer(module), infer(plain()))  # in eval mode a batch norm like any other
    back = torch.nn.modules.module.Module.state_dict(module)
    assert list(back) == list(plain().state_dict())


@each
def test_data_parallel(make):
    """Without GPUs it is the module itself. A replica's weights are other tensors and no parameters: it runs plain torch, or is refused."""
    module = make()
    assert torch.equal(infer(nn.DataParallel(module)), infer(module))
    if make is optimized:
        with pytest.raises(RuntimeError, match="DataParallel cannot replicate an optimized module: optimize a copy"):
            module._replicate_for_data_parallel()
        return
    conv = module.pointwise
    replica = conv._replicate_for_data_parallel()
    replica.weight, replica.bias = 2 * conv.weight.detach(), conv.bias.detach()
    x = torch.randn(2, 16, 5, 5)
    assert close(infer(replica, x), infer(lambda x: nn.functional.conv2d(x, replica.weight, replica.bias), x))
