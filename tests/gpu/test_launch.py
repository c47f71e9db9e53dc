"""How kernels are launched, without a GPU: what reaches a compiled kernel, what is made only once, and how many kernels a network takes.

Triton must take its driver for a GPU's, so the checks run in a child pytest on this same file.
"""

import functools
import importlib
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# Kernels that one call launches at 224 x 224 in bf16 on sm_90, whatever the batch: ours, and torch's (the classifier's layers).
KERNELS = {
    "mobilenet_v1": (26, 1),
    "mobilenet_v2": (26, 1),
    "mobilenet_v3_small": (58, 3),
    "mobilenet_v3_large": (57, 3),
    "squeezenet1_0": (22, 0),
    "squeezenet1_1": (21, 0),
}

if os.environ.get("FASTCONV_TEST_LAUNCH") == "1":
    import driver

    driver.install()

    import fastconv
    from fastconv.kernels.gpu import blocks, launch
    from fastconv.models import get_model

    def last(tensor):
        return tensor.contiguous(memory_format=torch.channels_last)

    def weight(*shape):
        return launch.kernel_order(torch.randn(shape))

    X = last(torch.randn(2, 24, 9, 11))
    PADDED = {"stride": (1, 1), "padding": (1, 1)}
    # operation: (file, call on x)
    CALLS = {
        "pointwise": lambda run, x: run(x, weight(40, 24, 1, 1), torch.randn(40), None, "relu"),
        "depthwise": lambda run, x: run(x, weight(24, 1, 3, 3), None, (2, 1), (1, 1), "silu"),
        "fire_expand": lambda run, x: run(x, weight(8, 24, 1, 1), torch.randn(8), weight(16, 24, 3, 3), torch.randn(16)),
        "separable": lambda run, x: run(x, weight(24, 1, 3, 3), torch.randn(24), weight(40, 24, 1, 1), None),
        "inverted_residual": lambda run, x: run(x, weight(48, 24, 1, 1), None, weight(48, 1, 3, 3), None, weight(24, 48, 1, 1), None, x),
        "fire": lambda run, x: run(x, weight(8, 24, 1, 1), None, weight(16, 8, 1, 1), None, weight(16, 8, 3, 3), None),
        "fire_pool": lambda run, x: run(x, weight(16, 24, 1, 1), None, weight(16, 24, 3, 3), None, (2, 2), (0, 0), (4, 5)),
        "stem": lambda run, x: run(x[:, :3].contiguous(), weight(16, 3, 3, 3), torch.randn(16)),
        "stem_pool": lambda run, x: run(
            x[:, :3].contiguous(), weight(16, 3, 3, 3), torch.randn(16), (2, 2), (1, 1), "relu", (2, 2), (0, 0), (2, 3)
        ),
        "head": lambda run, x: run(x, weight(40, 24, 1, 1), torch.randn(40), "relu"),
        "max_pool": lambda run, x: run(x, (2, 2), (0, 0), True),
        "global_avg_pool": lambda run, x: run(x),
    }

    @pytest.fixture(autouse=True)
    def fresh():
        driver.launches.clear()
        yield
        driver.Driver.index = None

    def launched(op, x=X):
        """The run that a call of `op` makes, with the same weights each time."""
        torch.manual_seed(0)
        before = len(driver.launches)
        CALLS[op](getattr(importlib.import_module(f"fastconv.kernels.gpu.{op}"), op), x)
        assert len(driver.launches) == before + 1
        name, arguments = driver.launches[-1]
        assert name == f"{op}_kernel"
        return arguments

    @pytest.mark.parametrize("op", CALLS)
    def test_the_second_call_hands_over_what_triton_handed_over(op):
        """All arguments in Triton's order, constants included, which its launchers skip; tensors as addresses."""
        count = driver.Kernel.count
        first, second = launched(op), launched(op)
        assert driver.Kernel.count == count + 1
        assert first[:6] == second[:6]  # grid, stream, function, metadata
        assert second[6:9] == (None, None, None)
        assert len(first) == len(second)
        for then, now in zip(first[9:], second[9:]):
            if isinstance(then, torch.Tensor):
                assert type(now) is int
                assert now % 16 == 0
            else:
                assert now == then
                assert type(now) is type(then)

    @pytest.mark.parametrize("op", CALLS)
    def test_a_kernel_runs_on_the_dtype_it_was_compiled_for(op):
        """With the same shape and tile: a launcher that kept the first dtype's kernel read the second one's numbers as the first's."""
        run = getattr(importlib.import_module(f"fastconv.kernels.gpu.{op}"), op)

        def in_dtype(dtype, *arguments):
            return run(*(value.to(dtype) if isinstance(value, torch.Tensor) else value for value in arguments))

        for _ in range(2):
            for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")):
                CALLS[op](functools.partial(in_dtype, dtype), X)
                kernel, arguments = driver.launches[-1]
                assert driver.signatures[arguments[4]]["x_ptr"] == f"*{name}", kernel

    def test_addresses_are_those_of_the_call():
        from fastconv.kernels.gpu.depthwise import depthwise

        w, b = weight(24, 1, 5, 5), torch.randn(24)
        for _ in range(3):
            x = last(torch.randn(1, 24, 6, 6))
            y = depthwise(x, w, b, (1, 1), (2, 2))
            assert driver.pointers(driver.launches[-1][1])[9:13] == driver.pointers((x, w, b, y))

    def test_unaligned_and_missing_tensors_are_compiled_for():
        """Triton reads 16 bytes at a time where it was told that it may."""
        count = driver.Kernel.count
        launched("pointwise")
        backing = torch.randn(2 * 9 * 11 * 24 + 1)[1:]
        assert backing.data_ptr() % 16
        x = backing.view(2, 9, 11, 24).permute(0, 3, 1, 2)
        known = driver.Kernel.count
        for _ in range(3):
            launched("pointwise", x)
            launched("pointwise")
        assert driver.Kernel.count == known + 1
        from fastconv.kernels.gpu.pointwise import pointwise

        for _ in range(2):
            pointwise(X, weight(40, 24, 1, 1), None, None, "relu")
        assert driver.Kernel.count == known + 2
        assert known - count <= 1

    def test_each_precision_has_its_own_kernel():
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        functions = set()
        try:
            for precision in ("ieee", "tf32", "ieee", "tf32"):
                matmul.fp32_precision = precision
                functions.add(launched("head")[4])
        finally:
            matmul.fp32_precision = before
        assert len(functions) == 2

    @pytest.mark.parametrize("why", ["hook", "release", "device"])
    def test_where_tritons_own_way_is_taken(why, monkeypatch):
        """Profilers must see launches, another release may launch otherwise, and a kernel belongs to its device's context."""
        import triton

        launched("separable")
        assert launched("separable")[6:9] == (None, None, None)
        if why == "hook":
            hook = triton.knobs.runtime.launch_enter_hook
            monkeypatch.setattr(hook, "calls", [lambda metadata: None])
        elif why == "release":
            monkeypatch.setattr(launch, "_KNOWN", False)
            importlib.import_module("fastconv.kernels.gpu.separable")._launcher.cache_clear()
        else:
            driver.Driver.index = 1
        for _ in range(2):
            assert any(isinstance(value, torch.Tensor) for value in launched("separable"))

    def test_a_launcher_is_made_once_for_a_shape():
        from fastconv.kernels.gpu import pointwise

        pointwise._launcher.cache_clear()
        for _ in range(3):
            for batch in (1, 2):
                launched("pointwise", X[:batch])
        assert pointwise._launcher.cache_info().misses == 2

    def kernels(name, batch=1, layout=torch.channels_last):
        """(names of our kernels, torch's operators) in a call of an optimized network."""
        torch.manual_seed(0)
        fast = fastconv.optimize(get_model(name), dtype=torch.bfloat16)
        x = torch.randn(batch, 3, 224, 224, dtype=torch.bfloat16).contiguous(memory_format=layout)
        with torch.no_grad():
            fast.plan.prepare()
            driver.launches.clear()
            with driver.Others() as others:
                fast(x)
        return [kernel for kernel, _ in driver.launches], others.names

    @pytest.mark.parametrize("name", KERNELS)
    def test_kernels_of_a_network(name):
        ours, others = kernels(name)
        assert (len(ours), len(others)) == KERNELS[name]
        assert kernels(name, 3) == (ours, others)
        assert set(others) <= {"aten::addmm", "aten::hardswish"}

    def test_an_nchw_image_costs_no_copy():
        """The stem reads it as it lies."""
        assert kernels("mobilenet_v2", layout=torch.contiguous_format) == kernels("mobilenet_v2")

    @pytest.mark.parametrize("what", ["blocks", "layers"])
    def test_what_is_compiled_ahead(what, monkeypatch):
        """The jobs that are left out as duplicates compile nothing new, and few of the others compile the same."""
        from fastconv.benchmarks import gpu, warm
        from fastconv.kernels.gpu import configs

        monkeypatch.setattr(warm, "BATCH", 2)
        monkeypatch.setattr(configs, "MULTIPROCESSORS", {})  # tiles as of many images

        ops = ("inverted_residual", "expand_depthwise", "fire", "head")
        jobs = warm.of_blocks("f16", "sm_90", ops) if what == "blocks" else warm.of_layers("fp16", "sm_90", (*gpu.OPS, *gpu.GRADIENTS))
        kept = warm.distinct(jobs)
        count = driver.Kernel.count
        for job in kept:
            job.run(device="cpu")
        assert len(kept) < len(jobs)
        assert driver.Kernel.count - count > 0.85 * len(kept)
        count = driver.Kernel.count
        for job in jobs:
            if job not in kept:
                job.run(device="cpu")
                assert driver.Kernel.count == count, job.name

    def test_all_blocks_fused(monkeypatch):
        """What the target of 20 kernels for MobileNet V2 would take."""
        from fastconv.kernels.gpu import model

        monkeypatch.setattr(blocks, "choice", model.best)
        ours, others = kernels("mobilenet_v2")
        assert (len(ours), len(others)) == (19, 1)

else:

    def test_in_a_child_with_a_driver_that_records():
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"FASTCONV_TEST_LAUNCH": "1", "FASTCONV_BACKEND": "triton"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert child.returncode == 0, child.stdout[-8000:]
        assert " passed" in child.stdout
        assert "skipped" not in child.stdout
