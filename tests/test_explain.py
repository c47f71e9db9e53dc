"""explain: one row for each submodule, which kernel took it or why it was left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv.models._torchvision import import_torchvision
from fastconv.ops import prepare_max_pool, prepare_pointwise
from fastconv.optimize import explain, optimize

pytestmark = pytest.mark.usefixtures("portable")

POINTWISE = prepare_pointwise(torch.ones(1, 1, 1, 1), None, activation=None).kernel
POOL = prepare_max_pool(2, 0, False, like=torch.ones(1)).kernel


def named(op: str) -> str:
    """The kernel's name as explain shows it for another operator."""
    return POINTWISE.replace("pointwise", op)


class Everything(nn.Module):
    """Something of every fate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Dropout()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1))
        self.groups = nn.Conv2d(6, 6, 3, groups=2)
        self.reflect = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.slope = nn.LeakyReLU()
        self.shared = nn.Conv2d(6, 6, 1)
        self.after = nn.BatchNorm2d(6)
        self.hooked = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU())
        self.hooked.register_forward_hook(lambda module, args, output: None)
        self.asks = Asks()
        self.unused = nn.Linear(3, 3)
        self.pool = nn.MaxPool2d(3, 2)
        self.two = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.drop(self.stem(x)))
        x = self.shared(self.slope(self.reflect(self.groups(x))))
        x = F.hardswish(self.after(x) + x)
        return self.two(self.pool(self.asks(self.hooked(x))))


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(6, 6, 1), nn.SiLU())
        self.scale = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.mean() > 0 else self.scale(x)


CONTROL_FLOW = "symbolically traced variables cannot be used as inputs to control flow"
EXPECTED = [
    ("stem", "Sequential", named("stem"), ""),
    ("stem.0", "Conv2d", named("stem"), "with 1, 2 of stem"),
    ("stem.1", "BatchNorm2d", named("stem"), "with 0, 2 of stem"),
    ("stem.2", "ReLU", named("stem"), "with 0, 1 of stem"),
    ("drop", "Dropout", "none", "does nothing in eval mode"),
    ("body", "Sequential", named("separable"), ""),
    ("body.0", "Conv2d", named("separable"), "with body.1"),
    ("body.1", "Conv2d", named("separable"), "with body.0"),
    ("groups", "Conv2d", "ATen conv2d", "groups 2"),
    ("reflect", "Conv2d", "PyTorch", "padding_mode 'reflect'"),
    ("slope", "LeakyReLU", "PyTorch", "no kernel for it"),
    ("shared", "Conv2d", POINTWISE, ""),
    ("after", "BatchNorm2d", "PyTorch", "does not follow a layer that only it reads"),
    ("hooked", "Sequential", "PyTorch", "it has hooks"),
    ("hooked.0", "Conv2d", "PyTorch", "inside hooked, which has hooks"),
    ("hooked.1", "ReLU", "PyTorch", "inside hooked, which has hooks"),
    ("asks", "Asks", POINTWISE, "1 of 3 left to PyTorch"),
    ("asks.inner", "Sequential", POINTWISE, ""),
    ("asks.inner.0", "Conv2d", POINTWISE, "with asks.inner.1"),
    ("asks.inner.1", "SiLU", POINTWISE, "with asks.inner.0"),
    ("asks.scale", "Identity", "PyTorch", f"inside asks, which does not trace: {CONTROL_FLOW}"),
    ("unused", "Linear", "none", "not called in eval mode"),
    ("pool", "MaxPool2d", POOL, ""),
    ("two", "MaxPool2d", "PyTorch", "a 2x2 window with stride 2x2"),
]


def cells(explanation) -> list[tuple[str, str, str, str]]:
    return [(row.name, row.type, row.kernel, row.reason) for row in explanation.rows]


def test_rows():
    model = Everything()
    for row, expected in zip(cells(explain(model)), EXPECTED, strict=True):
        assert row == expected


def test_table():
    lines = str(explain(Everything())).splitlines()
    assert lines[0].split() == ["module", "type", "kernel", "notes"]
    assert len(lines) == len(EXPECTED) + 1
    starts = [lines[0].index(word) for word in ("type", "kernel", "notes")]
    for line, (name, kind, kernel, reason) in zip(lines[1:], EXPECTED):
        assert [line[start:].startswith(cell) for start, cell in zip((0, *starts), (name, kind, kernel, reason))] == [True] * 4
        assert line == line.rstrip()


def test_optimized_and_plain_models_are_explained_alike():
    model = Everything()
    kept = copy.deepcopy(model.state_dict())
    rows = cells(explain(model))
    assert cells(explain(optimize(model))) == rows
    assert cells(explain(optimize(model).train())) == rows
    assert model.training
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_explains_what_runs_now():
    fast = optimize(Everything())
    fast.body[0].register_forward_hook(lambda module, args, output: None)
    fast.two = nn.MaxPool2d(3, 2)
    rows = {row.name: row for row in explain(fast).rows}
    assert (rows["body.0"].kernel, rows["body.0"].reason) == ("PyTorch", "it has hooks")
    assert rows["body.1"].kernel == POINTWISE
    assert rows["two"].kernel == POOL
    assert explain(optimize(Everything(), dtype=torch.bfloat16)).rows[0].kernel.startswith("ATen (")


def test_a_model_that_does_not_trace():
    class Undecided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.GroupNorm(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.conv(x) if x.mean() > 0 else x

    reason = f"the model does not trace: {CONTROL_FLOW}"
    rows = cells(explain(Undecided()))
    assert rows == [("conv", "Conv2d", POINTWISE, ""), ("norm", "GroupNorm", "PyTorch", reason)]


def test_a_model_that_writes_where_others_read():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.relu(y) + y

    rows = {row.name: row for row in explain(Writes()).rows}
    assert rows["conv"].kernel == POINTWISE
    assert rows["relu"].reason == "the model does not trace: ReLU writes into a value that is read later"


def test_one_layer():
    assert cells(explain(nn.Conv2d(3, 4, 1))) == [("", "Conv2d", POINTWISE, "")]
    assert cells(explain(nn.Tanh())) == [("", "Tanh", "PyTorch", "no kernel for it")]


def test_a_module_under_two_names():
    conv = nn.Conv2d(3, 3, 1)
    rows = explain(nn.Sequential(conv, nn.ReLU(), conv)).rows
    assert [row.kernel for row in rows] == [POINTWISE] * 3


def test_timms_norm_with_activation():
    try:
        import_torchvision()
        import timm
    except ImportError as problem:
        pytest.skip(f"needs torchvision and timm: {problem}")
    rows = {row.name: row for row in explain(timm.create_model("mobilenetv1_100")).rows}
    for part in ("conv_stem", "bn1", "bn1.act"):
        assert rows[part].kernel == named("stem")
    assert rows["conv_stem"].reason == "with bn1"
    assert rows["blocks.1.0"].kernel == named("separable")
    assert rows["blocks.1.0"].reason == ""
    assert rows["blocks"].kernel == "13 kernels"
    assert rows["blocks.1.0.bn2"].reason == "with conv_dw, bn1, conv_pw of blocks.1.0"
    assert {(row.type, row.reason) for row in rows.values() if row.kernel == "PyTorch"} == {("Flatten", "only changes the shape")}


def test_errors():
    with pytest.raises(TypeError, match=r"explain: model must be a torch\.nn\.Module, got int"):
        explain(3)
