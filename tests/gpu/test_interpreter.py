"""The kernels in Triton's interpreter, on CPU tensors: every index, mask and epilogue, but no layout and no machine code.

TRITON_INTERPRET has to be set before triton is imported, so the checks run in a child pytest on this same file.
"""

import copy
import importlib.metadata
import os
import re
import subprocess
import sys
import threading

import blocks
import cases
import pytest
import torch
import traffic

import fastconv
from fastconv.kernels.gpu import configs, tuned

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":

    class TestInterpreter(cases.Checks, blocks.BlockChecks):
        device = "cpu"

        # no bfloat16: the interpreter truncates where a GPU rounds to nearest
        @pytest.fixture(params=[torch.float32, torch.float16], ids=["f32", "f16"])
        def dtype(self, request):
            return request.param

    def test_forced_backend_reaches_the_kernels(monkeypatch):
        """FASTCONV_BACKEND=triton: the public operator runs the Triton kernel on CPU tensors."""
        from fastconv.kernels.gpu import pointwise

        launched = []
        kernel = pointwise.pointwise
        monkeypatch.setattr(pointwise, "pointwise", lambda **arguments: launched.append(1) or kernel(**arguments))
        x, weight = torch.randn(1, 3, 4, 4), torch.randn(8, 3, 1, 1)
        y = fastconv.ops.pointwise(x, weight, activation="relu")
        torch.testing.assert_close(y, fastconv.reference.pointwise(x, weight, activation="relu"))
        assert launched

    class Net(torch.nn.Module):
        """One of each block, as the networks have them."""

        def __init__(self):
            super().__init__()
            nn, layers = torch.nn, fastconv.nn
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
            self.separable = layers.DepthwiseSeparable(16, 24)
            self.block = layers.InvertedResidual(24, 24, 1, 2)
            self.expand = nn.Sequential(nn.Conv2d(24, 40, 1), nn.ReLU(), nn.Conv2d(40, 40, 5, 1, 2, groups=40), nn.ReLU())
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(40, 8, 1), nn.ReLU(), nn.Conv2d(8, 40, 1), nn.Hardsigmoid())
            self.project = nn.Conv2d(40, 24, 1)
            self.fire = layers.Fire(24, 8, 16, 24)
            self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
            self.last = nn.Sequential(nn.Conv2d(40, 48, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))

        def forward(self, x):
            x = self.block(self.separable(self.stem(x)))
            y = self.expand(x)
            x = x + self.project(y * self.gate(y))
            return self.last(self.pool(self.fire(x)))

    def split(problem, arch):
        """Of an inverted residual; other blocks have no such form."""
        from fastconv.kernels.gpu import model

        if problem.op != "inverted_residual":
            return model.best(problem, arch)
        return configs.Split(model.best(problem.after_expand, arch))

    SLOW_FORMS = ("split", "in parts", "through cuDNN")

    @pytest.mark.parametrize("form", ["fused", *(pytest.param(form, marks=pytest.mark.slow) for form in SLOW_FORMS)])
    def test_an_optimized_network(form, monkeypatch):
        """Every block of a plan through its kernel, in each form; explain names them; changed weights are noticed."""
        from fastconv.kernels.gpu import blocks, model

        forms = {"fused": model.best, "split": split, "in parts": lambda *_: None, "through cuDNN": lambda *_: configs.ATEN}
        monkeypatch.setattr(blocks, "choice", forms[form])
        torch.manual_seed(0)
        net = Net().eval()
        fast = fastconv.optimize(net)
        kernels = {row.name: row.kernel for row in fastconv.explain(fast).rows}
        assert kernels["stem.0"] == "stem triton"
        assert kernels["separable"] == "separable triton"
        assert kernels["block"] == kernels["expand.0"] == kernels["gate.1"] == kernels["project"] == "inverted_residual triton"
        assert kernels["fire"] == kernels["pool"] == "fire_pool triton"
        assert kernels["last.0"] == kernels["last.2"] == "head triton"
        x = torch.randn(2, 3, 17, 19)
        stem = fast.plan.prepare().steps[0][0](x)
        assert stem.is_contiguous(memory_format=torch.channels_last)  # from here on nothing is copied
        assert not stem.is_contiguous()
        assert copy.deepcopy(fast.plan.prepare().steps[1][0]).kernel == "separable triton"  # it is pickled as others are
        for _ in range(2):
            wanted = copy.deepcopy(net).double()(x.double()).detach()  # with gradients wanted, our layers are plain torch
            with torch.no_grad():
                assert ((fast(x) - wanted).norm() / wanted.norm()).item() < 2e-6
                kernels = {row.name: row.kernel for row in fastconv.explain(fast).rows}
                for name, op in (("separable", "separable"), ("block", "inverted_residual"), ("pool", "fire_pool"), ("last.2", "head")):
                    wanted = r"\d+x\d+x\d+x\d+" if form in ("fused", "split") else form
                    wanted = f"split {wanted}" if form == "split" and op == "inverted_residual" else wanted
                    assert re.fullmatch(rf"{op} triton {wanted}", kernels[name])
                # the pool itself has no weights: the joined kernel has to take the fire's new ones
                for module in (net, fast):
                    torch.manual_seed(1)
                    for name, parameter in module.named_parameters():
                        if "fire" in name or "last" in name:
                            parameter.copy_(torch.randn_like(parameter) * 0.3)

    @pytest.mark.parametrize("kernel", [3, 7])
    def test_a_stem_and_its_pool(kernel, monkeypatch):
        """One kernel where it is chosen and the window is one step of its product, else two; the image may be NCHW."""
        from fastconv.kernels.gpu import blocks, model

        nn = torch.nn
        net = nn.Sequential(nn.Conv2d(3, 16, kernel, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)).eval()
        fast = fastconv.optimize(net)
        x = torch.randn(2, 3, 30, 27)
        with torch.no_grad():
            for fused in (True, False):
                monkeypatch.setattr(blocks, "choice", model.best if fused else lambda *_: None)
                for image in (x, x.contiguous(memory_format=torch.channels_last)):
                    y = fast(image)
                    torch.testing.assert_close(y, net(x), rtol=1e-5, atol=1e-5)
                    assert y.stride() == net(image).stride()
                kernels = {row.name: row.kernel for row in fastconv.explain(fast).rows}
                form = r"stem_pool triton \d+x\d+x\d+x\d+" if fused and kernel == 3 else "stem_pool triton in parts"
                assert re.fullmatch(form, kernels["2"])

    @pytest.mark.parametrize("first", ["stem", "separable", "block", "fire"])
    def test_a_plan_refuses_an_image_that_does_not_fit(first):
        """Its launchers would read past the weights."""
        torch.manual_seed(0)
        net = Net().eval()
        model = {"stem": net.stem, "separable": net.separable, "block": net.block, "fire": torch.nn.Sequential(net.fire, net.pool)}[first]
        channels = {"stem": 3, "separable": 16, "block": 24, "fire": 24}[first]
        fast = fastconv.optimize(model)
        with torch.no_grad():
            assert fast(torch.randn(1, channels, 9, 9)).isfinite().all()
            with pytest.raises(ValueError, match=rf"\(1, {channels + 1}, 9, 9\)|{channels + 1}"):
                fast(torch.randn(1, channels + 1, 9, 9))
            with pytest.raises(TypeError, match="float16"):
                fast(torch.randn(1, channels, 9, 9).half())

    def test_a_block_runs_as_it_is_chosen(monkeypatch):
        """Fused, split or in parts: the same result, from the kernels that were named."""
        from fastconv.kernels.gpu import blocks, model

        x, shapes = torch.randn(1, 8, 7, 7), ((24, 8, 1, 1), (24, 1, 3, 3), (8, 24, 1, 1))
        weights = [tensor for shape in shapes for tensor in (torch.randn(shape), torch.randn(shape[0]))]
        ran = []
        for module, name in ((blocks, "pointwise"), (blocks, "depthwise"), (blocks.separables, "separable")):
            launcher = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, run=launcher, name=name: ran.append(name) or run(*a))
        monkeypatch.setattr(blocks, "choice", model.best)
        fused = fastconv.ops.inverted_residual(x, *weights, residual=True)
        assert not ran
        monkeypatch.setattr(blocks, "choice", split)
        for activation in (None, "relu6"):
            arguments = {"activation": activation} if activation else {}
            x_last = x.contiguous(memory_format=torch.channels_last)
            for image in (x, x_last):
                y = fastconv.ops.inverted_residual(image, *weights, residual=True, **arguments)
                assert y.stride() == image.stride()
                wanted = fastconv.reference.inverted_residual(x, *weights, residual=True, **arguments)
                torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
        assert ran == ["pointwise", "separable"] * 4
        assert re.fullmatch(r"split \d+x\d+x\d+x\d+", blocks.last_form())
        ran.clear()
        monkeypatch.setattr(blocks, "choice", lambda problem, arch: None)
        torch.testing.assert_close(fastconv.ops.inverted_residual(x, *weights, residual=True), fused)
        assert ran == ["pointwise", "depthwise", "pointwise"]

    def test_a_block_that_has_no_choice_names_its_form():
        """MobileNet V3 small begins with squeeze-excitation and no expand: nothing was chosen before in a new thread."""
        from fastconv.kernels.gpu import blocks

        shapes = ((16, 1, 3, 3), (8, 16, 1, 1), (16, 8, 1, 1), (16, 16, 1, 1))
        wd, w1, w2, wp = (torch.randn(shape) for shape in shapes)
        bd, b1, b2, bp = (torch.randn(shape[0]) for shape in shapes)
        x, named = torch.randn(1, 16, 7, 7), []

        def run():
            blocks.inverted_residual(
                x, None, None, wd, bd, [w1, b1, w2, b2], wp, bp, None, (2, 2), (1, 1), None, "relu", "relu", "hardsigmoid", None
            )  # fmt: skip
            named.append(blocks.last_form())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert named == ["in parts"]

    def laid_out(*tensors):
        """As the kernels read them, so that no launcher copies."""
        from fastconv.kernels.gpu import launch

        return [launch.kernel_order(tensor) if tensor.dim() == 4 else tensor for tensor in tensors]

    # op: (x's shape, weights' shapes, the problem, the call's other arguments)
    COUNTED = {
        "depthwise": ((2, 24, 9, 11), [(24, 1, 5, 5)], ((2, 1), (2, 1), "relu")),
        "separable": ((2, 24, 9, 11), [(24, 1, 3, 3), (40, 24, 1, 1)], ((2, 2), (1, 1), "relu")),
        "inverted_residual": ((1, 24, 6, 9), [(40, 24, 1, 1), (40, 1, 5, 5), (24, 40, 1, 1)], (None, (1, 1), (2, 2))),
        "fire": ((2, 24, 7, 9), [(16, 24, 1, 1), (40, 16, 1, 1), (40, 16, 3, 3)], ()),
        "fire_pool": ((2, 16, 9, 11), [(40, 16, 1, 1), (40, 16, 3, 3)], ((2, 2), (1, 1), (5, 6))),
        "stem": ((2, 3, 15, 17), [(40, 3, 3, 3)], ((2, 2), (1, 1), "relu")),
        "stem_pool": ((2, 3, 31, 35), [(40, 3, 3, 3)], ((2, 2), (0, 0), "relu", (2, 2), (0, 0), (7, 8))),
        "head": ((2, 24, 7, 9), [(40, 24, 1, 1)], ("relu",)),
    }

    def problem_of(op, x, weights, rest):
        from fastconv.kernels.gpu import fire, fire_pool, head, inverted_residual, launch, separable, stem, stem_pool

        four = [weight for weight in weights if weight.dim() == 4]
        if op == "depthwise":
            out = launch.window(x.shape[2:], 5, *rest[:2])
            return configs.Problem("depthwise", "f32", *out, 24, 24, 5, *rest[:2], 0, tuple(x.shape[2:]))
        if op == "separable":
            return separable.problem(x, *four, *rest[:2])
        if op == "inverted_residual":
            return inverted_residual.problem(op, x, four[1], four[2].shape[0], *rest[1:3])
        if op == "fire":
            return fire.problem(x, *four)
        if op == "fire_pool":
            return fire_pool.problem(x, *four, *rest)
        if op == "stem_pool":
            return stem_pool.problem(x, *four, *rest[:2], rest[-1])
        return stem.problem(x, *four, *rest[:2]) if op == "stem" else head.problem(x, *four)

    @pytest.mark.parametrize("op", COUNTED)
    def test_traffic(op, monkeypatch):
        """Loads and stores, counted: x as often as the model says, each output once, and nothing else but weights."""
        from fastconv.kernels.gpu import configs, launch, model

        shape, shapes, rest = COUNTED[op]
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        weights = laid_out(*[tensor for size in shapes for tensor in (torch.randn(size), torch.randn(size[0]))])
        problem = problem_of(op, x, weights, rest)
        if op.startswith("stem"):
            weights[0] = launch.stem_order(weights[0])
        # with what pads them
        named = {f"weight{i}": weight.new_empty(0).set_(weight.untyped_storage()) for i, weight in enumerate(weights)}
        if op == "depthwise":
            chosen = {configs.DEPTHWISE[kind][5, 2][number] for kind, number in (("half", 0), ("half", -1), ("f32", -1))}
        else:
            tiles = configs.TABLES[op]["sm_90"]["half"]
            chosen = {tiles[0], tiles[-1], configs.TABLES[op]["sm_80"]["f32"][-1]}
        for tile in chosen:
            with monkeypatch.context() as patch:
                counts = traffic.count(patch, lambda tile=tile: cases.launcher(op)(x, *weights, *rest, tile=tile), x=x, **named)
            assert counts["x"].loaded == shape[0] * model.issued(problem, tile)
            assert counts["output"].stored == shape[0] * model.results(problem)
            assert len(set(counts["output"].written)) == len(counts["output"].written)
            assert not counts["output"].loaded
            # every byte of x once from device memory, the rest from caches: with the output, the floor
            assert len(counts["x"].read) == x.numel()
            assert x.numel() * 4 + counts["output"].stored == shape[0] * model.floor(problem)
            assert counts.keys() <= {"x", "output", *named}
            assert not any(counts[name].stored for name in counts.keys() - {"output"})

    def test_traffic_of_a_max_pool(monkeypatch):
        """A row of a window's column once for all output rows of a lane that it serves; each output once."""
        from fastconv.kernels.gpu import max_pool, model

        x = torch.randn(2, 24, 9, 11).contiguous(memory_format=torch.channels_last)
        problem = max_pool.problem(x, (2, 2), (0, 0), (4, 5))
        tile = configs.config(problem, "sm_80")
        with monkeypatch.context() as patch:
            counts = traffic.count(patch, lambda: max_pool.max_pool(x), x=x)
        assert counts["x"].loaded == 2 * model.issued(problem, tile)
        assert len(counts["x"].read) == x.numel()
        assert counts["output"].stored == 2 * model.results(problem)
        assert len(set(counts["output"].written)) == len(counts["output"].written)
        assert not counts["x"].stored
        assert not counts["output"].loaded

    TUNED = [
        configs.Problem("separable", "f32", 5, 6, 8, 16, 3, (2, 2), (1, 1), 0, (9, 11)),
        configs.Problem("inverted_residual", "f32", 6, 7, 8, 8, 3, (1, 1), (1, 1), 24),
        configs.Problem("expand_depthwise", "f32", 3, 4, 8, 24, 5, (2, 2), (2, 2), 24, (6, 7)),
        configs.Problem("fire", "f32", 5, 6, 8, 16, 3, (1, 1), (1, 1), 8),
        configs.Problem("fire_pool", "f32", 3, 3, 8, 16, 3, (2, 2), (0, 0), 0, (7, 6)),
        configs.Problem("head", "f32", 5, 6, 8, 16),
    ]

    @pytest.mark.slow  # 8 s
    def test_tune_measures_what_it_names(monkeypatch):
        """The tuner on small problems, with a clock that runs each call once and checks its result."""
        from fastconv.benchmarks import blocks as networks
        from fastconv.benchmarks.tuner import measure, worth_trying

        small = [networks.Block("net", p.op, 1, p, "relu", p.op == "inverted_residual") for p in TUNED]
        monkeypatch.setattr(networks, "blocks", lambda dtype: small)
        cases = {}

        class Case(networks.Case):
            def __init__(self, block, *rest):
                super().__init__(block, *rest)
                cases[block.problem.op] = self

        monkeypatch.setattr(networks, "Case", Case)
        calls = []

        def clock(run):
            op = list(cases)[-1]
            assert cases[op].error(run()) < 1e-6
            calls.append(op)
            return float(len(calls))  # the first is the fastest

        table = measure("f32", 2, 60, lambda line: None, clock, device="cpu")
        assert table["arch"] == "sm_80"
        assert set(calls) == {p.op for p in TUNED}
        for p in TUNED:
            best = worth_trying(p, "sm_80")
            halves = len(worth_trying(p.after_expand, "sm_80")) if p.op == "inverted_residual" else 0
            assert calls.count(p.op) == len(best) + halves + 1 + (p.op != "expand_depthwise")  # split, in parts, and through cuDNN
            assert (table["microseconds"][tuned.key(p)]["split"] is not None) == (p.op == "inverted_residual")
            assert table["choices"][tuned.key(p)] == tuned.row(best[0])

    def test_forced_backend_refuses_what_it_does_not_cover():
        x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3)
        for arguments in ((x.double(), weight.double()), (x, weight, None, (3, 3)), (x, weight, None, (1, 1), (3, 3))):
            with pytest.raises(RuntimeError, match="depthwise: FASTCONV_BACKEND=triton does not cover"):
                torch.ops.fastconv.depthwise(*arguments)
        grad, weight, geometry = torch.randn(1, 4, 8, 8), torch.randn(4, 1, 7, 7), ((1, 1), (3, 3))
        with pytest.raises(RuntimeError, match="depthwise_backward_input: FASTCONV_BACKEND=triton does not cover a 7 x 7 kernel"):
            torch.ops.fastconv.depthwise_backward_input(grad, weight, (8, 8), *geometry)
        with pytest.raises(RuntimeError, match="depthwise_backward_weight: FASTCONV_BACKEND=triton does not cover a 7 x 7 kernel"):
            torch.ops.fastconv.depthwise_backward_weight(grad, grad, (7, 7), *geometry)

else:

    def version(package):
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))

    @pytest.mark.skipif(
        version("triton") < (3, 7) and version("numpy") >= (2, 4), reason="before 3.7, triton's interpreter needs numpy < 2.4"
    )
    @pytest.mark.parametrize(
        "selected", [("-k", "fire"), ("-k", "not fire"), pytest.param(("-m", "slow"), marks=pytest.mark.slow)], ids=" ".join
    )
    def test_in_a_child_with_the_interpreter(selected):
        environment = os.environ | {"TRITON_INTERPRET": "1", "FASTCONV_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, *selected]
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert child.returncode == 0, child.stdout[-8000:]
        assert " passed" in child.stdout
        assert "skipped" not in child.stdout
