"""Benchmarks: speed relative to dense training, and the accuracy that the methods reach."""
