"""An optimized module on a GPU as users call it: its CUDA graphs, streams, threads, dtypes, devices, other torch features around it."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import fastconv
from fastconv.benchmarks.gpu import calibrated, eager_form
from fastconv.models import get_model

pytestmark = pytest.mark.gpu
NAME = "mobilenet_v2"


def image(batch=2, size=96, seed=0, dtype=torch.float32, device="cuda"):
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def exact(setting):
    setting(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    setting(torch.backends.cudnn.conv, "fp32_precision", "ieee")


@pytest.fixture
def network():
    torch.manual_seed(0)
    with torch.no_grad():  # fresh norms let a deep random network's activations fade, in fp16 to zero
        return calibrated(get_model(NAME).cuda(), image(8))


@pytest.fixture
def model(network):
    """The same in plain torch."""
    return eager_form(network)


@pytest.fixture
def fast(network):
    return fastconv.optimize(network)


def agree(y, wanted, bound=5e-5):
    """bound: what two computations in fp32 are apart on a random network and a small image, times four."""
    assert ((y.double() - wanted.double()).norm() / wanted.double().norm()).item() < bound


def captured(fast):
    return sum("captured" in row for row in fast.cuda_graph_report())


@torch.no_grad()
def test_a_graph_replays_what_the_plan_computes(fast, model):
    for seed in range(5):
        x = image(seed=seed)
        y = fast(x)
        assert torch.equal(y, fast.plan(x))
        agree(y, model(x))
    assert captured(fast) == 1
    kept = fast(image(seed=1))
    copied = kept.clone()
    fast(image(seed=2))
    assert torch.equal(kept, copied)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v3_small", "mobilenet_v3_large", "squeezenet1_0", "squeezenet1_1"])
def test_every_network_is_captured(name):
    torch.manual_seed(0)
    fast = fastconv.optimize(get_model(name).cuda())
    for seed in range(3):
        x = image(seed=seed)
        assert torch.equal(fast(x), fast.plan(x))
    assert captured(fast) == 1


@torch.no_grad()
def test_shapes_formats_and_eviction(fast):
    inputs = [image(batch) for batch in range(1, 11)] + [image(2).contiguous(), image(1, 64)]
    for _ in range(3):
        for x in inputs:
            assert torch.equal(fast(x), fast.plan(x))
    assert captured(fast) == 8


@torch.no_grad()
def test_weights_follow(fast, model):
    x = image()
    for scale in (2.0, 0.5, 3.0):
        for module in (model, fast):
            module.classifier[-1].weight.mul_(scale)
            module.features[3].conv[0][0].weight.mul_(scale)
        for _ in range(3):
            agree(fast(x), model(x))
    assert captured(fast) == 1


@torch.no_grad()
def test_other_streams(fast):
    """Calls on several streams, the input made and the result read on the same: each result is its own input's."""
    wanted = [fast.plan(image(seed=seed)) for seed in range(8)]
    fast(image())
    fast(image())
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 4]):
            results.append((turn % 8, fast(image(seed=turn % 8)) + 0))
    torch.cuda.synchronize()
    for seed, y in results:
        assert torch.equal(y, wanted[seed])
    assert captured(fast) == 1


def test_threads(fast):
    with torch.no_grad():
        wanted = {(batch, seed): fast.plan(image(batch, seed=seed)) for batch in (1, 2) for seed in range(4)}
    problems = []

    def work(number):
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(40):
                    key = (1 + (number + turn) % 2, turn % 4)
                    y = fast(image(key[0], seed=key[1]))
                    torch.cuda.current_stream().synchronize()
                    assert torch.equal(y, wanted[key]), key
        except Exception as problem:
            problems.append(problem)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    assert captured(fast) == 2


@torch.no_grad()
def test_copies(fast, model):
    x = image()
    for _ in range(3):
        fast(x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert not twin.cuda_graph_report()
        for _ in range(3):
            agree(twin(x), model(x))


@torch.no_grad()
def test_to_the_cpu_and_back(fast, model):
    x = image()
    for _ in range(3):
        fast(x)
    fast.cpu()
    agree(fast(x.cpu()), model(x).cpu())
    fast.cuda()
    for _ in range(3):
        agree(fast(x), model(x))
    assert captured(fast) == 1


def test_inference_mode(fast, model):
    with torch.inference_mode():
        for seed in range(3):
            y = fast(image(seed=seed))
            assert y.is_inference()
    with torch.no_grad():
        y = fast(image(seed=5))
        agree(y, model(image(seed=5)))
    assert not y.is_inference()


def test_gradients_run_asplain_torch(fast, model):
    x, twin = image().requires_grad_(), image().requires_grad_()
    fast(x).sum().backward()
    model(twin).sum().backward()
    agree(x.grad, twin.grad, 1e-4)


@torch.no_grad()
def test_inside_a_graph_of_the_callers(fast):
    x = image()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fast(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fast(x)
    x.copy_(image(seed=9))
    graph.replay()
    assert torch.equal(y, fast.plan(x))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_autocast(fast, model, dtype):
    with torch.autocast("cuda", dtype=dtype):
        for _ in range(3):
            y, wanted = fast(image()), model(image())
    assert y.dtype == wanted.dtype == dtype
    agree(y, wanted, 0.05)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
def test_half_precision(network, model, dtype, layout):
    """The error against float64 is at most twice eager's own."""
    fast = fastconv.optimize(network, dtype=dtype)
    x = image(8).contiguous(memory_format=layout)
    wanted = copy.deepcopy(model).double()(x.double())
    own = ((copy.deepcopy(model).to(dtype)(x.to(dtype)).double() - wanted).norm() / wanted.norm()).item()
    for _ in range(3):
        y = fast(x.to(dtype))
        assert y.dtype == dtype
        agree(y, wanted, 2 * own)
    assert captured(fast) == 1
    with pytest.raises(TypeError, match=f"x must be {dtype}"):
        fast(x)


@torch.no_grad()
def test_under_compile(fast, model):
    compiled = torch.compile(fast)
    agree(compiled(image()), model(image()), 1e-4)


@torch.no_grad()
def test_another_gpu_than_the_current_one(network):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    fast, model = fastconv.optimize(network.to("cuda:1")), eager_form(network)
    for seed in range(4):
        x = image(seed=seed, device="cuda:1")
        y = fast(x)
        assert y.device == x.device
        agree(y, model(x))
    assert captured(fast) == 1
    assert torch.cuda.current_device() == 0


def test_tensors_keep_their_memory_when_a_module_goes(network):
    """A result outlives the module, its graphs and their pool."""
    with torch.no_grad():
        fast = fastconv.optimize(network)
        for _ in range(3):
            y = fast(image())
        wanted = y.clone()
        del fast
        for _ in range(20):
            torch.full((64, 1000), float("nan"), device="cuda")
        torch.cuda.empty_cache()
    assert torch.equal(y, wanted)


def test_first_result_of_a_fresh_process(tmp_path):
    """With a filled cache: prints the seconds; the benchmark compares them with the target."""
    code = """
import time, torch
torch.zeros(1, device="cuda")
start = time.perf_counter()
import fastconv
fast = fastconv.optimize(fastconv.models.mobilenet_v2().cuda(), dtype=torch.bfloat16)
with torch.no_grad():
    fast(torch.randn(1, 3, 224, 224, device="cuda", dtype=torch.bfloat16)).cpu()
print("first result", time.perf_counter() - start)
"""
    for _ in range(2):
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
        assert child.returncode == 0, child.stderr[-3000:]
    seconds = float(child.stdout.split()[-1])
    print(f"first result after {seconds:.2f} s")
    assert seconds < 10  # far beyond the 2 s aimed at: Triton compiled again
