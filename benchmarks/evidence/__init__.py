"""Compares the methods with each other and with simple baselines: see :mod:`benchmarks.evidence.__main__`."""
