"""Masks and weights of toy runs, recorded: what a change of the insides must reproduce.

``python -m tests.recorded`` records anew, ``python -m tests.recorded --compare`` tells what differs.
"""

from __future__ import annotations
