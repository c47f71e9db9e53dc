"""What `make gpu` runs: `python benchmarks/gpu_all.py --out DIR [--minutes 8.5]`, tests and benchmarks within one budget.

1. The GPU tests (pytest -m gpu tests/gpu), at most half of the time: stopped then, which counts as a failure.
2. Whole networks (gpu_networks.py), at most half of what is left.
3. Blocks and layers (gpu.py), what is left then, if that is more than 20 s.

Each says itself what it leaves out when its time is short. Everything printed is kept in DIR/gpu.log; DIR/summary.json has each part's
exit status and seconds. Exits with 1 if a part failed.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEAST = 20.0  # seconds that a part is worth starting for
GRACE = 20.0  # a benchmark ends by itself; one that does not is stopped


def commands(out: Path) -> list[tuple[str, float, Callable[[float], list[str]]]]:
    """(part, share of the time left, its command given seconds)."""

    def script(name: str) -> Callable[[float], list[str]]:
        return lambda seconds: [sys.executable, str(HERE / name), "--out", str(out), "--minutes", f"{seconds / 60:.3f}"]

    tests = [sys.executable, "-m", "pytest", "-m", "gpu", str(HERE.parent / "tests" / "gpu"), "-q"]
    return [("tests", 0.5, lambda seconds: tests), ("networks", 0.5, script("gpu_networks.py")), ("blocks", 1.0, script("gpu.py"))]


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


def _run(command: list[str], limit: float, log) -> int | str:
    """The command's exit status, or "stopped"; its output goes to the log and to ours."""
    print(f"$ {' '.join(command)}", flush=True)
    mark = log.tell()
    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        status: int | str = child.wait(limit)
    except subprocess.TimeoutExpired:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        status = "stopped"
    print(Path(log.name).read_text()[mark:], flush=True)
    log.seek(0, 2)
    return status


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
