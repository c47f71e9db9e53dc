"""The op suite's honesty: its shapes are the networks', and what is wrong is not timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastconv import _extension
from fastconv.benchmarks import layers, suite

ROOT = Path(suite.__file__).parent.parent
CHECKOUT = (ROOT / "benchmarks" / "bench_depthwise.py").exists()


def test_the_files_are_what_the_networks_have():
    found = layers.of_networks()
    for op in layers.OPS:
        assert (layers.SHAPES / f"{op}.txt").read_text() == layers.text(op, found[op])
        assert layers.read(op) == found[op]


def test_an_unknown_op_is_refused():
    with pytest.raises(ValueError, match="layers: op must be one of stem, depthwise"):
        layers.read("pool")


@pytest.mark.parametrize("op", layers.OPS)
def test_every_engine_is_right_and_a_wrong_kernel_is_refused(op):
    rows = suite.rows(op)
    smallest = min(rows, key=lambda row: suite._work(op, row.shape)).shape
    with torch.no_grad():
        layer = suite.make(op, smallest)
        for engine in ("fastconv", "eager", "eager_channels_last"):
            assert suite.check(suite.through(engine, layer), layer, engine) <= 1e-5
        right = layer.fast()

        def wrong():
            y = right.clone()
            y[0, -1, 0, 0] += 1e-4 * y.abs().max()
            return y

        with pytest.raises(suite.WrongResult, match=r"mine: not timed: an output is off by 1\.0e-04 of the largest"):
            suite.check(wrong, layer, "mine")
        with pytest.raises(suite.WrongResult, match="mine: not timed: its shape is"):
            suite.check(lambda: right[:, :-1], layer, "mine")
        with pytest.raises(suite.WrongResult, match="off by nan"):
            suite.check(lambda: right * torch.nan, layer, "mine")


@pytest.mark.skipif(not (CHECKOUT and _extension.available), reason="needs a checkout and the compiled extension")
@pytest.mark.slow
def test_the_suite_runs_under_pytest_benchmarks_own_options(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_stem.py", "-q", "-k", "mobilenet_v3_small", "--engines=fastconv,eager"]
    command += ["--benchmark-max-time=0.02", "--benchmark-min-rounds=2", f"--benchmark-storage={tmp_path}", "--benchmark-save=first"]
    command += ["-p", "no:cacheprovider"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "% of roof" in done.stdout
    [path] = tmp_path.rglob("*first.json")
    rows = json.loads(path.read_text())["benchmarks"]
    assert {row["extra_info"]["engine"] for row in rows} == {"fastconv", "eager"}
    for row in rows:
        assert {"ms", "gflops", "gbs", "percent_of_roof", "percent_of_peak", "relative_error", "networks"} <= set(row["extra_info"])
    compared = [word for word in command if "save" not in word] + ["--benchmark-compare=0001", "--benchmark-compare-fail=min:100000%"]
    done = subprocess.run(compared, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
