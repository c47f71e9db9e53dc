"""benchmarks/gpu_networks.py and gpu_all.py without a GPU: a whole run on the CPU with small images, the budgets, the report."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastconv.benchmarks import gpu_all, gpu_networks


class Cpu(gpu_networks.Device):
    name = "cpu"

    def synchronize(self):
        pass

    def memory_begin(self):
        return 0

    def memory_peak(self):
        return 2**20


def bench(seconds=600.0):
    return gpu_networks.Bench(seconds, Cpu(), size=32, dtype=torch.float32)


@pytest.fixture
def quick(monkeypatch):
    """Two engines, samples of a millisecond."""
    monkeypatch.setattr(gpu_networks, "QUICK", ("fastconv", "fastconv_no_graphs", "eager_channels_last", "eager_cudagraphs"))
    turns = gpu_networks.turns
    monkeypatch.setattr(gpu_networks, "turns", lambda runs, rounds, device, wait: turns(runs, 3, device, wait, seconds=0.001))


def test_a_run_and_its_report(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_networks, "SLOW", ())
    monkeypatch.setattr(gpu_networks.Bench, "first_result", lambda self, name: self.first.append({"network": name, "fastconv": 1.5}))
    run = bench()
    run.run(("squeezenet1_1", "mobilenet_v3_small"), (1,), (3,))
    assert [(cell["network"], cell["batch"]) for cell in run.cells] == [
        *(("squeezenet1_1", 1), ("mobilenet_v3_small", 1)),
        *(("squeezenet1_1", 3), ("mobilenet_v3_small", 3)),
    ]
    for cell in run.cells:
        assert cell["engines"].keys() == {"fastconv", "fastconv_no_graphs", "eager_channels_last"}
        assert cell["ratios"].keys() == {"eager_channels_last"}  # ourselves without graphs are no rival
        assert "eager_cudagraphs" in cell["missing"]  # there is no CUDA here
        assert 0 < cell["engines"]["fastconv"]["relative_error"] < 1e-5
        assert len(cell["engines"]["fastconv"]["samples_ms"]) == 3
    assert not run.wrong
    document = run.document()
    assert document["target"]["reached"] == {"squeezenet1_1": None, "mobilenet_v3_small": None}
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    paths = {path.name for path in gpu_networks.write(document, tmp_path)}
    assert {"networks.json", "networks.txt", "report.html"} < paths
    page = (tmp_path / "report.html").read_text()
    assert "SqueezeNet 1.1" in page
    assert "eager + CUDA graphs" in page
    assert "1.5" in page
    assert json.loads((tmp_path / "networks.json").read_text())["schema"] == 1
    assert "not measured" in (tmp_path / "networks.txt").read_text()


def test_a_wrong_engine_is_not_timed(quick, monkeypatch):
    build = gpu_networks.build
    wrong = {"fastconv": lambda y: y + 1, "eager_channels_last": lambda y: y * float("nan")}
    monkeypatch.setattr(
        gpu_networks, "build", lambda engine, model, x: lambda x: wrong.get(engine, lambda y: y)(build(engine, model, x)(x))
    )
    run = bench()
    run.cell("squeezenet1_1", 1, ("fastconv", "fastconv_no_graphs", "eager_channels_last"))
    (cell,) = run.cells
    assert cell["engines"].keys() == {"fastconv_no_graphs"}
    assert cell["missing"].keys() == {"fastconv", "eager_channels_last"}
    assert "ArithmeticError" in run.wrong[0]
    assert len(run.wrong) == 1  # a wrong rival is no failure of ours
    assert cell["best_peer"] is None


def test_a_slow_engine_joins_the_cell_that_stands(monkeypatch):
    monkeypatch.setattr(gpu_networks, "turns", lambda runs, rounds, device, wait: {name: [float(len(name))] * 3 for name in runs})
    monkeypatch.setattr(gpu_networks, "build", lambda engine, model, x: gpu_networks.eager_form(model))
    run = bench()
    run.cell("squeezenet1_1", 1, ("fastconv", "eager_cudagraphs"))
    run.cell("squeezenet1_1", 1, ("fastconv", "compile_reduce_overhead"))
    (cell,) = run.cells
    assert cell["engines"].keys() == {"fastconv", "eager_cudagraphs", "compile_reduce_overhead"}
    assert cell["best_peer"] == "eager_cudagraphs"
    assert gpu_networks.target(run.cells)["reached"] == {"squeezenet1_1": pytest.approx(len("eager_cudagraphs") / len("fastconv"))}


def test_what_is_left_out_when_time_is_short(monkeypatch):
    """The order that the module's head states: each step takes 10 s of a clock that only steps move."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    done = []

    def step(self, *what):
        done.append(what)
        now[0] += 10

    monkeypatch.setattr(gpu_networks.Bench, "cell", step)
    monkeypatch.setattr(gpu_networks.Bench, "first_result", step)
    run = gpu_networks.Bench(115, Cpu())
    run.run(("a", "b"))
    assert done[:6] == [*((name, batch, gpu_networks.QUICK) for name in ("a", "b") for batch in (1, 8)), ("a",), ("b",)]
    assert [what[:2] for what in done[6:]] == [("a", 32), ("b", 32), ("a", 128), ("b", 128), ("a", 256)]  # b 256 would end at 120 s
    assert run.left_out[:3] == ["b batch 256", "a batch 512", "b batch 512"]
    assert run.left_out[3:] == [f"{name} batch {batch} {engine}" for engine in gpu_networks.SLOW for batch in (1, 8) for name in ("a", "b")]
    assert now[0] <= 115


def test_waits_after_each_call_for_latency_only():
    class Counting(Cpu):
        waits = 0

        def synchronize(self):
            self.waits += 1

    calls = []
    for wait in (True, False):
        device = Counting()
        calls.clear()
        samples = gpu_networks.turns({"x": lambda: calls.append(1) or time.sleep(0.001)}, 2, device, wait, seconds=0.005)
        assert len(samples["x"]) == 2
        assert all(0.9 < sample < 50 for sample in samples["x"])
        assert (device.waits >= len(calls)) is wait


def test_first_result_in_a_fresh_process(monkeypatch):
    run = bench()
    run.first_result("squeezenet1_1")
    (row,) = run.first
    assert row.keys() == {"network", "fastconv, empty cache", "fastconv", "eager_channels_last"}
    assert all(0 < row[name] < 60 for name in row if name != "network")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_networks.py", "--out", str(tmp_path / "out")])
    assert gpu_networks.main() == 0
    assert "nothing was run" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def part(code):
    return lambda seconds: [sys.executable, "-c", code]


def test_all_parts_within_one_budget(tmp_path, monkeypatch):
    """A part that hangs is stopped, one that fails is told, and what follows still runs while there is time."""
    monkeypatch.setattr(gpu_all, "LEAST", 0.5)
    monkeypatch.setattr(gpu_all, "GRACE", 0.5)
    asked = []

    def last(seconds):
        asked.append(seconds)
        return part("print('the end')")(seconds)

    parts = [("tests", 0.4, part("import time; print('began', flush=True); time.sleep(60)"))]
    parts += [("networks", 0.5, part("print('broken'); raise SystemExit(3)")), ("blocks", 1.0, last)]
    began = time.monotonic()
    summary = gpu_all.run_all(parts, 5.0, tmp_path)
    assert time.monotonic() - began < 15  # of what would take 60; a busy machine starts processes slowly
    assert [row["status"] for row in summary] == ["stopped", 3, 0]
    assert 0.5 < asked[0] < 3
    text = (tmp_path / "gpu.log").read_text()
    found = [text.index(word) for word in ("began", "broken", "the end")]
    assert found == sorted(found)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert [row["status"] for row in gpu_all.run_all(parts[1:], 0.4, tmp_path)] == ["no time", "no time"]


def test_the_parts_exist(tmp_path):
    assert [name for name, *_ in gpu_all.commands(tmp_path)] == ["warm", "tests", "networks", "blocks"]
    for name, _, command in gpu_all.commands(tmp_path):
        words = command(90.0)
        assert Path(words[1] if name != "tests" else words[5]).exists()
        assert name == "tests" or words[-2:] == ["--minutes", "1.500"]
        if name != "tests":
            help_of_it = subprocess.run([*words, "--help"], capture_output=True, text=True, check=True).stdout
            assert all(word in help_of_it for word in words if word.startswith("--"))


@pytest.mark.parametrize("installed", [True, False])
def test_tests_in_several_processes(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_all, "find_spec", lambda name: installed)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    command = next(command(90.0) for name, _, command in gpu_all.commands(tmp_path) if name == "tests")
    assert (command[-4:] == ["-n", "8", "--dist", "loadgroup"]) is installed
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert gpu_all.environment(command).get("OMP_NUM_THREADS") == ("2" if installed else None)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    command = next(command(90.0) for name, _, command in gpu_all.commands(tmp_path) if name == "tests")
    assert "-n" not in command


STOPPED = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs these tests may have it ignored
started = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"])
print("began", started.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    {then}
    print("summary", flush=True)
"""
THEN = {"prints": "pass", "waits for its processes": "started.wait()", "hangs": "time.sleep(60)"}


@pytest.mark.parametrize("then", THEN)
def test_a_part_that_is_stopped_may_print_its_summary(then, tmp_path, monkeypatch):
    """It is interrupted first, and nothing that it started goes on."""
    monkeypatch.setattr(gpu_all, "SUMMARY", 2.5)
    began = time.monotonic()
    with (tmp_path / "log").open("w+") as log:
        assert gpu_all._run([sys.executable, "-c", STOPPED.format(then=THEN[then])], 1.0, log) == "stopped"
    assert time.monotonic() - began < 6
    text = (tmp_path / "log").read_text()
    assert ("summary" in text) == (then != "hangs")
    started = int(text.split()[1])
    while _lives(started):
        assert time.monotonic() - began < 10
        time.sleep(0.02)


def _lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
def test_pytest_names_what_failed_before_it_was_stopped(tmp_path):
    (tmp_path / "test_it.py").write_text("import time\ndef test_a(): assert 1 == 2, 'a reason'\ndef test_b(): time.sleep(60)\n")
    with (tmp_path / "log").open("w+") as log:
        assert gpu_all._run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)], 12.0, log) == "stopped"
    assert "AssertionError: a reason" in (tmp_path / "log").read_text()
