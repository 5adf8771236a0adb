from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sparse.masks.memory import overlapping


def places_of(tensor: Tensor) -> set[int]:
    """The obvious way: the address of each entry."""
    return {entry.data_ptr() for entry in tensor.reshape(-1).unbind()} if tensor.is_contiguous() else _by_index(tensor)


def _by_index(tensor: Tensor) -> set[int]:
    indices = torch.cartesian_prod(*(torch.arange(size) for size in tensor.shape)).reshape(-1, tensor.dim())
    return {tensor[tuple(index.tolist())].data_ptr() for index in indices}


slices = st.builds(slice, st.integers(0, 3), st.integers(4, 6), st.integers(1, 3))


@given(rows=st.tuples(slices, slices), columns=st.tuples(slices, slices), transposed=st.booleans())
def test_views_overlap_where_they_have_an_entry_in_common(
    rows: tuple[slice, slice], columns: tuple[slice, slice], transposed: bool
) -> None:
    whole = torch.zeros(6, 6)
    first, second = (whole[row, column] for row, column in zip(rows, columns, strict=True))
    second = second.t() if transposed else second
    assert bool(overlapping([first, second])) == bool(places_of(first) & places_of(second))


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros(3), torch.zeros(3)],
        list(torch.zeros(4, 3).unbind()),
        [torch.empty(0), torch.empty(0)],
        [torch.zeros(3, device="meta"), torch.zeros(3, device="meta")],
    ],
)
def test_tensors_of_their_own_do_not_overlap(tensors: list[Tensor]) -> None:
    assert not overlapping(tensors)


def test_views_of_other_types_overlap_with_what_they_view() -> None:
    whole = torch.zeros(4)
    assert overlapping([whole, whole.view(torch.float16)]) == [(0, 1)]
    assert overlapping([whole, whole.view(torch.int32)]) == [(0, 1)]


def test_the_weights_of_a_recurrent_layer_divide_their_memory() -> None:
    flat = torch.zeros(24)
    assert not overlapping([part.view(4, 2) for part in flat.split(8)])
    assert not overlapping([parameter.detach() for parameter in nn.LSTM(3, 4).parameters()])
