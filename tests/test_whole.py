"""The whole plan as one call: the same bits as step by step, memory that stays, and what it leaves to the steps."""

import itertools
import threading

import pytest
import torch
from torch import nn

import fastconv
from fastconv import _extension
from fastconv.optimize.plan import Ready

pytestmark = pytest.mark.skipif(not _extension.available or _extension.backend() != "auto", reason="needs the compiled extension")


def by_steps(fast):
    """A copy whose plan calls its steps one by one."""
    copy = fastconv.optimize(fastconv.revert(fast), exact=fast.exact)
    ready = copy.plan.prepare()
    assert isinstance(ready, Ready)
    assert ready.whole is not None
    copy.plan._ready = ready._replace(whole=None)
    return copy


def optimized(name, **options):
    torch.manual_seed(0)
    return fastconv.optimize(fastconv.models.get_model(name, **options).eval())


@pytest.mark.parametrize("name", fastconv.models.list_models())
@pytest.mark.parametrize("shape", [(1, 3, 96, 96), (3, 3, 97, 131)], ids=str)
def test_same_bits_as_the_steps(name, shape):
    fast = optimized(name, num_classes=10)
    x = torch.randn(shape)
    expected = by_steps(fast)(x)
    for _ in range(2):  # with an empty arena, then with what the first call left in it
        assert torch.equal(fast(x), expected)
    assert torch.equal(fast(x.contiguous(memory_format=torch.channels_last)), expected)
    assert expected.shape == (shape[0], 10)


@pytest.mark.parametrize("name", fastconv.models.list_models())
@pytest.mark.parametrize("size", [224, 97])
def test_first_call_of_fresh_threads(name, size):
    """Rings of rows outlive the call that makes them, so a new thread's memory must not grow or move under them."""
    fast = optimized(name, num_classes=10)
    x = torch.randn(1, 3, size, size)
    expected = by_steps(fast)(x)
    before = torch.get_num_threads()
    for number in (1, 2, 3):
        results = []

        def first(number=number, results=results):
            torch.set_num_threads(number)
            with torch.inference_mode():
                results.append(fast(x))

        thread = threading.Thread(target=first)
        thread.start()
        thread.join()
        torch.set_num_threads(before)
        assert torch.equal(results[0], expected), number


@pytest.fixture
def threads():
    """Sets the number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "squeezenet1_1"])
def test_same_bits_however_rows_and_images_are_split(name, threads):
    """Chains of blocks, rings and whole images a thread: which of them serve depends on the threads, the size and the batch."""
    fast = optimized(name, num_classes=10)
    steps = by_steps(fast)
    x = torch.randn(5, 3, 224, 192)
    threads(1)
    expected = steps(x)
    for number in (1, 2, 3, 7):
        threads(number)
        assert torch.equal(fast(x), expected)
        assert torch.equal(fast(x[:1]), expected[:1])
        assert torch.equal(fast(x[:2].contiguous(memory_format=torch.channels_last)), expected[:2])


@pytest.mark.parametrize("name", fastconv.models.list_models())
@pytest.mark.parametrize("size", [33, 96])
def test_same_bits_in_groups_of_every_size(name, size, threads):
    """Of a batch, images go in groups that grow on the way; some are left over."""
    fast = optimized(name, num_classes=10)
    x = torch.randn(37, 3, size, size)
    threads(1)
    expected = torch.cat([fast(image[None]) for image in x])
    for number in (1, 2, 3):
        threads(number)
        for count in (37, 32, 16, 9, 4, 2):
            assert torch.equal(fast(x[:count]), expected[:count]), (number, count)
        assert torch.equal(fast(x[:20].contiguous(memory_format=torch.channels_last)), expected[:20])


def test_a_value_that_passes_where_groups_would_grow(threads):
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, 2, 1)
            self.narrow, self.wide = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

        def forward(self, x):
            y = self.stem(x).relu()
            return (self.wide(self.narrow(y).relu()) + y).mean((2, 3))

    torch.manual_seed(0)
    model = Long().eval()
    fast = fastconv.optimize(model)
    assert fast.plan.prepare().whole is not None
    x = torch.randn(16, 3, 104, 106)  # the narrow image is small enough, y is not
    with torch.inference_mode():
        expected = torch.cat([fast(image[None]) for image in x])
        torch.testing.assert_close(expected, model(x))
        for number in (1, 2, 3):
            threads(number)
            assert torch.equal(fast(x), expected)


def separable(channels, out_channels):
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    return [depthwise, nn.ReLU(), nn.Conv2d(channels, out_channels, 1), nn.ReLU()]


def test_a_value_that_others_read_stands_in_memory(threads):
    """A block whose output is read again, later, is in no chain with the next."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Sequential(*separable(8, 16)), nn.Sequential(*separable(16, 24))
            self.last = nn.Conv2d(24, 16, 1)

        def forward(self, x):
            y = self.first(x)
            return self.last(self.second(y)) + y

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Skip()).eval()
    fast = fastconv.optimize(model)
    ready = fast.plan.prepare()
    x = torch.randn(2, 8, 60, 60)
    assert [layers for layers, _ in ready.whole.times(x)] == [1, 1, 1, 1]
    for number in (1, 2):
        threads(number)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))


def test_a_chain_in_mid_network_keeps_what_it_reads(threads):
    """Its last block must not write over the input of its first, whose rows it still needs."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 1), nn.ReLU(), *separable(8, 32), *separable(32, 128), nn.Conv2d(128, 8, 1)]
    model = nn.Sequential(*layers).eval()
    fast = fastconv.optimize(model)
    assert fast.plan.prepare().whole is not None
    x = torch.randn(3, 8, 120, 60)
    expected = by_steps(fast)(x)
    torch.testing.assert_close(expected, model(x))
    for number in (1, 2, 3):
        threads(number)
        assert torch.equal(fast(x), expected)
        assert torch.equal(fast(x[:1]), expected[:1])


def test_an_empty_batch_has_an_empty_result():
    assert optimized("mobilenet_v2", num_classes=5)(torch.randn(0, 3, 64, 64)).shape == (0, 5)


def test_shapes_may_change_between_calls():
    fast = optimized("squeezenet1_1", num_classes=7)
    steps = by_steps(fast)
    for shape in [(1, 3, 64, 64), (4, 3, 80, 64), (1, 3, 64, 64), (2, 3, 33, 200)]:
        x = torch.randn(shape)
        assert torch.equal(fast(x), steps(x))


def test_a_result_outlives_the_next_call():
    fast = optimized("mobilenet_v2", num_classes=5)
    first = fast(torch.zeros(1, 3, 64, 64))
    kept = first.clone()
    fast(torch.randn(1, 3, 64, 64))
    assert torch.equal(first, kept)


def test_an_image_for_a_result_is_the_callers_own_and_keeps_the_format():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()).eval()
    fast = fastconv.optimize(model)
    assert fast.plan.prepare().whole is not None
    x = torch.randn(2, 3, 9, 9)
    first = fast(x)
    assert first.is_contiguous()
    assert fast(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    kept = first.clone()
    fast(torch.randn(2, 3, 9, 9))
    assert torch.equal(first, kept)
    torch.testing.assert_close(first, model(x))


def test_callers_at_the_same_time_have_arenas_of_their_own():
    fast = optimized("mobilenet_v3_small", num_classes=6)
    xs = [torch.randn(1, 3, 64, 64) for _ in range(8)]
    expected = [fast(x) for x in xs]
    wrong = []

    def call(x, y):
        with torch.inference_mode():
            wrong.extend(i for i in range(30) if not torch.equal(fast(x), y))

    threads = [threading.Thread(target=call, args=pair) for pair in zip(xs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_new_weights_are_seen():
    fast = optimized("squeezenet1_1", num_classes=4)
    x = torch.randn(1, 3, 64, 64)
    before = fast(x)
    with torch.no_grad():
        fast.features[0].weight.mul_(2)
    assert not torch.equal(fast(x), before)
    assert torch.equal(fast(x), by_steps(fast)(x))


def test_a_step_without_a_kernel_leaves_the_plan_to_its_steps():
    fast = fastconv.optimize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 1)).eval())
    assert fast.plan.prepare().whole is None
    assert fast(torch.randn(1, 3, 8, 8)).shape == (1, 8, 6, 6)


def test_errors_name_the_operator_as_the_steps_do():
    fast = optimized("mobilenet_v2")
    for bad in (torch.randn(1, 4, 64, 64), torch.randn(1, 3, 0, 64)):
        with pytest.raises(RuntimeError) as whole:
            fast(bad)
        with pytest.raises(RuntimeError) as steps:
            by_steps(fast)(bad)
        assert str(whole.value).splitlines()[0] == str(steps.value).splitlines()[0]
    assert fast(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_an_unknown_program_is_an_error():
    with pytest.raises(RuntimeError, match="program: no program 123456789"):
        torch.ops.fastconv.program_run(torch.randn(1, 3, 8, 8), 123456789)
    with pytest.raises(RuntimeError, match="network: no operator cosine in a program"):
        torch.ops.fastconv.program_new([], "fastconv 2;cosine 0 -1")


def places(fast):
    """(address, bytes) of each packed tensor, in the order of the steps."""
    calls = [call for call, _, _ in fast.plan.prepare().steps]
    return [(tensor.data_ptr(), tensor.nbytes) for call in calls for tensor in getattr(call, "tensors", ())]


def test_weights_stand_one_after_the_other():
    fast = optimized("mobilenet_v3_small")
    found = places(fast)
    assert found[0][0] % (1 << 21) == 0, "on a huge page's boundary"
    assert sum(size for _, size in found) > 1 << 21
    for (address, size), (following, _) in itertools.pairwise(found):
        assert following % 64 == 0
        assert 0 <= following - (address + size) < 64


def test_a_changed_layer_moves_alone():
    fast = optimized("mobilenet_v3_large")
    before = places(fast)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        fast(x)
    with torch.no_grad():
        next(parameter for name, parameter in fast.named_parameters() if name.startswith("features.5.") and parameter.dim() == 4).mul_(2)
    after = places(fast)
    moved = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert 0 < len(moved) < 20
    with torch.inference_mode():
        assert torch.equal(fast(x), by_steps(fast)(x))


def test_a_copied_weight_leaves_its_neighbours():
    fast = optimized("squeezenet1_1")
    for call, _, _ in fast.plan.prepare().steps:
        for tensor in getattr(call, "tensors", ()):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_versions_are_read_where_torch_keeps_them():
    """Asking every tensor is as right, and takes three times as long between two calls of a network."""
    fast = optimized("squeezenet1_1")
    quick = fast.plan.prepare().watch.quick
    assert quick.reads_versions
    assert quick.unchanged()
    with torch.no_grad():
        list(fast.parameters())[7].add_(0)
    assert not quick.unchanged()


def test_weights_stay_where_they_are_without_addresses_to_spare(monkeypatch):
    from fastconv.optimize import memory

    def refuse(*args):
        raise OSError(12, "Cannot allocate memory")

    fast = optimized("squeezenet1_1")
    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    other = optimized("squeezenet1_1")
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(other(x), fast(x))
