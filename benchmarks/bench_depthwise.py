"""depthwise beside plain torch, on every shape that the six networks have of it."""

from fastconv.benchmarks.suite import Row, over_shapes


@over_shapes("depthwise")
def test_depthwise(row: Row, time_row) -> None:
    time_row(row)
