"""Every method beside every other and beside what costs nothing: see :mod:`benchmarks.evidence.__main__`."""
