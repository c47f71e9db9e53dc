"""fastconv profile: every layer is there, counted and timed, beside roofs that were measured."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fastconv
from fastconv import _extension
from fastconv.benchmarks import roofline
from fastconv.cli import main
from fastconv.optimize import profile as profiling

pytestmark = pytest.mark.skipif(not _extension.available, reason="the roofs need the compiled extension")


def multiply_adds(model, x):
    """By hooks on every convolution and linear layer of the plain model."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        per_output = module.weight[0].numel()
        total += output.numel() * per_output

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v1", "mobilenet_v3_small"])
def test_layers_add_up_to_the_models_multiply_adds(name):
    model = fastconv.models.get_model(name, num_classes=10).eval()
    x = torch.randn(2, 3, 64, 96)
    result = profiling.profile(fastconv.optimize(model), x, rounds=2)
    counted = sum((row["gflops"] or 0) * row["us"] * 1e3 for row in result["layers"])
    assert counted == pytest.approx(2 * multiply_adds(model, x), rel=1e-9)
    assert sum(row["share"] for row in result["layers"]) == pytest.approx(1)
    assert len({row["layer"] for row in result["layers"]}) == len(result["layers"])
    assert result["sum_us"] == pytest.approx(sum(row["us"] for row in result["layers"]))
    assert all(row["us"] > 0 and row["gbs"] > 0 for row in result["layers"])


@pytest.mark.parametrize("name", fastconv.models.list_models())
def test_steps_of_the_whole_call_are_its_layers(name):
    fast = fastconv.optimize(fastconv.models.get_model(name, num_classes=10).eval())
    result = profiling.profile(fast, torch.randn(3, 3, 64, 64), rounds=2)
    kernels = [row["layer"] for row in result["layers"] if row["op"] != "torch"]
    assert [layer for step in result["steps"] for layer in step["layers"]] == kernels
    assert (len(result["steps"]) < len(kernels)) == (name != "mobilenet_v3_small")  # whose stem meets a gate; the others' rows go on
    assert all(step["us"] > 0 for step in result["steps"])


def test_timing_the_steps_changes_no_bit():
    fast = fastconv.optimize(fastconv.models.get_model("mobilenet_v2", width_mult=0.25, num_classes=10).eval())
    x = torch.randn(5, 3, 64, 64)
    with torch.inference_mode():
        before = fast(x)
        fast.plan.prepare()[3].times(x)
        assert torch.equal(before, fast(x))


def test_percents_are_of_the_measured_roofs():
    fast = fastconv.optimize(fastconv.models.get_model("squeezenet1_1", num_classes=10).eval())
    result = profiling.profile(fast, torch.randn(1, 3, 64, 64), rounds=2)
    roof = result["roofline"]
    for row in result["layers"]:
        if row["gflops"] is not None:
            assert row["percent_of_peak"] == pytest.approx(100 * row["gflops"] / (roof["fma_gflops"] * roof["threads"]))
            assert row["percent_of_roof"] >= row["percent_of_peak"] * (1 - 1e-9)


def test_a_model_without_a_plan_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="profile: the model has no plan of its own"):
        profiling.profile(fastconv.optimize(Branching()), torch.randn(1, 3, 8, 8))


def test_roofs_are_ordered():
    from fastconv import _C

    measured = roofline.measure()
    bandwidth = measured["bandwidth_gbs"]
    assert bandwidth["L1"] > bandwidth["DRAM"] > 0.1
    assert set(measured["isa"]) == set(_C.isas())
    assert all(peaks["fma_gflops"] > 0.1 for peaks in measured["isa"].values())


@pytest.mark.parametrize(
    ("arguments", "message"), [((4096, "write"), "kind must be 'read' or 'copy', got 'write'"), ((100, "read"), "at least 4096")]
)
def test_bandwidth_arguments(arguments, message):
    from fastconv import _C

    with pytest.raises(ValueError, match=message):
        _C.bandwidth_gbs(*arguments)


def test_command(tmp_path):
    arguments = [
        "profile",
        "squeezenet1_1",
        "--size",
        "64",
        "--rounds",
        "2",
        "--json",
        f"{tmp_path}/p.json",
        "--chart",
        f"{tmp_path}/p.png",
    ]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "features.3" in done.output
    assert "% of roof" in done.output
    document = json.loads((tmp_path / "p.json").read_text())
    assert document["model"] == "squeezenet1_1"
    assert document["layers"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses_a_chart_it_cannot_write(tmp_path):
    done = CliRunner().invoke(main, ["profile", "squeezenet1_1", "--size", "64", "--rounds", "1", "--chart", f"{tmp_path}/p.xyz"])
    assert done.exit_code == 1
    assert "--chart" in done.output
