"""fire beside plain torch, on every shape that the six networks have of it."""

from fastconv.benchmarks.suite import Row, over_shapes


@over_shapes("fire")
def test_fire(row: Row, time_row) -> None:
    time_row(row)
