"""Under torch.compile a planned module is one operator of the graph, which runs its plan as it is at each call."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastconv
from fastconv import _extension
from fastconv.models._torchvision import import_torchvision
from fastconv.optimize import trained

pytestmark = pytest.mark.skipif(not _extension.available or _extension.backend() != "auto", reason="needs the compiled extension")
MODELS = fastconv.models.list_models()
X = torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(name="mobilenet_v2"):
    model = fastconv.models.get_model(name, num_classes=7, **({} if "squeeze" in name else {"width_mult": 0.25})).eval()
    return model.requires_grad_(False)


class Graphs:
    """A backend that keeps the graphs it is given."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        self.graphs.append(module.graph)
        return module.forward

    @property
    def calls(self):
        return [[str(node.target) for node in graph.nodes if node.op.startswith("call")] for graph in self.graphs]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimized", [False, True], ids=["model", "optimized"])
def test_a_model_is_one_operator_without_graph_breaks(name, optimized):
    module = fastconv.optimize(small(name)) if optimized else small(name)
    backend = Graphs()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    assert torch.equal(compiled(X), module(X))
    assert backend.calls
    assert all(calls == ["fastconv.planned.default"] for calls in backend.calls)


@pytest.mark.parametrize(
    "layer",
    [
        fastconv.nn.DepthwiseConv2d(3, 3, 3, padding=1, groups=3),
        fastconv.nn.PointwiseConv2d(3, 8, 1),
        fastconv.nn.Fire(3, 4, 8, 8),
        fastconv.nn.DepthwiseSeparable(3, 8, stride=2),
        fastconv.nn.InvertedResidual(3, 3, 1, 6),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_in_the_users_own_network(layer):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), layer.eval(), nn.Softplus()).requires_grad_(False)
    backend = Graphs()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        y = compiled(x)
        assert torch.equal(y, model(x))
        assert y.stride() == model(x).stride()
    assert all(calls.count("fastconv.planned.default") == 1 for calls in backend.calls)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_another_batch_compiles_once_more_and_no_further(name):
    fast, counter = fastconv.optimize(small(name)), CompileCounter()
    compiled = torch.compile(fast, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 8, 4):
        x = torch.randn(batch, 3, 40, 36)
        assert torch.equal(compiled(x), fast(x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("mode", ["inductor", "aot_eager"])
def test_runs_compiled_with_what_stands_around_it(mode):
    head = nn.Sequential(fastconv.optimize(small("squeezenet1_1")), nn.Softmax(1)).eval()
    compiled = torch.compile(head, backend=mode, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for x in (X, torch.randn(3, 3, 33, 47), torch.randn(1, 3, 40, 36)):
            torch.testing.assert_close(compiled(x), head(x))


@pytest.mark.parametrize("flat", [True, False])
def test_fake_kernel(flat):
    fast = fastconv.optimize(
        small("squeezenet1_1") if flat else nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    )
    torch.compile(fast, backend="eager")(X)
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.fastconv.planned.default, (x, fast._key))


def in_place(fast):
    fast.features[0][0].weight.mul_(1.5)


def replaced(fast):
    fast.classifier[1].weight = nn.Parameter(fast.classifier[1].weight * 2, requires_grad=False)


def loaded(fast):
    fast.load_state_dict({key: value * 1.25 for key, value in fast.state_dict().items()})


def assigned(fast):
    fast.load_state_dict({key: value * 1.25 for key, value in fast.state_dict().items()}, assign=True)


def buffer(fast):
    fast.features[0][1].running_mean.add_(1)


@pytest.mark.parametrize("change", [in_place, replaced, loaded, assigned, buffer])
@pytest.mark.parametrize("optimized", [False, True], ids=["model", "optimized"])
def test_changed_weights_are_seen_without_compiling_again(change, optimized):
    module, counter = small(), CompileCounter()
    module = fastconv.optimize(module) if optimized else module
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    before = compiled(X)
    with torch.no_grad():
        change(module)
    after = compiled(X)
    assert not torch.equal(after, before)
    assert torch.equal(after, module(X))
    assert counter.frame_count == 1


def test_a_later_hook_runs():
    fast, seen = fastconv.optimize(small()), []
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    before = compiled(X)
    fast.features[3].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(compiled(X), before)
    assert len(seen) == 1


def test_a_changed_structure_is_refused():
    fast = fastconv.optimize(small())
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    compiled(X)
    fast.classifier[1] = nn.Linear(fast.classifier[1].in_features, 3)
    with pytest.raises(RuntimeError, match="structure has changed since torch"):
        compiled(X)
    torch._dynamo.reset()
    assert compiled(X).shape == (2, 3)


def test_one_function_compiled_for_several_modules():
    first, second, same = (fastconv.optimize(small()) for _ in range(3))
    same.load_state_dict(first.state_dict())
    compiled = torch.compile(lambda module, x: module(x), backend="aot_eager", fullgraph=True)
    for fast in (first, second, same, first):
        assert torch.equal(compiled(fast, X), fast(X))
    assert not torch.equal(first(X), second(X))


def test_keys():
    first, second, other = fastconv.optimize(small()), fastconv.optimize(small()), fastconv.optimize(small("squeezenet1_1"))
    for fast in (first, second, other):
        torch.compile(fast, backend="eager")(X)
    kinds, numbers = zip(*(fast._key.split("-") for fast in (first, second, other)))
    assert kinds[0] == kinds[1] != kinds[2]
    assert numbers[0] != numbers[1]
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert copied._key is None
        assert torch.equal(torch.compile(copied, backend="eager", fullgraph=True)(X), first(X))
        assert copied._key not in (None, first._key)
    with pytest.raises(RuntimeError, match="planned: no module nobody: a compiled graph runs in the process"):
        torch.ops.fastconv.planned(X, "nobody")


def test_gradients_of_an_optimized_model_run_as_plain_torch():
    fast = fastconv.optimize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)).eval())
    backend = Graphs()
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(fastconv.revert(fast)(x).square().sum(), x)[0]
    y = torch.compile(fast, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], expected, rtol=1e-3, atol=1e-4)
    assert not any("fastconv" in call for calls in backend.calls for call in calls)


def a_step(call, model, x, seed=0):
    """Output, gradients and buffers after a step, in order."""
    for tensor in (x, *model.parameters()):
        tensor.grad = None
    torch.manual_seed(seed)  # for dropout
    y = call(x)
    y.square().sum().backward()
    return [y, *(tensor.grad for tensor in (x, *model.parameters())), *model.buffers()]


def block():
    return fastconv.nn.InvertedResidual(3, 3, 1, 6).train()


def assert_same_bits(actual, expected):
    assert all(b is None if a is None else torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_one_operator_each_way(name):
    """With the bits of a step without torch.compile: outputs, gradients, statistics, random numbers."""
    model = small(name).requires_grad_().train()
    twin, graphs = copy.deepcopy(model), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for seed in range(2):
        assert_same_bits(a_step(compiled, model, X, seed), a_step(twin, twin, X, seed))
    assert graphs.calls[0].count("fastconv.trained.default") == 1
    assert not any("conv2d" in call for call in graphs.calls[0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_step_by_the_backends(backend, mode):
    """Of layers in the user's own network; some parameters are frozen, one has a hook, and the input wants its gradient."""
    layers = fastconv.nn.InvertedResidual(3, 3, 1, 6), fastconv.nn.Fire(3, 4, 8, 8), fastconv.nn.DepthwiseSeparable(16, 8, stride=2)
    model = getattr(nn.Sequential(nn.Tanh(), *layers, nn.Softplus()), mode)()
    model[3].requires_grad_(False)
    twin, calls = copy.deepcopy(model), []
    for module in (model, twin):
        module[2].squeeze.weight.register_hook(lambda gradient, module=module: calls.append(module) or 2 * gradient)
    x = X.clone().requires_grad_()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for image in (x, X.contiguous(memory_format=torch.channels_last).requires_grad_()):
        actual = a_step(compiled, model, image)
        actual[1] = actual[1].clone()
        expected = a_step(twin, twin, image)
        for ours, theirs in zip(actual, expected, strict=True):
            if theirs is None:
                assert ours is None
                continue
            assert (ours - theirs).abs().max() < 2e-5 * max(1.0, theirs.abs().max())  # Inductor's tanh is not torch's
            assert ours.stride() == theirs.stride()
    assert [call is model for call in calls] == [True, False] * 2


class InTheMiddle(nn.Module):
    """A layer whose input and output are images that Inductor makes, and whose memory it uses again."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        z = torch.sin(self.layer(torch.tanh(x) * 2.0)) + 1.5
        return torch.exp(-((z.sum((2, 3), keepdim=True) * torch.cos(z)) ** 2))


@pytest.mark.parametrize(
    ("layer", "layout"),
    [(fastconv.nn.InvertedResidual(8, 8, 1, 6), torch.contiguous_format), (fastconv.nn.Fire(8, 4, 4, 4), torch.channels_last)],
    ids=["chain", "fire"],
)
def test_memory_that_inductor_uses_again_is_not_the_recorded_graphs(layer, layout):
    model = InTheMiddle(copy.deepcopy(layer)).train()
    x, twin = torch.randn(4, 8, 16, 16).contiguous(memory_format=layout), copy.deepcopy(model)
    torch.compile(model, fullgraph=True)(x).sum().backward()
    twin(x).sum().backward()
    actual, expected = next(model.parameters()).grad, next(twin.parameters()).grad
    assert (actual - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("build", ["torchvision_squeezenet", "timm_blocks"])
def test_a_replaced_model_trains_through_the_kernels(build):
    model = globals()[build]()
    twin, graphs = copy.deepcopy(model), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    assert_same_bits(a_step(compiled, model, X), a_step(twin, twin, X))
    assert not any("conv2d" in call for calls in graphs.calls for call in calls)


def timm_blocks():
    try:
        import_torchvision()
        from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
    except ImportError as error:
        pytest.skip(f"needs torchvision and timm: {error}")
    blocks = DepthwiseSeparableConv(3, 8, se_layer=SqueezeExcite), InvertedResidual(8, 8, exp_ratio=4, se_layer=SqueezeExcite)
    return fastconv.replace(nn.Sequential(*blocks, InvertedResidual(8, 8, exp_ratio=4, drop_path_rate=0.5))).train()


def torchvision_squeezenet():
    try:
        torchvision = import_torchvision()
    except ImportError as error:
        pytest.skip(f"needs torchvision: {error}")
    return fastconv.replace(torchvision.models.squeezenet1_1(num_classes=5)).train()


def test_another_batch_of_a_step_compiles_once_more_and_no_further():
    model, counter = block(), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 4):
        compiled(X[:1].repeat(batch, 1, 1, 1)).sum().backward()
    assert counter.frame_count == 2


def test_a_step_frees_its_graph():
    model = block()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(X)
    assert len(trained._steps) == 1
    y.sum().backward()
    assert len(trained._steps) == 0
    y = compiled(X)  # and without going backward
    del y
    assert len(trained._steps) == 0


def test_what_a_compiled_step_does_not_do():
    model = block()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    y = compiled(X).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"trained_backward: a step compiled by torch\.compile goes backward once"):
        y.backward()
    with pytest.raises(NotImplementedError, match=r"trained: second derivatives are not supported under torch\.compile"):
        torch.autograd.grad(compiled(X).sum(), next(model.parameters()), create_graph=True)
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match="trained: the module's parameters have changed"):
        torch.ops.fastconv.trained(X, parameters[1:], [False] * len(parameters), model._step_key, 0)
    with pytest.raises(RuntimeError, match="no module nobody"):
        torch.ops.fastconv.trained(X, parameters, [False] * (len(parameters) + 1), "nobody", 0)


def against_plain(call, model, *inputs, backend="aot_eager"):
    """call(model, *inputs) compiled and not, to the same bits: results, gradients and buffers."""
    twin = copy.deepcopy(model)
    results = []
    for run, module in ((torch.compile(call, backend=backend, fullgraph=True), model), (call, twin)):
        torch.manual_seed(0)
        y = run(module, *inputs)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in module.parameters()), *module.buffers()])
    assert_same_bits(*results)


def test_a_graph_serves_again_when_the_module_is_again_as_it_was():
    model = block()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for change in (model.eval, model.train, lambda: model.requires_grad_(False), model.requires_grad_):
        compiled(X)
        change()
    twin = copy.deepcopy(model)
    assert_same_bits(a_step(compiled, model, X), a_step(twin, twin, X))


def test_two_calls_are_two_steps():
    against_plain(lambda module, x: module(x) + module(x), block(), X)
    dropping = fastconv.replace(nn.Sequential(nn.Conv2d(3, 40, 1), nn.Dropout(0.5))).train()
    against_plain(lambda module, x: module(x) + 2 * module(x), dropping, torch.randn(2, 3, 40, 40))


def test_parameters_are_those_of_the_graph():
    def scaled(module, x):
        with torch.no_grad():
            next(module.parameters()).mul_(3.0).add_(0.2)
        return module(x)

    against_plain(scaled, block(), X)
    model = block()
    others = {name: (tensor.detach() + 0.1).requires_grad_() for name, tensor in model.named_parameters()}
    called = torch.compile(lambda others, x: torch.func.functional_call(model, others, (x,)), backend="eager")
    assert torch.equal(called(others, X), torch.func.functional_call(copy.deepcopy(model), others, (X,)))


def test_a_hook_that_comes_after_the_forward_runs_once():
    model = block()
    weight = next(model.parameters())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(X).square().sum().backward()
    expected, weight.grad = 2 * weight.grad, None
    y = compiled(X)
    weight.register_hook(lambda gradient: 2 * gradient)
    y.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_cropped_image(backend):
    x, model = torch.randn(2, 3, 20, 24).contiguous(memory_format=torch.channels_last)[:, :, 2:-2, 2:-2], block()
    twin = copy.deepcopy(model)
    y, expected = torch.compile(model, backend=backend, fullgraph=True)(x), twin(x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()


class Hearing(nn.Module):
    def forward(self, x):
        self.heard = x.mean()
        return x


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), Hearing()], ids=["writes to its input", "tells what it sees"])
def test_a_sequence_that_does_more_than_compute_is_no_operator(first):
    """Its layers may be."""
    sequence = fastconv.replace(nn.Sequential(first, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))).train()
    assert type(sequence) is not nn.Sequential
    x = X - 0.5
    twin, image = copy.deepcopy(sequence), x.clone()
    y = torch.compile(lambda x: sequence(x) + x, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, twin(image) + image)
    torch.testing.assert_close(x, image)
    torch.testing.assert_close(getattr(sequence[0], "heard", None), getattr(twin[0], "heard", None))


def test_a_hook_on_a_layer_inside_hears_what_it_did():
    model = block()
    twin, heard = copy.deepcopy(model), []
    for module in (model, twin):
        module.conv[0].register_forward_hook(lambda module, args, y: heard.append(y.mean()))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(X), twin(X))
    torch.testing.assert_close(*heard)


def test_keys_of_unpickled_modules_are_their_own():
    model = torchvision_squeezenet().features
    torch.compile(model, backend="eager")(X)
    assert model._step_key
    copies = [pickle.loads(pickle.dumps(model)) for _ in range(2)]
    with torch.no_grad():
        next(copies[1].parameters()).mul_(2)
    for other in copies:
        twin = copy.deepcopy(other)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(other, backend="eager")(X), twin(X))
    assert len({module._step_key for module in (model, *copies)}) == 3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [lambda: block(), lambda: torchvision_squeezenet()], ids=["block", "sequence"])
def test_a_copy_of_a_module_that_trains_compiled(duplicate, make):
    model = make()
    torch.compile(model, backend="eager", fullgraph=True)(X)
    other = duplicate(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    twin = copy.deepcopy(other)
    torch._dynamo.reset()
    assert_same_bits(a_step(torch.compile(other, backend="eager", fullgraph=True), other, X), a_step(twin, twin, X))


def test_where_a_step_runs_as_plain_torch():
    model = nn.Sequential(fastconv.nn.InvertedResidual(3, 3, 1, 6), fastconv.nn.Fire(3, 4, 8, 8)).train()
    for context, x in ((torch.no_grad(), X), (torch.autocast("cpu", torch.bfloat16), X), (nullcontext(), X.double())):
        graphs = Graphs()
        torch._dynamo.reset()
        with context:
            torch.compile(model.to(x.dtype), backend=graphs, fullgraph=True)(x)
        assert not any("fastconv" in call for calls in graphs.calls for call in calls)


def test_autocast_and_function_transforms_run_as_plain_torch():
    fast = fastconv.optimize(small())
    plain = fastconv.revert(fast)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(X), plain(X))
        assert torch.equal(compiled(X), fast(X))  # and back again
        batched = torch.compile(torch.vmap(lambda x: fast(x)), backend="eager", fullgraph=True)
        torch.testing.assert_close(batched(X[None]), fast(X)[None], rtol=1e-3, atol=1e-4)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.side = small("squeezenet1_1").features, nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return {"body": self.body(x), "side": self.side(x)}


@pytest.mark.parametrize(
    ("model", "one"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 1), nn.GELU()), True),  # layers left to ATen
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, dilation=2)).to(torch.bfloat16), True),  # a dtype without a kernel
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.Unflatten(1, (2, 4)), nn.Flatten(1, 2), nn.Conv2d(8, 8, 1)),
            False,
        ),  # code nothing is known of
        (TwoOutputs(), False),
        (nn.Sequential(nn.Tanh()), False),  # nothing for a kernel
    ],
)
def test_other_plans(model, one):
    fast, backend = fastconv.optimize(model.eval().requires_grad_(False)), Graphs()
    x = X.to(next(model.parameters(), X).dtype)
    y, expected = torch.compile(fast, backend=backend, fullgraph=True)(x), fast(x)
    torch.testing.assert_close(y, expected)
    assert (backend.calls == [["fastconv.planned.default"]]) is one
