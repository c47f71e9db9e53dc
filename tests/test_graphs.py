"""The CUDA graphs of an optimized module, without CUDA: a tape of operators stands in for a captured graph.

The tape has what makes graphs treacherous: replaying it reads and writes the very tensors of its recording, with the weights of then.
tests/gpu/test_device_graphs.py repeats the essential ones with torch.cuda.
"""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastconv
from fastconv.optimize import graphs
from fastconv.optimize.module import OptimizedModule


class Tape(TorchDispatchMode):
    """Records operators as they run; `replay` runs them again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.name().startswith("aten::empty"):  # an allocation is no work
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for then, now in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(then, torch.Tensor) and then.data_ptr() != now.data_ptr():  # no view, not in place
                    then.copy_(now)
                    time.sleep(0)  # another thread may come in between


class Fake:
    """torch.cuda's part: counts, and objects to what a GPU would object to."""

    made: ClassVar[list] = []
    stream = threading.local()  # .number: the caller's current stream
    busy = False  # whether the caller captures a graph of its own
    failure: Exception | None = None

    def __init__(self, device):
        self.device, self.log, self.captures, self.replays, self.warmed = device, [], 0, 0, 0
        self.within = None
        self.made.append(self)

    @staticmethod
    def serves(x):
        return True

    @classmethod
    def capturing(cls, device):
        return cls.busy

    def capture(self, record, warm_up):
        assert not torch.is_inference_mode_enabled()
        self.captures += 1
        self.warmed += warm_up is not None
        if warm_up:
            warm_up()
        if self.failure:
            raise self.failure
        tape = Tape()
        with tape:
            result = record()

        def replay():
            assert self.within == threading.get_ident(), "outside begin and end"
            self.replays += 1
            self.note("replay")
            tape.replay()

        return replay, result

    def note(self, what):
        self.log.append((what, getattr(self.stream, "number", 0)))

    def begin(self):
        assert self.within is None, "two replays at once"
        self.within = threading.get_ident()
        self.note("wait")

    def end(self):
        self.within = None
        self.note("record")

    def drain(self):
        assert self.within is None
        self.note("drain")


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(graphs, "backend", Fake)
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "busy", False)
    monkeypatch.setattr(Fake, "failure", None)
    return Fake


class Net(nn.Module):
    """What a plan holds packed, and a parameter and a buffer that a step reads where they lie."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(16, 1, 1), requires_grad=False)
        self.register_buffer("shift", torch.zeros(16, 1, 1))
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        return self.last(self.stem(x) * self.scale + self.shift).mean((2, 3))


def image(*shape, seed=0):
    return torch.randn(shape or (2, 3, 12, 10), generator=torch.Generator().manual_seed(seed))


def net():
    torch.manual_seed(0)
    return Net().eval()


def agree(y, expected):
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def ready(model=None, x=None):
    """An optimized module whose graph for x is captured, and the fake GPU."""
    fast = fastconv.optimize(net() if model is None else model)
    x = image() if x is None else x
    with torch.no_grad():
        fast(x)
        fast(x)
    (device,) = Fake.made
    assert device.captures == 1
    return fast, device


@torch.no_grad()
def test_first_call_runs_second_captures_later_ones_replay(fake):
    model = net()
    fast = fastconv.optimize(model)
    for call in range(1, 6):
        x = image(seed=call)
        before = x.clone()
        agree(fast(x), model(x))
        assert torch.equal(x, before)
        assert [(made.captures, made.replays) for made in fake.made] == ([] if call == 1 else [(1, call - 1)])
    assert fast.cuda_graph_report() == ["(2, 3, 12, 10) float32: captured"]


@torch.no_grad()
def test_replay_gives_the_bits_of_the_plan():
    fast, device = ready()
    x = image(seed=1)
    y = fast(x)
    assert device.replays == 2
    assert torch.equal(y, fast.plan(x))


@torch.no_grad()
def test_results_are_the_callers_own():
    fast, _ = ready()
    first = fast(image(seed=1))
    kept = first.clone()
    second = fast(image(seed=2))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    first.zero_()  # nor does what the caller does to a result reach the next
    assert torch.equal(fast(image(seed=2)), second)


@torch.no_grad()
def test_an_input_changed_after_the_call_changes_nothing():
    fast, _ = ready()
    x = image(seed=1)
    y = fast(x)
    wanted = y.clone()
    x.zero_()
    assert torch.equal(y, wanted)
    assert not torch.equal(fast(x), wanted)  # and the same tensor with new values is a new input


@torch.no_grad()
def test_outputs_are_reused_on_demand():
    model = net()
    fast, _ = ready(model)
    fast.reuse_outputs = True
    first = fast(image(seed=1))
    second = fast(image(seed=2))
    assert first.data_ptr() == second.data_ptr()
    agree(second, model(image(seed=2)))


@torch.no_grad()
def test_a_graph_for_each_kind_of_input():
    model = net()
    fast, device = ready(model)
    kinds = [image(1, 3, 12, 10), image(2, 3, 8, 8), image().contiguous(memory_format=torch.channels_last)]
    for count, x in enumerate(kinds, 2):
        for _ in range(3):
            agree(fast(x), model(x))
        assert device.captures == count
    # a slice is copied into the same buffer as a dense image
    wide = torch.zeros(2, 3, 12, 13)
    wide[..., 1:11] = image(seed=3)
    agree(fast(wide[..., 1:11]), model(image(seed=3)))
    assert device.captures == 4
    assert fast.cuda_graph_report()[-2] == "(2, 3, 12, 10) float32 channels_last: captured"


@torch.no_grad()
def test_dtypes_have_graphs_of_their_own():
    """In one plan: a module whose weights promote takes either."""

    class Promoting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.conv(x.mul(1.0).float())

    fast, device = ready(Promoting(), image())
    for x in (image(seed=1).double(), image(seed=2).double()):
        y = fast(x)
    assert device.captures == 2
    agree(y, fast.plan(x))


@torch.no_grad()
def test_output_keeps_the_inputs_memory_format():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8)).eval()
    fast = fastconv.optimize(model)
    for last in (True, False):
        x = image().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for _ in range(3):
            y = fast(x)
            assert y.is_contiguous(memory_format=torch.channels_last) is last
            agree(y, model(x))


@torch.no_grad()
@pytest.mark.parametrize("switch", ["precision", "deterministic"])
def test_switches_that_choose_kernels_are_part_of_the_key(switch):
    fast, device = ready()
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if switch == "precision":
            matmul.fp32_precision = "ieee" if before == "tf32" else "tf32"
        else:
            torch.use_deterministic_algorithms(True)
        fast(image())
        fast(image())
    finally:
        matmul.fp32_precision = before
        torch.use_deterministic_algorithms(False)
    assert device.captures == 2


@torch.no_grad()
def test_the_least_recently_used_graph_goes():
    model = net()
    fast, device = ready(model)
    made = fast._graphs
    made.capacity = 2
    a, b, c = image(), image(1, 3, 12, 10), image(3, 3, 12, 10)
    for x in (b, b, a, c, c):  # a was used after b
        agree(fast(x), model(x))
    assert device.captures == 3
    assert len(made.captured) == 2
    agree(fast(a), model(a))
    assert device.captures == 3
    agree(fast(b), model(b))  # seen before: captured again at once
    assert device.captures == 4


@torch.no_grad()
def test_kinds_that_come_once_are_forgotten(monkeypatch):
    monkeypatch.setattr(graphs, "SEEN", 4)
    fast, device = ready()
    for width in range(8, 20):
        fast(image(1, 3, 8, width))
    assert device.captures == 1
    assert len(fast._graphs._seen) == 4


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "load_state_dict", "replaced", "batch norm"])
def test_changed_weights_drop_the_graphs(change):
    model = net()
    fast, device = ready(model)
    x = image(seed=1)
    for module in (model, fast):
        torch.manual_seed(1)
        if change == "in place":
            module.last.weight.mul_(-2)
        elif change == "load_state_dict":
            module.load_state_dict({name: torch.rand_like(value.float()) for name, value in module.state_dict().items()})
        elif change == "replaced":
            module.last.weight = nn.Parameter(torch.randn(8, 16, 1, 1))
        else:
            module.stem[1].running_mean.add_(1)
    replays = device.replays
    agree(fast(x), model(x))
    assert not fast._graphs.captured  # the first call with new weights runs by itself
    assert device.replays == replays + 1  # one that began before the weights were looked at, whose result nobody got
    assert ("drain", 0) in device.log  # before the old weights' memory is free for others
    agree(fast(x), model(x))
    assert device.captures == 2
    agree(fast(image(seed=2)), model(image(seed=2)))
    assert device.captures == 2


@torch.no_grad()
def test_weights_that_change_between_calls_cost_no_captures():
    model = net()
    fast = fastconv.optimize(model)
    for seed in range(4):
        agree(fast(image(seed=seed)), model(image(seed=seed)))
        for module in (model, fast):
            module.last.weight.mul_(0.5)
    assert not Fake.made


@torch.no_grad()
def test_tensors_read_where_they_lie_may_change_in_place():
    model = net()
    fast, device = ready(model)
    for module in (model, fast):
        module.scale.fill_(3)
        module.shift.fill_(-0.5)
    agree(fast(image(seed=1)), model(image(seed=1)))
    assert device.captures == 1


@torch.no_grad()
@pytest.mark.parametrize("how", ["a buffer", "through data"])
def test_a_tensor_elsewhere_is_captured_anew(how):
    """A graph would read the old place."""
    model = net()
    fast, device = ready(model)
    for module in (model, fast):
        if how == "a buffer":
            module.shift = torch.full((16, 1, 1), 0.25)
        else:
            module.scale.data = torch.full((16, 1, 1), 2.0)
    for seed in (2, 3, 4):
        agree(fast(image(seed=seed)), model(image(seed=seed)))
    assert device.captures == 2


@torch.no_grad()
def test_calls_that_a_plan_hands_on_have_no_graph():
    """An argument with a default, and an image without a batch, run the module's own code."""

    class Optional(Net):
        def forward(self, x, sign=None):
            if sign is not None and sign.sum() < 0:
                x = -x
            return super().forward(x)

    torch.manual_seed(0)
    model = Optional().eval()
    fast = fastconv.optimize(model)
    for sign in (torch.ones(1), -torch.ones(1), torch.ones(1), -torch.ones(1)):
        agree(fast(image(), sign), model(image(), sign))
    for _ in range(2):
        with pytest.raises(ValueError, match="expected 4D input"):  # batch norm's, as the module's own
            fast(torch.randn(3, 8, 8))
    assert not Fake.made


@torch.no_grad()
@pytest.mark.parametrize("how", ["to", "train", "load"])
def test_moving_and_training_drop_the_graphs(how):
    fast, device = ready()
    if how == "to":
        fast.double()
    elif how == "train":
        fast.train().eval()
    x = image().double() if how == "to" else image(seed=1)
    if how == "load":
        fast.load_state_dict(fast.state_dict())
    agree(fast(x), fast.plan(x))
    assert device.replays == (2 if how == "load" else 1)  # loaded weights are seen once a replay has begun


@torch.no_grad()
def test_weights_are_looked_at_while_the_graph_runs(monkeypatch):
    fast, device = ready()
    prepare, order = fast.plan.prepare, []
    monkeypatch.setattr(fast.plan, "prepare", lambda: order.append(device.replays) or prepare())
    before = device.replays
    fast(image(seed=1))
    assert order == [before + 1]


@torch.no_grad()
def test_copies_have_no_graphs():
    model = net()
    fast, device = ready(model)
    fast.reuse_outputs = True
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin._graphs is None
        assert twin.reuse_outputs
        for seed in range(3):
            agree(twin(image(seed=seed)), model(image(seed=seed)))
        assert len(twin._graphs.captured) == 1
        twin.last.weight.zero_()
    agree(fast(image(seed=5)), model(image(seed=5)))
    assert device.captures == 1


@torch.no_grad()
def test_modules_that_share_weights():
    model = net()
    first, second = OptimizedModule(model), OptimizedModule(model)
    x = image()
    for _ in range(3):
        agree(first(x), model(x))
        agree(second(x), model(x))
    assert [device.captures for device in Fake.made] == [1, 1]  # a pool each: they may run at the same time
    first.last.weight.mul_(2)
    for _ in range(3):
        agree(second(x), model(x))
        agree(first(x), model(x))


def test_inference_mode_and_no_grad_share_a_graph():
    model = net()
    fast = fastconv.optimize(model)
    with torch.inference_mode():
        for _ in range(3):
            y = fast(image())
        assert y.is_inference()
        agree(y, model(image()))
    with torch.no_grad():
        y = fast(image(seed=1))
    assert not y.is_inference()
    agree(y, model(image(seed=1)).detach())
    with torch.inference_mode():
        x = image(seed=2)
    y = fast(x)  # an inference tensor, outside
    agree(y, fast.plan(x))
    assert Fake.made[0].captures == 1
    assert Fake.made[0].replays == 4


def test_gradients_keep_their_way():
    fast, device = ready()
    x = image().requires_grad_()
    y = fast(x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert device.replays == 1
    fast(image())  # wants none, and nothing that a step reads does
    assert device.replays == 2
    fast.scale.requires_grad_()
    assert fast(image()).requires_grad
    assert device.replays == 2


@torch.no_grad()
@pytest.mark.parametrize("where", ["autocast", "outer capture", "vmap", "global hook", "keywords", "compile", "empty", "large"])
def test_runs_without_graphs(where, monkeypatch):
    model = net()
    fast = fastconv.optimize(model)
    x, call, compare = image(), fast, model
    if where == "outer capture":
        monkeypatch.setattr(Fake, "busy", True)
    elif where == "vmap":
        x, call, compare = image(2, 2, 3, 8, 8), torch.func.vmap(fast), torch.func.vmap(model)
    elif where == "keywords":
        call = lambda x: fast(x=x)  # noqa: E731
    elif where == "compile":
        call = torch.compile(fast, backend="eager")
    elif where == "empty":
        x = image(0, 3, 12, 10)
    elif where == "large":
        monkeypatch.setattr(graphs, "LARGEST", 4 * x.numel() - 1)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None) if where == "global hook" else None
    try:
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "autocast"):
                y = call(x)
                expected = compare(x)
            assert y.dtype == expected.dtype
            if where != "empty":
                torch.testing.assert_close(
                    y, expected, rtol=0.05 if where == "autocast" else 1e-4, atol=0.05 if where == "autocast" else 1e-5
                )
    finally:
        if hook:
            hook.remove()
    assert not Fake.made


@torch.no_grad()
def test_python_code_of_the_models_own_is_not_replayed():
    calls = []

    class Branching(nn.Module):
        def forward(self, x):
            calls.append(1)
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Branching(), nn.Conv2d(8, 8, 1)).eval()
    fast = fastconv.optimize(model)
    for seed in range(4):
        for x in (image(seed=seed), -image(seed=seed)):
            agree(fast(x), model(x))
    assert not Fake.made
    assert "does not trace" in fast.cuda_graph_report()[0]


@torch.no_grad()
def test_a_hook_that_comes_later_is_called_each_time():
    model = net()
    fast, device = ready(model)
    calls = []
    handle = fast.stem[2].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        agree(fast(image()), model(image()))
    assert len(calls) == 3
    assert device.replays == 2  # one began before the hook was seen
    assert fast.cuda_graph_report() == ["no graphs: stem.2 has hooks"]
    handle.remove()
    agree(fast(image()), model(image()))


@torch.no_grad()
def test_a_capture_that_fails_is_said_once_and_not_tried_again(monkeypatch):
    model = net()
    fast = fastconv.optimize(model)
    monkeypatch.setattr(Fake, "failure", RuntimeError("operation not permitted when stream is capturing\nmore"))
    agree(fast(image()), model(image()))
    with pytest.warns(RuntimeWarning, match=r"\(2, 3, 12, 10\) float32 run without a CUDA graph \(operation not permitted") as caught:
        agree(fast(image()), model(image()))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (image(), image(1, 3, 9, 9), image(1, 3, 9, 9)):
            agree(fast(x), model(x))
    (device,) = Fake.made
    assert device.captures == 2  # one for each kind
    assert fast.cuda_graph_report()[0].endswith("no graph, operation not permitted when stream is capturing")
    monkeypatch.setattr(Fake, "failure", None)
    fast.last.weight.mul_(1)
    fast(image())
    fast(image())
    assert fast.cuda_graph_report() == ["(2, 3, 12, 10) float32: captured"]


class Several(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1)
        self.pack = pack

    def forward(self, x):
        return self.pack(self.a(x), self.b(x))


def _pair(a, b):
    return (a, [b, 3, None])


def _dict(a, b):
    return {"a": a, "b": (b,)}


@torch.no_grad()
@pytest.mark.parametrize("pack", [_pair, _dict], ids=["tuple", "dict"])
def test_results_of_any_structure_are_copied(pack):
    model = Several(pack).eval()
    fast, device = ready(model)
    first = fast(image(seed=1))
    kept = copy.deepcopy(first)
    second = fast(image(seed=2))
    assert device.replays == 3
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    torch.testing.assert_close(second, model(image(seed=2)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(5, 8, 1)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    model = Two().eval()
    fast = fastconv.optimize(model)
    for seed in range(4):
        x, y = image(seed=seed), image(2, 5, 12, 10, seed=seed)
        agree(fast(x, y), model(x, y))
    assert Fake.made[0].captures == 1
    assert Fake.made[0].replays == 3


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


def test_a_result_of_an_unknown_kind_is_not_replayed():
    """Its tensors would be the graph's own."""
    fast, _ = ready()
    made = fast._graphs
    made.plan = Wrapping(made.plan)
    with pytest.raises(graphs.Refused, match="its output holds a Output"):
        made._capture((image(1, 3, 8, 8),), warm=True)


class Wrapping:
    def __init__(self, plan):
        self.plan = plan

    def run(self, x):
        return Output(self.plan.run(x))


@torch.no_grad()
def test_the_callers_stream_waits_and_is_recorded():
    fast, device = ready()
    device.log.clear()
    for number in (7, 9):
        Fake.stream.number = number
        fast(image())
    Fake.stream.number = 0
    assert device.log == [(what, number) for number in (7, 9) for what in ("wait", "replay", "record")]


@torch.no_grad()
def test_a_thread_that_captures_what_another_ran_first_warms_up():
    fast = fastconv.optimize(net())
    thread = threading.Thread(target=fast, args=(image(),))
    thread.start()
    thread.join()
    fast(image())
    assert (Fake.made[0].captures, Fake.made[0].warmed) == (1, 1)
    fast(image(1, 3, 8, 8))
    fast(image(1, 3, 8, 8))
    assert (Fake.made[0].captures, Fake.made[0].warmed) == (2, 1)


def test_threads_share_a_module():
    """Eight threads, three shapes, weights that change twice meanwhile: each gets the result of its own input."""
    model = net()
    fast = fastconv.optimize(model)
    shapes = [(2, 3, 12, 10), (1, 3, 12, 10), (1, 3, 9, 9)]
    inputs = [image(*shape, seed=seed) for shape in shapes for seed in range(4)]
    problems = []

    def work(turn, scales):
        try:
            with torch.no_grad():
                for i in range(30):
                    x = inputs[(7 * turn + 5 * i) % len(inputs)]
                    y = fast(x)
                    if not any(torch.allclose(y, wanted[scale][id(x)], rtol=1e-4, atol=1e-5) for scale in scales):
                        raise AssertionError(f"call {i} of thread {turn}")
        except Exception as problem:
            problems.append(problem)

    wanted = {}
    with torch.no_grad():
        for scale in (1, 2):
            wanted[scale] = {id(x): model(x) for x in inputs}
            model.last.weight.mul_(2)
            model.last.bias.mul_(2)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for scale in (1, 2):
            threads = [threading.Thread(target=work, args=(turn, (scale,))) for turn in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not problems, problems[0]
            assert Fake.made[0].replays > 100
            with torch.no_grad():
                fast.last.weight.mul_(2)
                fast.last.bias.mul_(2)
    finally:
        sys.setswitchinterval(interval)
    assert len(Fake.made) == 1


@torch.no_grad()
def test_the_modules_switch():
    model = net()
    fast, device = ready(model)
    fast.cuda_graphs = False
    for seed in range(3):
        agree(fast(image(seed=seed)), model(image(seed=seed)))
    assert (device.captures, device.replays) == (1, 1)
    assert fast._graphs is None  # nor is their memory kept
    fast.cuda_graphs = True
    for _ in range(2):
        fast(image())
    assert Fake.made[-1].captures == 1


@pytest.mark.parametrize(("value", "says"), [("0", "False"), ("no", "must be 0 or 1, got 'no'")])
def test_the_environments_switch(value, says):
    code = "from fastconv.optimize import graphs; print(graphs.enabled)"
    child = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FASTCONV_CUDA_GRAPHS": value}, capture_output=True, text=True, check=False
    )
    assert says in child.stdout + child.stderr


@torch.no_grad()
def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setattr(graphs, "enabled", False)
    fast = fastconv.optimize(net())
    for _ in range(3):
        fast(image())
    assert not Fake.made
