"""The networks' blocks as problems of the GPU kernels: what there is to fuse, and each as one kernel, split, in parts, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from fastconv import reference
from fastconv.benchmarks import layers
from fastconv.kernels.gpu import model
from fastconv.kernels.gpu.configs import Problem, Tile, text

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "tf32": torch.float32}
# the fires that a 3x3 max-pool with stride 2 and ceil_mode follows, and the size it makes
POOLED = {("squeezenet1_0", "features.5"): 27, ("squeezenet1_0", "features.10"): 13}
POOLED |= {("squeezenet1_1", "features.0"): 55, ("squeezenet1_1", "features.4"): 27, ("squeezenet1_1", "features.7"): 13}
HEADS = [("squeezenet1_0", 512, 13, 1000), ("squeezenet1_1", 512, 13, 1000), ("mobilenet_v2", 320, 7, 1280)]
HEADS += [("mobilenet_v3_small", 96, 7, 576), ("mobilenet_v3_large", 160, 7, 960)]


@dataclass(frozen=True)
class Block:
    """A block of a network: `count` of them have its shape; squeeze-excitation counts as its first half."""

    net: str
    layer: str
    count: int
    problem: Problem
    activation: str | None
    residual: bool = False

    @property
    def shape(self) -> str:
        p = self.problem
        between = f"-{p.between}" if p.between else ""
        return f"{p.in_channels}{between}-{p.out_channels} {p.size[0]}x{p.size[1]} k{p.kernel} s{p.stride[0]}"


def blocks(dtype: str = "bf16", ops: tuple[str, ...] = ()) -> list[Block]:
    """Every block of the six networks at 224 x 224, as many as its distinct shapes; of the operations named, or of all."""
    found = []
    for op in ("stem", "separable", "inverted_residual", "fire"):
        for row in layers.read(op):
            kernel, stride, padding = row["K"], (row["stride"],) * 2, (row["padding"],) * 2
            size = [(extent + 2 * row["padding"] - kernel) // row["stride"] + 1 for extent in (row["H"], row["W"])]
            geometry = (kernel, stride, padding, row.get("expand", 0), (row["H"], row["W"]))
            problem = Problem(op, dtype, *size, row["C"], row["Cout"], *geometry)
            residual = bool(row.get("residual", 0))
            if op == "fire":
                problem = Problem(op, dtype, row["H"], row["W"], row["C"], row["Cout"] // 2, 3, (1, 1), (1, 1), row["squeeze"])
            elif op == "inverted_residual" and row["expand"] and row["squeeze"]:
                problem, residual = replace(problem, op="expand_depthwise", out_channels=row["expand"]), False
            elif op == "inverted_residual" and not row["expand"]:
                continue  # a depthwise convolution and squeeze-excitation: no pair without a pooling between
            found.append(Block(row["net"], row["layer"], row["count"], problem, row["activation"], residual))
            if (pooled := POOLED.get((row["net"], row["layer"]))) and op == "stem":
                problem = replace(problem, op="stem_pool", height=pooled, width=pooled)
                found.append(Block(row["net"], f"{row['layer']} + pool", row["count"], problem, row["activation"]))
            elif pooled and op == "fire":
                geometry = (3, (2, 2), (0, 0), 0, (row["H"], row["W"]))
                problem = Problem("fire_pool", dtype, pooled, pooled, row["squeeze"], row["Cout"] // 2, *geometry)
                found.append(Block(row["net"], f"{row['layer']} + pool", row["count"], problem, "relu"))
    for net, channels, size, out in HEADS:
        activation = "hardswish" if "v3" in net else "relu6" if "v2" in net else "relu"
        found.append(Block(net, "head", 1, Problem("head", dtype, size, size, channels, out), activation))
    return [block for block in found if not ops or block.problem.op in ops]


class Case:
    """A block with random weights and inputs: `fused(tile)`, `parts()`, `plain()` and, of an inverted residual, `split(tile)` are the same.

    `plain` is torch's own operators one by one; inputs are channels_last, weights as the kernels read them. As a squeeze-excitation's
    first half, all give the depthwise result and the mean of its pixels.
    """

    def __init__(self, block: Block, batch: int, device: str, seed: int = 0) -> None:
        from fastconv.kernels.gpu import launch

        self.block, self.problem = block, block.problem
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.device, self.dtype = device, DTYPES[block.problem.dtype]
        p = self.problem
        c, o, e, k = p.in_channels, p.out_channels, p.between, p.kernel
        self.x = self._randn(batch, c, *p.size)
        shapes = {
            "separable": [(c, 1, k, k), (o, c, 1, 1)],
            "inverted_residual": [(e, c, 1, 1), (e, 1, k, k), (o, e, 1, 1)],
            "expand_depthwise": [(e, c, 1, 1), (e, 1, k, k)],
            "fire": [(e, c, 1, 1), (o, e, 1, 1), (o, e, 3, 3)],
            "fire_pool": [(o, c, 1, 1), (o, c, 3, 3)],
            "stem": [(o, c, k, k)],
            "stem_pool": [(o, c, k, k)],
            "head": [(o, c, 1, 1)],
        }[p.op]
        self.weights = [tensor for shape in shapes for tensor in (self._weight(*shape), self._randn(shape[0]))]
        # the layout of the stem's weight is its own, and costs torch's convolutions a copy
        self.ordered = [launch.stem_order(self.weights[0]), *self.weights[1:]] if p.op.startswith("stem") else self.weights

    def _randn(self, *shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    def _weight(self, *shape: int) -> torch.Tensor:
        from fastconv.kernels.gpu.launch import kernel_order

        depth = shape[1] * shape[2] * shape[3]
        return kernel_order((self._randn(*shape) * depth**-0.5).to(self.dtype))

    def _run(self, fused: bool, tile: Tile | None = None):
        from fastconv.kernels.gpu import (
            depthwise,
            fire,
            fire_expand,
            fire_pool,
            global_avg_pool,
            head,
            inverted_residual,
            max_pool,
            pointwise,
            separable,
            stem,
            stem_pool,
        )

        p, x, w, act = self.problem, self.x, self.ordered, self.block.activation
        geometry, residual = (p.stride, p.padding), self.x if self.block.residual else None
        if p.op == "separable":
            # V1's blocks have the activation twice; V2's and V3's first block is linear at the end
            if fused:
                return separable.separable(x, *w, *geometry, "relu6", act, residual, tile)
            return pointwise.pointwise(depthwise.depthwise(x, *w[:2], *geometry, "relu6"), *w[2:], residual, act)
        if p.op == "inverted_residual":
            if fused:
                return inverted_residual.inverted_residual(x, *w, residual, *geometry, act, act, None, tile)
            y = depthwise.depthwise(pointwise.pointwise(x, *w[:2], None, act), *w[2:4], *geometry, act)
            return pointwise.pointwise(y, *w[4:], residual)
        if p.op == "expand_depthwise":
            if fused:
                y, sums = inverted_residual.expand_depthwise(x, *w, *geometry, act, act, tile)
            else:
                y = sums = depthwise.depthwise(pointwise.pointwise(x, *w[:2], None, act), *w[2:], *geometry, act)
            return y, global_avg_pool.global_avg_pool(sums, p.height * p.width, x.dtype)
        if p.op == "fire":
            if fused:
                return fire.fire(x, *w, tile)
            return fire_expand.fire_expand(pointwise.pointwise(x, *w[:2], None, "relu"), *w[2:])
        if p.op == "fire_pool":
            if fused:
                return fire_pool.fire_pool(x, *w, p.stride, p.padding, (p.height, p.width), tile)
            return max_pool.max_pool(fire_expand.fire_expand(x, *w), p.stride, p.padding, ceil_mode=True)
        if p.op == "stem_pool":
            if fused:
                return stem_pool.stem_pool(x, *w, *geometry, act, (2, 2), (0, 0), (p.height, p.width), tile)
            return max_pool.max_pool(stem.stem(x, *w, *geometry, act), (2, 2), (0, 0), ceil_mode=True)
        if p.op == "stem":
            return stem.stem(x, *w, *geometry, act, tile) if fused else self.plain()
        return head.head(x, *w, act, tile) if fused else global_avg_pool.global_avg_pool(pointwise.pointwise(x, *w, None, act))

    def _pool(self, y: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(y, 3, 2, ceil_mode=True)

    def fused(self, tile: Tile | None = None):
        return self._run(True, tile)

    def split(self, tile: Tile | None = None):
        """The expand, then the rest as one kernel; tile: of the second."""
        from fastconv.kernels.gpu import pointwise, separable

        p, w, act = self.problem, self.weights, self.block.activation
        y = pointwise.pointwise(self.x, *w[:2], None, act)
        return separable.separable(y, *w[2:], p.stride, p.padding, act, None, self.x if self.block.residual else None, tile)

    def parts(self):
        return self._run(False)

    def plain(self, x: torch.Tensor | None = None, *weights: torch.Tensor):
        """x, weights: the same in another dtype."""
        p, act = self.problem, self.block.activation
        x, w = (self.x, self.weights) if x is None else (x, weights)
        geometry, residual = {"stride": p.stride, "padding": p.padding}, x if self.block.residual else None
        if p.op == "separable":
            return reference.separable(x, *w, **geometry, depthwise_activation="relu6", activation=act, residual=residual)
        if p.op == "inverted_residual":
            return reference.inverted_residual(x, *w, **geometry, activation=act, residual=self.block.residual)
        if p.op == "expand_depthwise":
            y = reference.depthwise(reference.pointwise(x, *w[:2], activation=act), *w[2:], **geometry, activation=act)
            return y, y.mean((2, 3), keepdim=True)
        if p.op == "fire":
            return reference.fire(x, *w)
        if p.op == "fire_pool":
            return self._pool(reference.fire_expand(x, *w))
        if p.op.startswith("stem"):
            y = reference.stem(x, *w, **geometry, activation=act)
            return self._pool(y) if p.op == "stem_pool" else y
        return reference.pointwise(x, *w, activation=act).mean((2, 3), keepdim=True)

    def error(self, result) -> float:
        """The largest relative L2 error of a result against plain torch in float64."""
        wanted = self.plain(self.x.double(), *(tensor.double() for tensor in self.weights))
        pairs = zip(result, wanted) if isinstance(result, tuple) else [(result, wanted)]
        return max(((y.double() - y64).norm() / y64.norm()).item() for y, y64 in pairs)


def modelled(arch: str, dtype: str = "bf16") -> list[dict]:
    """What the model says of each block, measured or not: the form, bytes an image in device memory fused, split, in parts, at least."""
    rows = []
    for block in blocks(dtype):
        problem = block.problem
        best = model.best(problem, arch)
        row = {"net": block.net, "layer": block.layer, "op": problem.op, "shape": block.shape, "count": block.count}
        row["form"] = text(model.form(problem, arch))
        row |= {"floor": model.floor(problem), "fused": int(model.work(problem, best).memory), "issued": model.issued(problem, best)}
        has_parts = problem.op != "stem"
        row["parts"] = int(sum(part.memory for part in model.parts(problem, arch))) if has_parts else row["fused"]
        row["fused_us"] = 1e6 * model.fused_seconds(problem, best, arch)
        row["parts_us"] = 1e6 * model.parts_seconds(problem, arch) if has_parts else row["fused_us"]
        if problem.op == "inverted_residual":
            second = model.best(problem.after_expand, arch)
            row["split"] = int(model.parts(problem, arch)[0].memory + model.work(problem.after_expand, second).memory)
            row["split_us"] = 1e6 * model.split_seconds(problem, second, arch)
        rows.append(row)
    return rows
