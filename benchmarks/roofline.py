"""The machine's roofs, measured in the same run as what is compared with them."""

from typing import Any

from fastconv.optimize.profile import roofs


def measure() -> dict[str, Any]:
    """One core's fused multiply-add peak on every instruction set that this CPU has, and its read bandwidth at each level of memory:
    {"isa": {name: {"fma_gflops": f}}, "bandwidth_gbs": {"L1", "L2", "L3", "DRAM"}, "bytes": {...}, "threads": 1}.

    The peak is 14 independent chains of fused multiply-adds; bandwidth is the best of many sums over a working set of that level's size.
    Raises RuntimeError without the compiled extension.
    """
    first = roofs()
    from fastconv import _C

    active = _C.isa()
    peaks = {}
    try:
        for isa in _C.isas():
            _C.set_isa(isa)
            peaks[isa] = {"fma_gflops": max(_C.fma_gflops() for _ in range(4))}
    finally:
        _C.set_isa(active)
    return {"isa": peaks, "bandwidth_gbs": first["bandwidth_gbs"], "bytes": first["bytes"], "threads": 1}
