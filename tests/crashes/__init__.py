"""Trainings that are killed at random moments, gone on with from their last checkpoint, and never killed: all equal.

``python -m tests.crashes`` kills a hundred times; :mod:`tests.crashes.test_crashes` a few.
"""
