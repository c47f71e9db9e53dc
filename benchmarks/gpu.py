"""Times the GPU kernels on the layers of the six networks, and the networks: `python benchmarks/gpu.py --out DIR [--minutes 8]`.

Every block (stem, separable, inverted residual, fire, with max-pool, head) runs with each tile worth trying, in parts, in eager cuDNN
and, while time is left, through torch.compile, an inverted residual also split: its expand, then the rest as one kernel; each beside the
time its fewest bytes take at the copy rate. What was aimed at stands beside what was reached.
torch's side has its batch norms folded, which a user's model does not.

Every layer (benchmarks/shapes/*.txt) runs as fastconv's operator, as eager cuDNN (channels_last, benchmark mode: convolution, bias,
activation) and, while time is left, as the same through torch.compile(mode="max-autotune-no-cudagraphs"). A result is checked
against float64 before it is timed. Times are medians of replayed CUDA graphs of up to ten calls, so host time does not count, and the L2
cache is not flushed between calls: networks run their layers back to back too (`tuner.timed`). GB/s counts input, output and weights
once; percent is of a measured copy, and may pass 100 where the cache holds a layer.

Kernels are compiled ahead in several processes first (`warm.py`), for `--warm` seconds at most.

The gradients of every depthwise layer, with respect to its input and its weight, stand beside ATen's (cuDNN's or its own kernel,
whichever it chooses), timed and checked in the same way.

Writes DIR/gpu.json (everything), DIR/gpu.txt (the tables) and, with matplotlib, DIR/gpu-<dtype>.png. Exits 1 if a result was wrong
or a measurement failed.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

SHAPES = Path(__file__).parent / "shapes"
OPS = ("depthwise", "pointwise", "fire_expand")
GRADIENTS = ("depthwise_backward_input", "depthwise_backward_weight")
NETS = ("squeezenet1_0", "squeezenet1_1", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
# "tf32": float32 tensors with tf32 allowed, for cuDNN and fastconv alike; "fp32": allowed for neither
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
BATCHES = (128, 32)
NET_BATCHES = (256, 128, 32)
# What was aimed at on an H200 in bf16: speed over the best of eager cuDNN and torch.compile at batch 128, of gradients over ATen's,
# images/s at batch 256, and bytes/s of depthwise layers alone.
TARGETS = {"separable": 4.0, "inverted_residual": 5.0, "fire": 2.0}
NET_TARGETS = {"mobilenet_v1": 250e3, "mobilenet_v2": 250e3, "mobilenet_v3_large": 220e3, "squeezenet1_1": 300e3, "squeezenet1_0": 180e3}
GRADIENT_TARGET = 3.0
DEPTHWISE_TARGET = 3900.0
WRONG = {"bf16": 8e-3, "fp16": 1e-3, "tf32": 2e-3, "fp32": 1e-5}  # largest relative L2 error of a layer against float64


def read_shapes(op: str) -> dict[tuple, list[str]]:
    """{(C, H, W, Cout, K, stride, padding): ["net layer", ...]}, each distinct shape once."""
    shapes: dict[tuple, list[str]] = {}
    for line in (SHAPES / f"{op}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            net, layer, _, *numbers = line.split()
            *_, count = numbers
            shapes.setdefault(tuple(map(int, numbers[:7])), []).extend([f"{net} {layer}"] * int(count))
    return shapes


class Clock:
    """Medians of `tuner.timed`. A call that no CUDA graph takes is timed by itself, the L2 cache flushed before it: that is long enough to
    write that the launches queue up behind it. `uncaptured` counts those."""

    def __init__(self) -> None:
        self.uncaptured = 0
        self._memory: torch.Tensor | None = None

    def _flush(self) -> None:
        if self._memory is None:  # four times the L2 cache at least
            size = max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 2**29)
            self._memory = torch.empty(size, dtype=torch.int8, device="cuda")
        self._memory.zero_()

    def __call__(self, run, repeats: int = 20) -> float:
        """Microseconds."""
        from fastconv.benchmarks import tuner

        us, captured = tuner.timed(run, repeats, self._flush)
        self.uncaptured += not captured
        return us


def layer(op: str, shape: tuple, batch: int, dtype: torch.dtype, device: str = "cuda"):
    """(fastconv's function, the same in plain torch, its arguments, bytes moved)."""
    import fastconv

    c, h, w, out, k, stride, padding = shape

    def tensor(*size, scale=1.0):
        t = torch.randn(size, device=device, dtype=dtype) * scale
        return t.contiguous(memory_format=torch.channels_last) if len(size) == 4 else t

    x = tensor(batch, c, h, w)
    if op == "depthwise":
        from fastconv.kernels.gpu.launch import kernel_order

        weight, bias = tensor(c, 1, k, k, scale=1 / k), tensor(c)
        ordered = kernel_order(weight)  # as fastconv.optimize keeps it

        def plain(x, weight, bias):
            return F.relu6(F.conv2d(x, weight, bias, stride, padding, groups=c))

        def ours(x, weight, bias):
            return torch.ops.fastconv.depthwise(x, ordered, bias, [stride] * 2, [padding] * 2, "relu6")

        args = (x, weight, bias)
    elif op == "pointwise":

        def plain(x, weight, bias):
            return F.relu6(F.conv2d(x, weight, bias))

        def ours(x, weight, bias):
            return torch.ops.fastconv.pointwise(x, weight, bias, None, "relu6")

        args = (x, tensor(out, c, 1, 1, scale=c**-0.5), tensor(out))
    else:
        plain, ours = fastconv.reference.fire_expand, torch.ops.fastconv.fire_expand
        half = out // 2
        args = (x, tensor(half, c, 1, 1, scale=c**-0.5), tensor(half), tensor(half, c, 3, 3, scale=(9 * c) ** -0.5), tensor(half))
    out_h, out_w = (h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1
    moved = (sum(t.numel() for t in args) + batch * out * out_h * out_w) * x.element_size()
    return ours, plain, args, moved


def gradient(op: str, shape: tuple, batch: int, dtype: torch.dtype, device: str = "cuda"):
    """(fastconv's operator, ATen's, their arguments: the output's gradient and x, bytes moved) of a depthwise layer's backward."""
    c, h, w, _, k, stride, padding = shape

    def image(height, width):
        return torch.randn(batch, c, height, width, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    weight = torch.randn(c, 1, k, k, device=device, dtype=dtype) / k
    args = (image((h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1), image(h, w))
    of_input, geometry = op == GRADIENTS[0], ([stride] * 2, [padding] * 2)

    def ours(grad, x):
        other = (weight, [h, w]) if of_input else (x, [k, k])
        return getattr(torch.ops.fastconv, op)(grad, *other, *geometry)

    def plain(grad, x):
        mask = [of_input, not of_input, False]
        found = torch.ops.aten.convolution_backward(grad, x, weight.to(x.dtype), None, *geometry, [1, 1], False, [0, 0], c, mask)
        return found[0 if of_input else 1]

    moved = (args[0].numel() + args[1].numel() + weight.numel()) * weight.element_size()
    return ours, plain, args, moved


def relative_error(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((y.double() - wanted).norm() / wanted.norm()).item()


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class Run:
    """Collects rows until the deadline; a failure becomes a row too."""

    def __init__(self, minutes: float) -> None:
        self.began = time.monotonic()
        self.seconds = 60 * minutes
        self.clock = Clock()
        self.rows: list[dict] = []
        self.block_rows: list[dict] = []
        self.gradient_rows: list[dict] = []
        self.failures: list[str] = []

    def past(self, share: float) -> bool:
        return time.monotonic() - self.began > share * self.seconds

    def guarded(self, what: str, measure) -> None:
        """One layer or network that fails must not lose the others' figures."""
        try:
            measure()
        except Exception as error:
            text = f"{what}: {type(error).__name__}: {error}".splitlines()[0]
            self.failures.append(text)
            print(f"FAILED {text}", flush=True)
            torch.cuda.empty_cache()

    def copy_rate(self) -> float:
        """GB/s of a large device-to-device copy, bytes read plus bytes written."""
        source = torch.empty(2**31, dtype=torch.int8, device="cuda").random_()
        target = torch.empty_like(source)
        return 2 * source.numel() / self.clock(lambda: target.copy_(source)) / 1e3

    def blocks(self, share: float, copy_gb_s: float) -> None:
        from fastconv.benchmarks.blocks import blocks

        for dtype_name, kind in (("bf16", "bf16"), ("fp16", "f16")):
            for block in blocks(kind):
                if self.past(share):
                    return
                what = f"{block.net} {block.layer} {block.problem.op} {dtype_name}"
                self.guarded(what, lambda block=block, dtype_name=dtype_name: self.one_block(block, dtype_name, copy_gb_s))

    def one_block(self, block, dtype_name: str, copy_gb_s: float) -> None:
        from fastconv.benchmarks.blocks import Case
        from fastconv.benchmarks.tuner import forms, run_of
        from fastconv.kernels.gpu import configs, launch, model

        arch = launch.arch(torch.device("cuda", 0))
        batch = BATCHES[0]
        few, case = Case(block, 4, "cuda"), Case(block, batch, "cuda")
        row = {"net": block.net, "layer": block.layer, "op": block.problem.op, "shape": block.shape, "count": block.count}
        row |= {"dtype": dtype_name, "batch": batch, "chosen": configs.text(configs.choice(block.problem, arch))}
        row |= {"tiles_us": {}, "split_tiles_us": {}}
        for form in forms(block.problem, arch):
            if form == configs.ATEN:
                continue
            error = few.error(run_of(few, form)())
            if not error < WRONG[dtype_name]:
                raise ArithmeticError(f"{configs.text(form)}: relative error {error:.2e} against float64")
            row["error"] = max(row.get("error", 0.0), error)
            us = self.clock(run_of(case, form), repeats=10)
            if form is None:
                row["parts_us"] = us
            elif isinstance(form, configs.Split):
                row["split_tiles_us"][str(form.tile)] = us
            else:
                row["tiles_us"][str(form)] = us
        row["fused_us"] = min(row["tiles_us"].values())
        if row["split_tiles_us"]:
            row["split_us"] = min(row["split_tiles_us"].values())
        row["eager_us"] = self.clock(case.plain, repeats=10)
        row["floor_us"] = batch * model.floor(block.problem) / copy_gb_s / 1e3
        self.block_rows.append(row)

    def compiled_blocks(self, share: float) -> None:
        """torch.compile's best on the bf16 blocks, the slowest first."""
        from fastconv.benchmarks.blocks import Case, blocks

        known = {(block.net, block.layer, block.problem.op): block for block in blocks("bf16")}
        rows = [row for row in self.block_rows if row["dtype"] == "bf16"]
        for row in sorted(rows, key=lambda row: -row["eager_us"] * row["count"]):
            if self.past(share):
                return
            case = Case(known[row["net"], row["layer"], row["op"]], row["batch"], "cuda")
            self.guarded(f"torch.compile {row['net']} {row['layer']}", lambda row=row, case=case: self.one_compiled_block(row, case))

    def one_compiled_block(self, row: dict, case) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(case.plain, mode="max-autotune-no-cudagraphs", dynamic=False)
        row["compile_us"] = self.clock(compiled, repeats=10)

    def layers(self, share: float) -> None:
        for dtype_name, dtype in DTYPES.items():
            allow_tf32(dtype_name == "tf32")
            for batch in BATCHES:
                for op in OPS:
                    for shape, names in read_shapes(op).items():
                        if self.past(share):
                            return
                        row = {"op": op, "shape": shape, "names": names, "batch": batch, "dtype": dtype_name}
                        self.guarded(f"{op} {shape} batch {batch} {dtype_name}", lambda row=row, dtype=dtype: self.one_layer(row, dtype))

    def one_layer(self, row: dict, dtype: torch.dtype) -> None:
        ours, plain, args, moved = layer(row["op"], row["shape"], row["batch"], dtype)
        # a float64 reference of four images costs little, and takes the same tile as the whole batch
        few = (args[0][:4].contiguous(memory_format=torch.channels_last), *args[1:])
        row["error"] = relative_error(ours(*few), plain(*(t.double() for t in few)))
        if not row["error"] < WRONG[row["dtype"]]:
            raise ArithmeticError(f"relative error {row['error']:.2e} against float64")
        if not torch.equal(ours(*args)[:4], ours(*few)):
            raise ArithmeticError("a batch and its first images give different bits")
        row["fastconv_us"] = self.clock(lambda: ours(*args))
        row["eager_us"] = self.clock(lambda: plain(*args))
        row["gb_s"] = moved / row["fastconv_us"] / 1e3
        self.rows.append(row)

    def gradients(self, share: float) -> None:
        for dtype_name, dtype in DTYPES.items():
            allow_tf32(dtype_name == "tf32")
            for op in GRADIENTS:
                for shape, names in read_shapes("depthwise").items():
                    if self.past(share):
                        return
                    row = {"op": op, "shape": shape, "names": names, "batch": BATCHES[0], "dtype": dtype_name}
                    self.guarded(f"{op} {shape} {dtype_name}", lambda row=row, dtype=dtype: self.one_gradient(row, dtype))

    def one_gradient(self, row: dict, dtype: torch.dtype) -> None:
        ours, plain, args, moved = gradient(row["op"], row["shape"], row["batch"], dtype)
        few = [tensor[:4].contiguous(memory_format=torch.channels_last) for tensor in args]
        row["error"] = relative_error(ours(*few), plain(*(tensor.double() for tensor in few)))
        if not row["error"] < WRONG[row["dtype"]]:
            raise ArithmeticError(f"relative error {row['error']:.2e} against float64")
        if not torch.equal(ours(*args), ours(*args)):
            raise ArithmeticError("two runs give different bits")
        row["fastconv_us"] = self.clock(lambda: ours(*args))
        row["eager_us"] = self.clock(lambda: plain(*args))
        row["gb_s"] = moved / row["fastconv_us"] / 1e3
        self.gradient_rows.append(row)

    def compiled_layers(self, share: float) -> None:
        """torch.compile's best on the slowest layers first."""
        allow_tf32(False)
        first = [row for row in self.rows if row["dtype"] == "bf16" and row["batch"] == BATCHES[0]]
        for row in sorted(first, key=lambda row: -row["eager_us"] * len(row["names"])):
            if self.past(share):
                return
            self.guarded(f"torch.compile {row['op']} {row['shape']}", lambda row=row: self.one_compiled(row))

    def one_compiled(self, row: dict) -> None:
        torch._dynamo.reset()
        _, plain, args, _ = layer(row["op"], row["shape"], row["batch"], DTYPES[row["dtype"]])
        compiled = torch.compile(plain, mode="max-autotune-no-cudagraphs", dynamic=False)
        row["compile_us"] = self.clock(lambda: compiled(*args))

    def networks(self, share: float) -> list[dict]:
        from fastconv.models import get_model
        from fastconv.optimize import optimize

        found: list[dict] = []

        def one(name, dtype_name, batch):
            torch.manual_seed(0)
            allow_tf32(dtype_name == "tf32")
            dtype = DTYPES[dtype_name]
            x = torch.randn(batch, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
            model = calibrated(get_model(name).cuda().to(memory_format=torch.channels_last), x)
            wanted = eager_form(model).double()(x[:4].double())
            eager = eager_form(model).to(dtype)
            fast = optimize(model.to(dtype))
            x = x.to(dtype)
            eager_error, error = relative_error(eager(x[:4]), wanted), relative_error(fast(x[:4]), wanted)
            if not error <= max(2 * eager_error, 1e-5):
                raise ArithmeticError(f"relative logit error {error:.2e}, eager's own {eager_error:.2e}")
            row = {"net": name, "dtype": dtype_name, "batch": batch, "error": error, "eager_error": eager_error}
            row["fastconv_us"] = self.clock(lambda: fast(x), repeats=10)
            row["eager_us"] = self.clock(lambda: eager(x), repeats=10)
            found.append(row)

        for dtype_name in DTYPES:
            for batch in NET_BATCHES:
                for name in NETS:
                    if self.past(share):
                        return found
                    self.guarded(f"{name} batch {batch} {dtype_name}", lambda n=name, d=dtype_name, b=batch: one(n, d, b))
        return found


def calibrated(model: torch.nn.Module, x: torch.Tensor) -> torch.nn.Module:
    """Batch statistics of x in every norm: with fresh ones, a deep random network's fp16 activations fade to zero."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(x)
    return model.eval()


def eager_form(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in plain torch: fastconv's own layers would take the fused path in inference."""
    import copy

    from fastconv.optimize.planned import Planned

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Planned):
            module.forward = module._forward
    return model


def geomean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else float("nan")


def best_peer(row: dict) -> float:
    """Microseconds of the faster of eager cuDNN and, where it was timed, torch.compile."""
    return min(row["eager_us"], row.get("compile_us", math.inf))


def ours(row: dict) -> float:
    """Microseconds of the fastest form of ours: what `fastconv tune` would choose."""
    return min(row[name] for name in ("fused_us", "split_us", "parts_us") if name in row)


def targets(results: dict) -> list[dict]:
    """Each target beside what was reached: {"what", "target", "reached" or None, "of": how many measurements}."""
    found = []
    for op, target in TARGETS.items():
        rows = [row for row in results["blocks"] if (row["op"], row["dtype"], row["batch"]) == (op, "bf16", 128)]
        reached = geomean([best_peer(row) / ours(row) for row in rows]) if rows else None
        found.append({"what": f"{op}: times the best peer, batch 128", "target": target, "reached": reached, "of": len(rows)})
    for net, target in NET_TARGETS.items():
        rates = [
            row["batch"] / row["fastconv_us"] * 1e6
            for row in results["networks"]
            if (row["net"], row["dtype"], row["batch"]) == (net, "bf16", 256)
        ]
        found.append({"what": f"{net}: images/s, batch 256", "target": target, "reached": max(rates, default=None), "of": len(rates)})
    for op in GRADIENTS:
        rows = [row for row in results["gradients"] if (row["op"], row["dtype"]) == (op, "bf16")]
        reached = geomean([row["eager_us"] / row["fastconv_us"] for row in rows]) if rows else None
        found.append({"what": f"{op}: times ATen, batch 128", "target": GRADIENT_TARGET, "reached": reached, "of": len(rows)})
    rates = [row["gb_s"] for row in results["layers"] if (row["op"], row["dtype"], row["batch"]) == ("depthwise", "bf16", 128)]
    reached = statistics.median(rates) if rates else None
    return [*found, {"what": "depthwise alone: GB/s, batch 128, median", "target": DEPTHWISE_TARGET, "reached": reached, "of": len(rates)}]


def block_table(results: dict) -> str:
    """Every block: microseconds fused, split, in parts and of the peers, and the share of the time its fewest bytes take."""
    head = f"{'network':20s} {'block':22s} {'op':18s} {'shape':26s} {'dtype':5s}"
    lines = [f"{head} {'fused':>9s} {'split':>9s} {'parts':>9s} {'eager':>9s} {'compile':>9s} %floor"]
    for row in results["blocks"]:
        names = ("fused_us", "split_us", "parts_us", "eager_us", "compile_us")
        cells = (f"{row[name]:9.1f}" if name in row else " " * 9 for name in names)
        share = 100 * row["floor_us"] / ours(row)
        head = f"{row['net']:20s} {row['layer']:22s} {row['op']:18s} {row['shape']:26s} {row['dtype']:5s}"
        lines.append(f"{head} {' '.join(cells)} {share:5.0f}%")
    return "\n".join(lines) + "\n"


def tables(results: dict) -> str:
    lines = [
        f"{results['device']}, torch {results['torch']}, triton {results['triton']}, copy {results['copy_gb_s']:.0f} GB/s",
        "",
        "layers: speed over eager cuDNN (geometric mean, worst), over torch.compile, and median share of the copy rate",
    ]
    for dtype in DTYPES:
        for batch in BATCHES:
            for op in OPS:
                rows = [row for row in results["layers"] if (row["dtype"], row["batch"], row["op"]) == (dtype, batch, op)]
                if rows:
                    ratios = [row["eager_us"] / row["fastconv_us"] for row in rows]
                    compiled = [row["compile_us"] / row["fastconv_us"] for row in rows if "compile_us" in row]
                    share = 100 * statistics.median(row["gb_s"] for row in rows) / results["copy_gb_s"]
                    text = f"  {dtype} batch {batch:3d} {op:12s} {len(rows):3d} shapes  eager x{geomean(ratios):.2f} (x{min(ratios):.2f})"
                    text += f"  compile x{geomean(compiled):.2f} ({len(compiled)} shapes)" if compiled else ""
                    lines.append(f"{text}  {share:.0f}% of copy")
    lines += ["", "targets (H200, bf16) and what was reached"]
    for goal in targets(results):
        reached = "not measured" if goal["reached"] is None else f"{goal['reached']:,.1f}"
        lines.append(f"  {goal['what']:45s} target {goal['target']:>9,.1f}  reached {reached}  ({goal['of']} measured)")
    lines += ["", "networks: images/s, and speed over eager channels_last"]
    for row in results["networks"]:
        rate = row["batch"] / row["fastconv_us"] * 1e6
        speed = row["eager_us"] / row["fastconv_us"]
        lines.append(f"  {row['dtype']} batch {row['batch']:3d} {row['net']:20s} {rate:10.0f}  x{speed:.2f}  error {row['error']:.1e}")
    lines += ["", *(f"FAILED {failure}" for failure in results["failures"])]
    return "\n".join(lines).rstrip() + "\n"


def layer_table(results: dict) -> str:
    widths = (25, 5, 5, 28, 11, 9, 10, 6, 5)
    table = [("op", "dtype", "batch", "C H W Cout K stride padding", "fastconv us", "eager us", "compile us", "GB/s", "%copy")]
    for row in results["layers"] + results["gradients"]:
        shape = " ".join(map(str, row["shape"]))
        compiled = f"{row['compile_us']:.1f}" if "compile_us" in row else ""
        rates = f"{row['gb_s']:.0f}", f"{100 * row['gb_s'] / results['copy_gb_s']:.0f}"
        table.append(
            (row["op"], row["dtype"], row["batch"], shape, f"{row['fastconv_us']:.1f}", f"{row['eager_us']:.1f}", compiled, *rates)
        )
    lines = ["  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join(lines) + "\n"


def charts(results: dict, out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no charts")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for dtype in DTYPES:
        rows = [row for row in results["layers"] if row["dtype"] == dtype and row["batch"] == BATCHES[0]]
        if not rows:
            continue
        figure, axes = plt.subplots(1, len(OPS), figsize=(18, 14))
        for axis, op in zip(axes, OPS, strict=False):
            mine = [row for row in rows if row["op"] == op]
            labels = [" ".join(map(str, row["shape"])) for row in mine]
            axis.barh(labels, [row["eager_us"] / row["fastconv_us"] for row in mine], color="tab:blue")
            axis.axvline(1, color="black", linewidth=1)
            axis.invert_yaxis()
            axis.tick_params(axis="y", labelsize=6)
            axis.set_title(f"{op} {dtype}, batch {BATCHES[0]}: speed over eager cuDNN")
        figure.tight_layout()
        figure.savefig(out / f"gpu-{dtype}.png", dpi=120)
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for gpu.json, gpu.txt and the charts")
    parser.add_argument("--minutes", type=float, default=8, help="time to spend; what does not fit is left out")
    parser.add_argument("--warm", type=float, default=90, help="seconds of it, at most, to compile kernels ahead in several processes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run")
        return 0

    import triton

    options.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    run = Run(options.minutes)
    if options.warm:
        from fastconv.benchmarks import warm
        from fastconv.kernels.gpu import launch

        print(warm.warm(warm.everything(launch.arch(torch.device("cuda", 0))), min(options.warm, 12 * options.minutes)), flush=True)
    results = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cudnn": torch.backends.cudnn.version(),
        "copy_gb_s": run.copy_rate(),
        "blocks": run.block_rows,
        "layers": run.rows,
        "gradients": run.gradient_rows,
        "networks": [],
        "failures": run.failures,
    }
    with torch.no_grad():
        run.blocks(0.3, results["copy_gb_s"])
        results["networks"] = run.networks(0.5)
        run.compiled_blocks(0.65)
        run.layers(0.8)
        run.gradients(0.88)
        run.compiled_layers(0.95)
    results["targets"] = targets(results)
    results["uncaptured"] = run.clock.uncaptured
    results["seconds"] = time.monotonic() - run.began
    text = tables(results)
    (options.out / "gpu.json").write_text(json.dumps(results, indent=1))
    (options.out / "gpu.txt").write_text(f"{text}\n{block_table(results)}\n{layer_table(results)}")
    charts(results, options.out)
    print(text)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
