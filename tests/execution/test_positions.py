from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_sparse.execution.positions import bitmask_of, gaps_nbytes, gaps_of, iterate_bitmask, iterate_gaps

TOP = {1: 255, 2: 65535}


def slow_gaps(positions: list[int], numel: int, width: int) -> list[int]:
    """One place after the other."""
    gaps, skipped = [], 0
    for place in range(numel + 1):
        if place == numel or place in positions:
            gaps.append(skipped)
            skipped = 0
        else:
            skipped += 1
            if skipped == TOP[width]:
                gaps.append(skipped)
                skipped = 0
    return gaps


def joined(parts: object) -> list[int]:
    return [position for part in parts for position in part.tolist()]  # pyright: ignore


@st.composite
def places(draw: st.DrawFn) -> tuple[list[int], int]:
    numel = draw(st.integers(0, 1500))
    chosen = draw(st.sets(st.integers(0, max(numel - 1, 0)), max_size=20)) if numel else set()
    return sorted(chosen), numel


@given(places(), st.sampled_from([1, 2]))
def test_gaps_are_those_of_a_walk_and_lead_back(case: tuple[list[int], int], width: int) -> None:
    positions, numel = case
    gaps = gaps_of(torch.tensor(positions, dtype=torch.int64), numel, width)
    assert gaps.tolist() == slow_gaps(positions, numel, width)
    assert gaps.nbytes == gaps_nbytes(torch.tensor(positions, dtype=torch.int64), numel, width)
    assert joined(iterate_gaps(gaps, numel, len(positions))) == positions


@given(places())
def test_bits_lead_back(case: tuple[list[int], int]) -> None:
    positions, numel = case
    bits = bitmask_of(torch.tensor(positions, dtype=torch.int64), numel)
    assert len(bits) == -(-numel // 8)
    assert joined(iterate_bitmask(bits, numel, len(positions))) == positions


@pytest.mark.parametrize("width", [1, 2])
def test_more_positions_than_are_decoded_at_once(width: int) -> None:
    positions = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(3_000_000) < 0.1))
    numel = 3_000_100
    parts = iterate_gaps(gaps_of(positions, numel, width), numel, len(positions))
    assert torch.equal(torch.cat([part.clone() for part in parts]), positions)
    parts = iterate_bitmask(bitmask_of(positions, numel), numel, len(positions))
    assert torch.equal(torch.cat([part.clone() for part in parts]), positions)


def u8(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(
    "gaps",
    [u8(), u8(0, 2, 0), u8(0, 2, 0, 2), u8(0, 2, 1, 1), u8(255, 0, 2, 0, 1), u8(0, 2, 0, 1, 255), u8(0, 5)],
    ids=["none", "no end", "too long", "a place more", "bridged", "ends on a bridge", "a place fewer"],
)
def test_gaps_that_lead_elsewhere_are_refused(gaps: Tensor) -> None:
    assert joined(iterate_gaps(u8(0, 2, 0, 1), 6, 3)) == [0, 3, 4]
    with pytest.raises(ValueError, match=r"gaps lead to place|positions and 3 values|gaps end"):
        iterate_gaps(gaps, 6, 3)


@pytest.mark.parametrize("bits", [u8(9), u8(9, 1, 0), u8(9, 3), u8(9, 0), u8(11, 1)])
def test_bits_that_do_not_fit_are_refused(bits: Tensor) -> None:
    assert joined(iterate_bitmask(u8(9, 1), 9, 3)) == [0, 3, 8]
    with pytest.raises(ValueError, match=r"bitmask|positions and 3 values"):
        iterate_bitmask(bits, 9, 3)
