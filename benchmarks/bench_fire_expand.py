"""fire_expand beside plain torch, on every shape that the six networks have of it."""

from fastconv.benchmarks.suite import Row, over_shapes


@over_shapes("fire_expand")
def test_fire_expand(row: Row, time_row) -> None:
    time_row(row)
