"""What `make gpu` runs: `python benchmarks/gpu_all.py --out DIR [--minutes 8.5]`, tests and benchmarks within one budget.

1. Kernels are compiled in several processes (warm.py), at most a fifth of the time.
2. The GPU tests (pytest -m gpu tests/gpu), at most half of what is left, in several processes where pytest-xdist is installed: stopped
   then, which counts as a failure; pytest still names what failed until then.
3. Whole networks (gpu_networks.py), at most half of what is left.
4. Blocks and layers (gpu.py), what is left then, if that is more than 20 s.

Each says itself what it leaves out when its time is short. Everything printed is kept in DIR/gpu.log; DIR/summary.json has each part's
exit status and seconds. Exits with 1 if a part failed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEAST = 20.0  # seconds that a part is worth starting for
GRACE = 20.0  # a benchmark ends by itself; one that does not is stopped
SUMMARY = 5.0  # that pytest has to print its summary once it is interrupted
PROCESSES = 8  # of pytest-xdist, on one GPU


def commands(out: Path) -> list[tuple[str, float, Callable[[float], list[str]]]]:
    """(part, share of the time left, its command given seconds)."""

    def script(name: str, *options: str) -> Callable[[float], list[str]]:
        return lambda seconds: [sys.executable, str(HERE / name), *options, "--out", str(out), "--minutes", f"{seconds / 60:.3f}"]

    tests = [sys.executable, "-m", "pytest", "-m", "gpu", str(HERE.parent / "tests" / "gpu"), "-q"]
    processes = min(PROCESSES, os.cpu_count() or 1)
    if find_spec("xdist") and processes > 1:
        tests += ["-n", str(processes), "--dist", "loadgroup"]
    return [
        ("warm", 0.2, script("warm.py")),
        ("tests", 0.5, lambda seconds: tests),
        ("networks", 0.5, script("gpu_networks.py")),
        ("blocks", 1.0, script("gpu.py", "--warm", "0")),
    ]


def run_all(parts: list[tuple[str, float, Callable[[float], list[str]]]], seconds: float, out: Path) -> list[dict]:
    """Runs the parts one after the other; returns {"part", "status", "seconds"} of each: 0, its exit status, "stopped" or "no time"."""
    end = time.monotonic() + seconds
    summary = []
    with (out / "gpu.log").open("w") as log:
        for part, share, command in parts:
            mine = share * (end - time.monotonic())
            if part != "tests":
                mine -= GRACE / 2  # starting up, and what a last measurement runs over
            began = time.monotonic()
            if mine < LEAST:
                status: int | str = "no time"
            else:
                status = _run(command(mine), mine if part == "tests" else mine + GRACE, log)
            summary.append({"part": part, "status": status, "seconds": round(time.monotonic() - began, 1)})
            (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def environment(command: list[str]) -> dict[str, str]:
    """Of a part: several processes of pytest-xdist share the cores, and threads that wait for each other leave them to others."""
    if "-n" not in command:
        return dict(os.environ)
    threads = max(1, (os.cpu_count() or 1) // int(command[command.index("-n") + 1]))
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"} | os.environ


def _run(command: list[str], limit: float, log) -> int | str:
    """The command's exit status, or "stopped"; its output goes to the log and to ours."""
    print(f"$ {' '.join(command)}", flush=True)
    mark = log.tell()
    options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment(command), "start_new_session": True}
    child = subprocess.Popen(command, **options, preexec_fn=_heeds_interrupts)
    try:
        status: int | str = child.wait(limit)
    except subprocess.TimeoutExpired:
        status = "stopped"
        _interrupt(child)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it has started, too
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    print(Path(log.name).read_text()[mark:], flush=True)
    log.seek(0, 2)
    return status


def _heeds_interrupts() -> None:
    """Before the command runs: where a shell runs us in the background, it would inherit that they are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(child: subprocess.Popen) -> None:
    """Has pytest print what failed until now; pytest-xdist would first wait for its processes, 10 s and more, so these are ended."""
    child.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(SUMMARY / 5)
        return
    with contextlib.suppress(OSError):  # no such file without Linux's list of children
        for process in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split():
            os.kill(int(process), signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(SUMMARY)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for everything")
    parser.add_argument("--minutes", type=float, default=8.5, help="time to spend in all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    summary = run_all(commands(options.out), 60 * options.minutes, options.out)
    for row in summary:
        print(f"{row['part']:10s} {row['status']} in {row['seconds']} s")
    return 0 if all(row["status"] == 0 for row in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
