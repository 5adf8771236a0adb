"""Killed by SIGKILL at random moments and gone on with: the end is that of a training that was never killed."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING

import pytest

from tests.crashes.training import TRAININGS, crash, differences, undisturbed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork, and has no SIGKILL")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_killed_at_random_moments_is_never_killed(name: str, tmp_path: Path) -> None:
    whole = undisturbed(name, tmp_path / "whole")
    killed = crash(name, tmp_path / "killed", 3, whole.seconds, random.Random(name))
    assert differences(whole.final, killed.final) == []


def test_a_difference_is_found(tmp_path: Path) -> None:
    final = undisturbed("RigL and GMP", tmp_path).final
    other = {**final, "state_dict": {name: value + 1 for name, value in final["state_dict"].items()}}
    assert len(differences(final, other)) == len(final["state_dict"])
    assert differences(final, final) == []
