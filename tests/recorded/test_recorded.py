"""The library gives today what was recorded: the same masks after each step, the same weights at the end."""

from __future__ import annotations

import pytest

from tests.recorded.records import compare, load
from tests.recorded.runs import RUNS


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_as_recorded(name: str) -> None:
    assert compare(name) == []


def test_every_record_has_its_run() -> None:
    assert load().keys() == RUNS.keys()
