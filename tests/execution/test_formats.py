"""Packed weights are the weights: row by row, turned, and in slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_sparse.execution.formats import balanced_blocks, pack


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(0, 40)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    mask = torch.rand(rows, columns, generator=generator) >= draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    return torch.randn(rows, columns, generator=generator) * mask


@given(weights())
def test_packing_loses_nothing(weight: Tensor) -> None:
    packed = pack(weight)
    assert torch.equal(packed.dense(), weight)
    assert packed.num_active == torch.count_nonzero(weight)


@given(weights())
def test_transposing_twice_gives_the_same_rows(weight: Tensor) -> None:
    packed = pack(weight)
    assert torch.equal(packed.transposed().dense(), weight.t())
    assert torch.equal(packed.transposed().transposed().dense(), weight)


@given(weights(), st.sampled_from([2, 4, 16]))
def test_slices_multiply_as_the_matrix_does(weight: Tensor, lanes: int) -> None:
    sell, x = pack(weight).sell(lanes), np.arange(1.0, weight.shape[1] + 1)
    y = np.zeros(len(weight))
    for number, (begin, end) in enumerate(zip(sell.slices, sell.slices[1:], strict=False)):
        sums = (sell.values[begin:end] * x[sell.columns[begin:end]]).sum(0)
        order = sell.order[number * lanes : (number + 1) * lanes]
        y[order[order >= 0]] = sums[order >= 0]
    np.testing.assert_allclose(y, weight.double().numpy() @ x, atol=1e-4)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 5))
def test_blocks_cover_all_rows_in_order(counts: list[int], num_blocks: int) -> None:
    blocks = balanced_blocks(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), num_blocks)
    assert blocks[0] == 0
    assert blocks[-1] == len(counts)
    assert (np.diff(blocks) >= 0).all()


def test_what_is_not_a_number_is_kept() -> None:
    assert pack(torch.tensor([[float("nan"), 0.0]])).num_active == 1


def test_wide_matrices_have_wide_columns() -> None:
    assert pack(torch.eye(1, 65536)).sell(4).columns.dtype == np.uint16
    assert pack(torch.eye(1, 65537)).sell(4).columns.dtype == np.int32


def test_sparse_tensors_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="to_dense"):
        pack(torch.eye(2).to_sparse())
