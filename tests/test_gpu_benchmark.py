"""What of benchmarks/gpu.py needs no GPU: its arithmetic, its tables, and what it says without one."""

import sys

import pytest
import torch

from fastconv.benchmarks import gpu


def results(**more):
    rest = {"net": "mobilenet_v1", "layer": "blocks.0.0", "shape": "32-64 112x112 k3 s1", "dtype": "bf16", "batch": 128, "count": 1}
    rows = [
        rest | {"op": "separable", "fused_us": 10.0, "parts_us": 20.0, "eager_us": 80.0, "compile_us": 40.0, "floor_us": 5.0},
        rest | {"op": "separable", "fused_us": 30.0, "parts_us": 10.0, "eager_us": 10.0, "floor_us": 2.5},
        rest | {"op": "separable", "fused_us": 1.0, "parts_us": 1.0, "eager_us": 900.0, "floor_us": 1.0, "dtype": "fp16"},
    ]
    networks = [{"net": "mobilenet_v2", "dtype": "bf16", "batch": 256, "fastconv_us": 1024.0, "eager_us": 4096.0, "error": 1e-3}]
    gradient = {"op": gpu.GRADIENTS[1], "shape": (32, 56, 56, 32, 3, 1, 1), "dtype": "bf16", "batch": 128, "gb_s": 2000.0}
    gradients = [gradient | {"fastconv_us": 10.0, "eager_us": 20.0}, gradient | {"fastconv_us": 10.0, "eager_us": 80.0}]
    made = {"device": "a test", "torch": "2", "triton": "3", "copy_gb_s": 4000.0, "blocks": rows, "layers": [], "networks": networks}
    made |= {"gradients": gradients}
    return made | {"failures": []} | more


def test_targets_stand_beside_what_was_reached():
    found = {goal["what"].split(":")[0]: goal for goal in gpu.targets(results())}
    # 4 times the better peer, fused; as fast as the only one, in parts
    assert found["separable"]["reached"] == pytest.approx(2)
    assert found["separable"]["of"] == 2
    assert found["inverted_residual"]["reached"] is None
    assert found["mobilenet_v2"]["reached"] == pytest.approx(250e3)
    assert found["mobilenet_v1"]["reached"] is None
    assert found["depthwise alone"]["reached"] is None
    assert found["depthwise_backward_weight"]["reached"] == pytest.approx(4)
    assert found["depthwise_backward_input"]["reached"] is None
    assert found.keys() == {*gpu.TARGETS, *gpu.NET_TARGETS, *gpu.GRADIENTS, "depthwise alone"}


def test_tables():
    text = gpu.tables(results(failures=["a layer: ValueError: it failed"]))
    assert "not measured" in text
    assert "FAILED a layer" in text
    rows = gpu.block_table(results()).splitlines()
    assert len(rows) == 4
    assert rows[1].split()[-5:] == ["10.0", "20.0", "80.0", "40.0", "50%"]
    assert rows[2].endswith("25%")  # of the faster form, in parts
    split = results()["blocks"][0] | {"op": "inverted_residual", "split_us": 8.0}
    rows = gpu.block_table(results(blocks=[split])).splitlines()
    assert rows[1].split()[-6:] == ["10.0", "8.0", "20.0", "80.0", "40.0", "62%"]  # of the split form, the fastest
    assert len({len(row) for row in rows}) == 1
    rows = gpu.layer_table(results()).splitlines()
    assert len(rows) == 3
    assert rows[1].split()[-2:] == ["2000", "50"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out")])
    assert gpu.main() == 0
    assert "nothing was run" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
