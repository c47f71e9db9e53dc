"""An optimized module's usual call goes from Python to the operator in one step; whatever asks for more gets what the module does."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

import fastconv
from fastconv import _extension

pytestmark = [
    pytest.mark.skipif(not _extension.available or _extension.backend() != "auto", reason="needs the compiled extension"),
    pytest.mark.usefixtures("portable"),
]


def optimized():
    torch.manual_seed(0)
    return fastconv.optimize(fastconv.models.get_model("mobilenet_v2", width_mult=0.25, num_classes=10).eval())


@pytest.fixture
def fast():
    """Called once, so that the next call may be direct."""
    fast = optimized()
    fast(torch.randn(1, 3, 32, 32))
    assert fast._direct is not None
    return fast


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def direct(fast, x=X):
    """What a direct call returns: None where there is none."""
    return fast._direct(fast, x) if fast._direct is not None else None


def test_it_is_what_the_module_returns(fast):
    expected = optimized().plan(X)
    for x in (X, X.contiguous(memory_format=torch.channels_last), X[:, :, ::1]):
        assert torch.equal(direct(fast, x), expected)
        assert torch.equal(fast(x), expected)
    with torch.inference_mode():
        assert torch.equal(fast(X), expected)
    assert direct(fast).shape == (2, 10)
    assert direct(fast).is_contiguous()


@pytest.mark.parametrize(
    "x",
    [
        X.double(),
        X[0],
        X.clone().requires_grad_(),
        nn.Parameter(X.clone()),
        X.to("meta"),
        X.to_sparse(),
        X.numpy(),
        None,
    ],
    ids=["double", "one image", "wants a gradient", "parameter", "meta", "sparse", "numpy", "none"],
)
def test_other_inputs_are_the_modules_affair(fast, x):
    assert direct(fast, x) is None


def test_a_changed_weight_is_seen(fast):
    before = fast(X)
    with torch.no_grad():
        fast.classifier[1].weight.mul_(2)
    assert direct(fast) is None
    after = fast(X)
    assert not torch.equal(before, after)
    assert torch.equal(direct(fast), after)
    fast.classifier[1].weight = nn.Parameter(torch.zeros_like(fast.classifier[1].weight))
    assert direct(fast) is None
    assert torch.equal(fast(X)[0], fast.classifier[1].bias)


def test_hooks_of_the_module_run(fast):
    seen = []
    for register in (fast.register_forward_hook, fast.register_forward_pre_hook):
        handle = register(lambda *args: seen.append(args))
        for calls in (1, 2, 3):
            fast(X)
            assert len(seen) == calls
        seen.clear()
        handle.remove()
        fast(X)
        assert seen == []
    for register in (fast.register_full_backward_hook, fast.register_full_backward_pre_hook):
        handle = register(lambda *args: None)
        fast(X)
        assert direct(fast) is None
        handle.remove()
    fast(X)
    assert torch.equal(direct(fast), optimized().plan(X))  # and then it is direct again


def test_hooks_of_a_submodule_run(fast):
    seen = []
    handle = fast.features[3].register_forward_hook(lambda *args: seen.append(args))
    assert direct(fast) is None
    fast(X)
    assert len(seen) == 1
    handle.remove()
    fast(X)
    assert len(seen) == 1


def test_hooks_on_every_module_run(fast):
    seen = []
    for register in (modules.register_module_forward_hook, modules.register_module_forward_pre_hook):
        handle = register(lambda *args: seen.append(args))
        try:
            for _ in range(3):
                assert direct(fast) is None
                seen.clear()
                fast(X)
                assert seen
            fast.plan.prepare()  # by whatever calls the plan itself
            assert fast.plan.direct(fast._off)(fast, X) is None
        finally:
            handle.remove()


def test_modes_of_torch_are_the_modules_affair(fast):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert direct(fast) is None
    with forward_ad.dual_level():
        assert direct(fast) is None
    assert torch.func.vmap(lambda x: fast(x[None])[0])(X).shape == (2, 10)
    gradient = torch.func.grad(lambda x: fast(x).sum())(X)
    assert gradient.abs().sum() > 0
    x = X.clone().requires_grad_()
    fast(x).sum().backward()
    assert torch.allclose(x.grad, gradient, atol=1e-5)
    assert direct(fast) is not None


def test_train_mode_and_moves_end_it(fast):
    fast.train()
    assert direct(fast) is None
    assert fast(X).requires_grad
    fast.eval()
    fast(X)
    assert direct(fast) is not None
    held = fast._direct
    fast.double()
    assert direct(fast) is None
    assert held(fast, X) is None
    assert fast(X.double()).dtype is torch.float64


def test_an_eval_flag_set_by_hand_is_seen(fast):
    fast.training = True
    assert direct(fast) is None


def test_tracing_and_compiling_take_the_plan(fast):
    traced = torch.jit.trace(fast, X, check_trace=False)
    assert torch.allclose(traced(X), fast(X), atol=1e-5)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), fast(X))
    torch.compiler.reset()
    exported = torch.export.export(fast, (X,))
    assert torch.equal(exported.module()(X), fast(X))


def test_a_compiled_call_of_its_own_is_called(fast):
    fast.compile(fullgraph=True, backend="eager")
    assert direct(fast) is None
    assert torch.equal(fast(X), optimized().plan(X))
    torch.compiler.reset()


def test_copies_and_pickles_have_their_own(fast):
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin._direct is None
        assert torch.equal(twin(X), fast(X))
        with torch.no_grad():
            twin.classifier[1].bias.add_(1)
        assert not torch.equal(twin(X), fast(X))


def test_it_keeps_no_module_alive():
    fast = optimized()
    fast(X)
    plan, module = weakref.ref(fast.plan), weakref.ref(fast)
    del fast
    gc.collect()
    assert module() is None
    assert plan() is None


def test_images_as_results_keep_the_inputs_format():
    torch.manual_seed(0)
    fast = fastconv.optimize(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1)).eval())
    fast(X)
    assert fast._direct is None
    assert fast(X).is_contiguous()
    assert fast(X.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_its_arguments_are_checked():
    from fastconv import _C

    watch = _C.Watch([], [], [], [], [], [])
    with pytest.raises(ValueError, match="arguments must be two"):
        _C.Direct(None, watch, len, (1,), [], [], [])
    with pytest.raises(TypeError, match="empty must be dictionaries"):
        _C.Direct(None, watch, len, (1, True), [[]], [], [])
    with pytest.raises(ValueError, match="fixed must be triples"):
        _C.Direct(None, watch, len, (1, True), [], [(torch, "float32")], [])


def test_the_program_lives_as_long_as_a_call_may_use_it(fast):
    """Another thread may be in it when weights change here."""
    held, number = fast._direct, fast.plan.prepare().whole.number
    with torch.no_grad():
        fast.classifier[1].weight.mul_(2)
    fast(X)
    torch.ops.fastconv.program_run(X, number)
    del held
    gc.collect()
    with pytest.raises(RuntimeError, match=f"no program {number}"):
        torch.ops.fastconv.program_run(X, number)


def test_a_model_calls_directly_where_no_gradients_are_on():
    torch.manual_seed(0)
    model = fastconv.models.get_model("mobilenet_v2", width_mult=0.25, num_classes=10).eval()
    with torch.no_grad():
        expected = model(X)
        assert torch.equal(direct(model), expected)
        assert torch.equal(model(X), expected)
    assert direct(model) is None
    model(X).sum().backward()
    assert model.classifier[1].weight.grad is not None
    model.requires_grad_(False)
    assert torch.equal(model(X), expected)
    model.train()
    with torch.no_grad():
        assert direct(model) is None
