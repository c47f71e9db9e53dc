"""The benchmark suite's own honesty: what is wrong is not timed, what is missing is named, what got slower and what disturbs is seen."""

import json
import multiprocessing
import os
import sys
import threading
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastconv
from fastconv.benchmarks import compare, engines, machine, measure
from fastconv.benchmarks import networks as suite
from fastconv.cli import main

QUICK = ("bench", "--nets", "squeezenet1_1", "--size", "64", "--rounds", "3", "--threads", "1")


@pytest.fixture(autouse=True)
def threads():
    """The suite sets torch's thread count; the other tests want it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(*arguments, code=0):
    result = CliRunner().invoke(main, [*QUICK, *arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def cell(folder, chosen=("fastconv", "eager", "eager_channels_last"), **more):
    table = engines.CPU | {name: engines.Engine(name, build) for name, build in more.items()}
    names = (*chosen, *more)
    return suite.cell("squeezenet1_1", batch=2, size=64, threads=1, rounds=3, chosen=names, folder=folder, table=table)


def spoiled(spoil):
    """An engine that is right but for what `spoil` does to its logits."""

    def build(request):
        return lambda: spoil(request.model(request.x))

    return build


def off_by_a_hundredth(logits):
    logits[-1, 7] += 0.01 * logits[-1].norm()
    return logits


def with_nan(logits):
    logits[0, 3] = torch.nan
    return logits


def absent(request):
    import a_peer_that_nobody_has  # noqa: F401


@pytest.mark.parametrize(("spoil", "error"), [(off_by_a_hundredth, "1.0e-02"), (with_nan, "inf")])
def test_a_wrong_kernel_is_refused_and_named(tmp_path, spoil, error):
    row = cell(tmp_path, wrong=spoiled(spoil))
    assert set(row["engines"]) == {"fastconv", "eager", "eager_channels_last"}
    assert row["missing"] == {"wrong": f"wrong logits: relative error {error}, allowed 0.001"}
    assert "wrong" not in row["ratios"]


def test_logits_of_another_shape_are_refused(tmp_path):
    row = cell(tmp_path, ("eager",), short=spoiled(lambda logits: logits[:, :999]))
    assert "invalid for input of size" in row["missing"]["short"]


def test_a_wrong_fastconv_fails_the_command(tmp_path, monkeypatch):
    class Wrong(torch.nn.Module):
        def __init__(self, model, **options):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) * (1 + 2e-5)

    monkeypatch.setattr(fastconv, "optimize", Wrong)
    result = bench("--json", str(tmp_path / "run.json"), code=1)
    assert "squeezenet1_1: wrong logits: relative error 2.0e-05, allowed 1e-05" in result.stderr
    [row] = json.loads((tmp_path / "run.json").read_text())["cells"]
    assert "fastconv" not in row["engines"]
    assert row["ratios"] == {}


def test_a_missing_peer_is_named_with_what_installs_it(tmp_path, monkeypatch):
    # every peer, whether it is installed here or not
    for name in ("onnx", "onnxruntime", "openvino", "executorch", "ncnn", "MNN"):
        for loaded in [name, *(key for key in sys.modules if key.startswith(name + "."))]:
            monkeypatch.setitem(sys.modules, loaded, None)
    peers = {name: engine for name, engine in engines.CPU.items() if engine.packages}
    assert set(peers) == {"onnxruntime", "openvino", "xnnpack", "ncnn", "mnn"}
    row = cell(tmp_path, ("fastconv", "eager", *peers), absent=absent)
    assert set(row["missing"]) == {"absent", *peers}
    for name, engine in peers.items():
        assert row["missing"][name].startswith("not installed (")
        assert row["missing"][name].endswith(f"pip install {engine.packages}")
    assert set(row["ratios"]) == {"eager"}


def test_an_unknown_engine_lists_the_known_ones():
    result = bench("--engines", "tensorflow", code=2)
    assert "unknown engine 'tensorflow'; engines: fastconv, eager" in result.stderr


@pytest.mark.parametrize("arguments", [("--batch", "0"), ("--batch", "two"), ("--threads", ","), ("--batch", "1,-4")])
def test_a_batch_or_thread_count_that_is_none_is_refused(arguments):
    assert "must be whole numbers from 1" in bench(*arguments, code=2).stderr


def test_an_artificial_slowdown_is_caught(tmp_path, monkeypatch):
    old = tmp_path / "old.json"
    bench("--json", str(old))
    optimize = fastconv.optimize

    class Slow(torch.nn.Module):
        def __init__(self, model, **options):
            super().__init__()
            self.fast = optimize(model)

        def forward(self, x):
            end = time.perf_counter() + 0.03
            while time.perf_counter() < end:
                pass
            return self.fast(x)

    monkeypatch.setattr(fastconv, "optimize", Slow)
    result = bench("--compare", str(old), "--threshold", "50", code=1)
    assert "slower than the recorded run: squeezenet1_1 batch 1 (" in result.stderr
    monkeypatch.setattr(fastconv, "optimize", optimize)
    bench("--compare", str(old), "--threshold", "900")  # the machine's own drift is far below tenfold


def recorded(*fast_ms, eager_ms=4.0, width=0.0):
    cells = []
    for batch, ms in enumerate(fast_ms, 1):
        ratio = {"median": eager_ms / ms, "low": eager_ms / ms * (1 - width), "high": eager_ms / ms * (1 + width)}
        cells.append(
            dict(network="net", batch=batch, size=224, threads=1, dtype="float32", ratios={"eager_channels_last": ratio})
            | dict(engines={"fastconv": {"median_ms": ms, "q1_ms": ms, "q3_ms": ms}})
        )
    return {"schema": 1, "cells": cells}


def test_compare_finds_what_got_slower_and_only_that():
    rows = compare.compare(recorded(1.0, 2.0, 4.0), recorded(1.04, 2.2, 3.0), 0.05)
    assert [round(row["change"], 2) for row in rows] == [1.04, 1.1, 0.75]
    assert [row["slower"] for row in rows] == [False, True, False]
    # a machine that is slower for everybody, and a change within the intervals
    assert not any(row["slower"] for row in compare.compare(recorded(1.0), recorded(1.2, eager_ms=4.8), 0.05))
    assert not any(row["slower"] for row in compare.compare(recorded(1.0, width=0.1), recorded(1.1, width=0.1), 0.05))
    with pytest.raises(ValueError, match="no cell in common"):
        compare.compare(recorded(1.0), {"schema": 1, "cells": []}, 0.05)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "is no run of"), ('{"schema": 2}', "is no run of")])
def test_compare_refuses_what_is_no_run(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_text(text)
    assert message in bench("--compare", str(path), code=1).stderr


def spin():
    while True:
        pass


def test_a_spinning_neighbour_is_detected():
    process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    process.start()
    try:
        time.sleep(0.5)  # its start is not its spin
        with measure.Noise() as noise:
            measure.interleave({"fastconv": lambda: sum(range(10_000))}, 20)
    finally:
        process.kill()
        process.join()
    verdict = noise.verdict([])
    assert verdict["neighbour_percent"] > 50
    assert not verdict["quiet"]
    assert any("other processes took" in reason for reason in verdict["reasons"])


def test_steal_and_spread_make_a_run_noisy_and_a_steady_one_is_quiet():
    cores = os.cpu_count() or 1
    noise = measure.Noise()
    noise.elapsed, noise.start, noise.end = 10.0, (0.0, 0.0, 0.0), (5.0, 0.5 * cores, 5.0)
    verdict = noise.verdict([0.3, 0.5, 0.7])
    assert verdict["steal_percent"] == pytest.approx(5)
    assert verdict["spread_percent"] == pytest.approx(50)
    assert verdict["neighbour_percent"] == 0
    assert len(verdict["reasons"]) == 2
    noise.end = (5.0, 0.0, 5.0)
    assert noise.verdict([0.01, 0.02]) == dict(steal_percent=0, neighbour_percent=0, spread_percent=1.5, quiet=True, reasons=[])


def test_the_pools_of_other_engines_may_fall_asleep_first():
    def use(seconds):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def waited(busy):
        spinner = threading.Thread(target=use, args=(busy,))
        spinner.start()
        start = time.perf_counter()
        measure.settle()
        seconds = time.perf_counter() - start
        spinner.join()
        return seconds

    for busy, least, most in ((0.06, 0.04, 1.0), (0.6, 0.1, 0.5)):  # it waits for the first, and gives up on the second
        # A busy machine may leave the spinner no core for the while that is looked at.
        assert any(least < waited(busy) < most for _ in range(5))


def test_intervals_hold_the_truth():
    """Of a ratio that is 1.3 in truth, under noise of 5%, in about 95 of 100 runs of 15 rounds."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        ours = random.lognormal(0, 0.05, 15)
        interval = measure.ratio(list(1.3 * random.lognormal(0, 0.05, 15)), list(ours), 500)
        assert interval["low"] <= interval["median"] <= interval["high"]
        held += interval["low"] <= 1.3 <= interval["high"]
    assert 175 <= held <= 199


def test_drift_that_hits_all_engines_cancels():
    drift = np.linspace(1, 3, 15)
    interval = measure.ratio(list(2.0 * drift), list(drift))
    assert interval == pytest.approx({"median": 2, "low": 2, "high": 2})


def test_the_order_rotates_so_that_every_engine_follows_every_other():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or time.sleep(0.011) for name in "abc"}
    measure.interleave(runs, 3)
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name][3:]  # after the warm-up
    assert "".join(turns) == "abcbcacab"


def test_the_document_has_what_report_and_compare_read(tmp_path):
    document = json.loads(bench("--json", "-").stdout)
    assert document["schema"] == 1
    assert set(document) >= {"kind", "date", "command", "title", "machine", "noise", "roofline", "cells", "layers", "scaling", "claims"}
    assert set(document["noise"]) == {"steal_percent", "neighbour_percent", "spread_percent", "quiet", "reasons"}
    [row] = document["cells"]
    assert set(row) == {"network", "batch", "size", "threads", "dtype", "engines", "ratios", "best_peer", "missing"}
    fast = row["engines"]["fastconv"]
    assert fast["relative_error"] <= 1e-5
    assert len(fast["samples_ms"]) == 3
    assert fast["min_ms"] <= fast["q1_ms"] <= fast["median_ms"] <= fast["q3_ms"]
    assert row["best_peer"] == min(row["ratios"], key=lambda engine: row["ratios"][engine]["median"])
    assert document["machine"]["versions"]["torch"] == torch.__version__


def test_a_run_with_everything_writes_its_folder(tmp_path):
    arguments = ("--out", str(tmp_path / "run"), "--layers", "--cold", "--cache", str(tmp_path / "cache"), "--engines", "fastconv,eager")
    bench(*arguments)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "report.html", "roofline.png"} <= names
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert document["layers"]
    assert document["cells"][0]["engines"]["fastconv"]["first_result_s"] > 0
    assert document["cells"][0]["engines"]["fastconv"]["peak_memory_mb"] > 0
    assert document["cells"][0]["engines"]["fastconv"]["disk_bytes"] > 4e6
    bench("--compare", str(tmp_path / "run" / "run.json"), "--threshold", "900", "--engines", "fastconv,eager")


def test_the_machine_block_survives_without_git(monkeypatch):
    monkeypatch.setattr(machine, "_git", lambda *arguments: None)
    block = machine.block()
    assert block["commit"] is None
    assert block["dirty"] is None
