"""Measurements behind every figure that the project states, each one a command: ``python -m posteriori.bench.NAME``."""
