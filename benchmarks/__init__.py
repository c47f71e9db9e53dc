"""fastconv as a benchmark suite: operators, whole networks beside other engines, and the report."""
