"""benchmarks/warm.py without a GPU: which jobs there are, and what becomes of those that fail, crash or take too long.

That the jobs compile all that is timed is checked in tests/gpu/test_launch.py.
"""

import os
import pickle
import sys
import time
from functools import partial

import pytest
import torch

from fastconv.benchmarks import blocks, tuner, warm
from fastconv.kernels.gpu import configs


def job(name, run, *compiles):
    return warm.Job(name, frozenset((kernel,) for kernel in compiles or [name]), run)


def test_duplicates_are_left_out():
    jobs = [job("a", len, 1, 2), job("b", len, 2), job("c", len, 2, 3), job("d", len, 3, 1)]
    assert [kept.name for kept in warm.distinct(jobs)] == ["a", "c"]


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_the_jobs(arch):
    """Every form of every block, once each; sizes make no difference, what kernels are compiled for does."""
    jobs = warm.everything(arch)
    names = {job.name for job in jobs}
    for block in blocks.blocks("bf16"):
        for form in tuner.forms(block.problem, arch):
            assert form == configs.ATEN or f"{block.problem.op} {block.shape} bf16 {configs.text(form)}" in names
    kept = warm.distinct(jobs)
    assert len(kept) < len(jobs) / 2
    assert set().union(*(job.compiles for job in kept)) == set().union(*(job.compiles for job in jobs))
    assert pickle.loads(pickle.dumps(kept)) is not None


def test_what_decides_a_kernels_code():
    problem = configs.Problem("separable", "bf16", 56, 56, 32, 64, 3, (1, 1), (1, 1))
    block = blocks.Block("net", "layer", 1, problem, "relu6")
    tile = configs.TABLES["separable"]["sm_90"]["half"][0]

    def kernels(tile=tile, residual=False, activation="relu6", **changes):
        changed = blocks.Block("net", "layer", 1, blocks.replace(problem, **changes), activation, residual)
        return warm.compiles(changed, tile, "sm_90")

    same = warm.compiles(block, tile, "sm_90")
    assert kernels(height=28, width=28) == kernels(in_channels=48) == kernels(out_channels=96) == same
    others = [{"kernel": 5}, {"stride": (2, 2)}, {"in_channels": 24}, {"out_channels": 72}, {"dtype": "f16"}]
    others += [{"residual": True}, {"activation": "silu"}, {"tile": configs.TABLES["separable"]["sm_90"]["half"][1]}, {"tile": None}]
    found = [kernels(**other) for other in others]
    assert len({same, *found}) == 1 + len(others)


def test_jobs_that_fail_or_crash_are_named():
    jobs = [job(f"fine {number}", partial(int, "1")) for number in range(6)]
    jobs[2:2] = [job("wrong", partial(int, "no number")), job("crash", partial(os._exit, 3))]
    report = warm.warm(jobs, 60, workers=2)
    assert (report.done, report.left) == (6, 0)
    assert sorted(failure.split(":")[0] for failure in report.failures) == ["crash", "wrong"]
    assert any(failure == "crash: its process ended with 3" for failure in report.failures)
    assert any("ValueError" in failure and "no number" in failure for failure in report.failures)
    assert "FAILED crash" in str(report)


def test_it_ends_when_the_time_is_up():
    began = time.monotonic()
    report = warm.warm([job(f"long {number}", partial(time.sleep, 60)) for number in range(5)], 0.5, workers=2)
    assert time.monotonic() - began < 10
    assert (report.done, report.left, report.failures) == (0, 5, [])
    assert "5 left" in str(report)


def test_processes_that_cannot_start_are_given_up(monkeypatch):
    monkeypatch.setattr(warm, "_work", partial(os._exit, 5))
    report = warm.warm([job(str(number), partial(int, "1")) for number in range(50)], 60, workers=2)
    assert (report.done, report.left) == (0, 50)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_does_nothing(monkeypatch, capsys):
    monkeypatch.setattr(warm.multiprocessing, "get_context", lambda kind: pytest.fail("a process was started"))
    report = warm.warm([job("a", len)], 60)
    assert (report.done, report.left, report.failures) == (0, 0, [])
    monkeypatch.setattr(sys, "argv", ["warm.py"])
    assert warm.main() == 0
    assert "nothing was compiled" in capsys.readouterr().out


@pytest.mark.parametrize(("cores", "wanted"), [(1, 0), (2, 0), (3, 2), (8, 7), (64, 15)])
def test_how_many_processes(cores, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    assert warm.available() == wanted
