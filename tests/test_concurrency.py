"""Threads and processes: the same bits for any number of threads and callers, no deadlock and no crash after fork, spawn, nesting and exit.

What must not hang runs in a child process with a limit of LIMIT seconds.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from harness import channels_last, reals

import fastconv
from fastconv import _extension, ops
from fastconv.optimize.plan import Ready

needs_kernels = pytest.mark.skipif(not _extension.available or _extension.backend() != "auto", reason="needs the compiled extension")
pytestmark = needs_kernels

LIMIT = 30  # seconds that a child may take beside its imports; whoever waits for a thread that is not there waits for ever
COUNTS = (1, 2, 3, 7, 16)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights(*shape):
    return reals(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5


# Operators by name: (call on x, x). Large enough for a team of threads, and cut into several pieces a thread.
def operators():
    c = 48
    dw, pw, bias = weights(c, 1, 3, 3), weights(c, c, 1, 1), reals(c)
    fire = weights(16, c, 1, 1), reals(16), weights(33, 16, 1, 1), reals(33), weights(40, 16, 3, 3), reals(40)
    x = reals(3, c, 41, 37)
    return {
        "depthwise": (lambda x: ops.depthwise(x, dw, bias, activation="silu"), x),
        "depthwise 5x5 stride 2": (lambda x: ops.depthwise(x, weights_5, bias, stride=2, padding=2, activation="hardswish"), x),
        "pointwise": (lambda x: ops.pointwise(x, pw, bias, residual=x, activation="relu6"), x),
        "fire_expand": (lambda x: ops.fire_expand(x, pw, bias, weights_3, bias), x),
        "fire": (lambda x: ops.fire(x, *fire), x),
        "fire by Winograd": (ops.prepare_fire(*fire), x),
        "separable": (lambda x: ops.separable(x, dw, bias, pw, bias, stride=2, depthwise_activation="relu6", activation="relu6"), x),
        "inverted_residual": (lambda x: ops.inverted_residual(x, wide, None, wide_dw, None, narrow, bias, residual=True), x),
        "stem": (lambda x: ops.stem(x, stem, bias, activation="relu"), reals(2, 3, 97, 91)),
        "stem by Winograd": (ops.prepare_stem(stem_7, bias, stride=2, padding=0, activation="relu"), reals(2, 3, 97, 91)),
        "max_pool": (lambda x: ops.max_pool(x, padding=1), reals(3, 96, 61, 59)),
        "global_avg_pool": (ops.global_avg_pool, reals(3, 200, 41, 37)),
    }


torch.manual_seed(1)
weights_5, weights_3, wide, wide_dw, narrow, stem, stem_7 = (
    weights(48, 1, 5, 5), weights(48, 48, 3, 3), weights(96, 48, 1, 1), weights(96, 1, 3, 3), weights(48, 96, 1, 1), weights(48, 3, 3, 3),
    weights(48, 3, 7, 7),
)  # fmt: skip


def optimized(name):
    torch.manual_seed(0)
    fast = fastconv.optimize(fastconv.models.get_model(name, num_classes=10).eval())
    with torch.no_grad():
        fast(torch.zeros(1, 3, 64, 64))
    return fast


def on_threads(count, work):
    """work(i) on `count` threads that start together; raises what one of them raised."""
    together = threading.Barrier(count)

    def guarded(i):
        together.wait(LIMIT)
        with torch.inference_mode():
            return work(i)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(LIMIT * 20) for future in [pool.submit(guarded, i) for i in range(count)]]


@pytest.mark.parametrize("name", operators())
def test_operators_have_the_same_bits_on_any_number_of_threads(name):
    call, x = operators()[name]
    torch.set_num_threads(1)
    expected = call(x)
    for count in COUNTS[1:]:
        torch.set_num_threads(count)
        assert torch.equal(call(x), expected), count
        assert torch.equal(call(x[:1]), expected[:1]), count


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1"])
def test_networks_have_the_same_bits_on_any_number_of_threads(name):
    fast, x = optimized(name), reals(3, 3, 128, 96)
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = fast(x)
        for count in COUNTS[1:]:
            torch.set_num_threads(count)
            assert torch.equal(fast(x), expected), count
            assert torch.equal(fast(x[:1]), expected[:1]), count


def share(fast, callers, calls):
    """Callers of one module, each with images of its own and of another size: every answer is the one it gave alone."""
    xs = [reals(1 + i % 2, 3, 64 + 16 * (i % 3), 64) for i in range(callers)]
    with torch.no_grad():
        expected = [fast(x) for x in xs]
    return sum(on_threads(callers, lambda i: sum(not torch.equal(fast(xs[i]), expected[i]) for _ in range(calls))))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_32_threads_share_one_module(name):
    torch.set_num_threads(2)
    assert share(optimized(name), 32, 3) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1"])
def test_32_threads_share_one_module_for_1000_calls_each(name):
    torch.set_num_threads(2)
    assert share(optimized(name), 32, 1000) == 0


def test_threads_share_one_operator_and_its_steps_one_by_one():
    """A plan that is not one call: its prepared steps have no state of a call."""
    fast = optimized("mobilenet_v2")
    ready = fast.plan.prepare()
    assert isinstance(ready, Ready)
    fast.plan._ready = ready._replace(whole=None)
    assert share(fast, 4, 3) == 0


def test_the_number_of_threads_changes_between_and_during_calls():
    """Each thread of torch's callers has a number of its own."""
    fast, x = optimized("mobilenet_v2"), reals(2, 3, 96, 96)
    with torch.no_grad():
        expected = fast(x)

    def work(i):
        wrong = 0
        for turn in range(8):
            torch.set_num_threads(COUNTS[(i + turn) % len(COUNTS)])
            wrong += not torch.equal(fast(x), expected)
        return wrong

    assert on_threads(4, work) == [0] * 4


def test_calls_from_torchs_own_threads():
    """torch.jit.fork runs on torch's inter-op threads."""
    x, w = reals(1, 48, 41, 37), weights(48, 1, 3, 3)

    @torch.jit.script
    def several(x: torch.Tensor, w: torch.Tensor):
        futures = [torch.jit.fork(torch.ops.fastconv.depthwise, x, w) for _ in range(6)]
        return [torch.jit.wait(future) for future in futures]

    torch.set_num_threads(3)
    expected = ops.depthwise(x, w)
    assert all(torch.equal(y, expected) for y in several(x, w))


def libtorch_cpu():
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


@pytest.mark.parametrize("name", ["depthwise", "fire by Winograd", "inverted_residual"])
def test_inside_a_parallel_region(name):
    """A call in each piece of at::parallel_for: a team of one there, and the same bits."""
    call, x = operators()[name]
    torch.set_num_threads(4)
    expected, answers = call(x), {}

    @ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    def body(begin, end, context):
        for i in range(begin, end):
            answers[i] = call(x)

    assert libtorch_cpu().torch_parallel_for(ctypes.c_int64(0), ctypes.c_int64(4), ctypes.c_int64(1), body, None) == 0
    assert sorted(answers) == [0, 1, 2, 3]
    assert all(torch.equal(y, expected) for y in answers.values())


# Processes


def answering(name):
    """call(): the results of a network and of operators, as bytes. In a forked child torch's own parallel operators, torch.equal and a
    change of layout among them, wait for threads that are not there; so nothing but ours runs in it."""
    fast = optimized(name)
    x, w, image = reals(2, 64, 41, 40), reals(64, 1, 3, 3), reals(2, 3, 96, 96)
    last = channels_last(x)

    def call():
        with torch.no_grad():
            ys = fast(image), ops.depthwise(x, w, stride=2), ops.depthwise(x, w), ops.depthwise(last, w), ops.max_pool(x)
        return [y.numpy().tobytes() for y in ys]

    return call


def in_a_fork(work):
    """The exit code of a child that calls it: 0 if it returned True, "hangs" after LIMIT seconds."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() is True else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_fork_after_use(name):
    """The parent's OpenMP threads are not in the child, which finishes nevertheless, with the same bits; so does a child of its own."""
    torch.set_num_threads(4)
    call = answering(name)
    expected = call()

    def child():
        return call() == expected and in_a_fork(lambda: call() == expected) == 0

    assert in_a_fork(child) == 0
    assert call() == expected  # the parent goes on as before


SETUP = """
import sys, threading, time
import torch, fastconv
torch.manual_seed(0)
torch.set_num_threads(4)
fast = fastconv.optimize(fastconv.models.mobilenet_v2(num_classes=10).eval())
image = torch.randn(2, 3, 96, 96)
def logits():
    with torch.no_grad():
        return fast(image)
expected = logits()
"""


def run(code, returns=0):
    """Runs the code in a process of its own; a hang is a failure."""
    done = subprocess.run(
        [sys.executable, "-c", SETUP + textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=10 * LIMIT
    )
    assert done.returncode == returns, done.stdout + done.stderr
    return done.stdout


class Classified(torch.utils.data.Dataset):
    """Each item: the logits of an optimized module, which goes to the workers by fork, or pickled."""

    def __init__(self, fast):
        self.fast, self.images = fast, reals(6, 3, 64, 64)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.fast(self.images[index : index + 1])[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_workers_call_an_optimized_module(context, monkeypatch):
    # A spawned worker unpickles this module's class, so it must find it.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    torch.set_num_threads(2)
    data = Classified(optimized("mobilenet_v3_small"))
    with torch.no_grad():
        expected = data.fast(data.images)
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=context, timeout=4 * LIMIT)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_exit_while_a_thread_still_works():
    """Python waits for a thread that is no daemon: its last calls are whole."""
    out = run(
        """
def work():
    started.set()
    time.sleep(0.2)  # the main thread is at its end
    print(all(torch.equal(logits(), expected) for _ in range(5)), flush=True)
started = threading.Event()
threading.Thread(target=work).start()
started.wait()
"""
    )
    assert out == "True\n"


def test_exit_in_the_middle_of_a_call():
    """A daemon's call is cut off: no wait for its end, and no crash in what the process takes down meanwhile.

    (A daemon that comes back from torch meanwhile is ended by Python itself, up to 3.13, which aborts the process in any of torch's calls.)
    """
    out = run(
        """
torch.set_num_threads(2)
w, x = torch.randn(4096, 4096, 1, 1), torch.empty(1, 4096, 192, 192, memory_format=torch.channels_last)  # seconds
def work():
    started.set()
    fastconv.ops.pointwise(x, w)
    print("done", flush=True)
started = threading.Event()
print("in a call", flush=True)
threading.Thread(target=work, daemon=True).start()
started.wait()
time.sleep(0.3)
sys.exit(7)
""",
        returns=7,
    )
    assert out == "in a call\n"


# OpenMP runtimes


def test_doctor_finds_a_second_openmp_runtime(tmp_path):
    """A copy of the runtime under another path, as another package's wheel brings it, is loaded beside torch's."""
    pytest.importorskip("threadpoolctl")
    script = "import sys, json, ctypes; from fastconv.cli.doctor import examine; [ctypes.CDLL(p) for p in sys.argv[1:]]"
    script += "; report, warnings = examine(); print(json.dumps([report['threads']['OpenMP runtimes'], warnings]))"

    def examine(*libraries):
        return json.loads(subprocess.run([sys.executable, "-c", script, *libraries], capture_output=True, text=True, check=True).stdout)

    runtimes, warnings = examine()
    if runtimes == "none":
        pytest.skip("torch is built without OpenMP")
    assert len(runtimes) == 1
    assert not any("OpenMP" in line for line in warnings)
    other = tmp_path / Path(runtimes[0]).name
    shutil.copy(runtimes[0], other)
    both, warnings = examine(str(other))
    assert both == sorted([*runtimes, str(other)])
    assert any(line.startswith("2 OpenMP runtimes are loaded") and str(other) in line for line in warnings)
