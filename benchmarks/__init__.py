"""The benchmark suite: fastconv beside every engine that a user could pick instead."""
