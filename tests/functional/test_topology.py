from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_sparse.functional.masks import pack
from lightning_sparse.functional.topology import (
    count_active,
    count_bits,
    count_changed,
    count_dead,
    dead_neurons,
    exploration_rate,
    mask_change,
    sparsity,
)


def mask(*rows: str) -> Tensor:
    """``mask("10", "00")``: a row of ones and zeros for each neuron."""
    return torch.tensor([[entry == "1" for entry in row] for row in rows])


#                first layer      second layer
BEFORE = [mask("110", "000"), mask("11")]  # 4 of 8 active
AFTER_ = [mask("011", "000"), mask("01")]  # 3 of 8 active; 2 + 1 entries changed


def test_sparsity_weighs_layers_by_their_size() -> None:
    assert sparsity(BEFORE) == 4 / 8
    assert sparsity(AFTER_) == 5 / 8


def test_a_move_is_two_changed_entries() -> None:
    assert mask_change(BEFORE, AFTER_) == 3 / 8


def test_equal_masks_have_not_changed() -> None:
    assert mask_change(BEFORE, [layer.clone() for layer in BEFORE]) == 0


def test_the_exploration_rate_is_the_share_of_the_union() -> None:
    assert exploration_rate([a | b for a, b in zip(BEFORE, AFTER_, strict=True)]) == 5 / 8


def test_a_neuron_without_input_is_dead() -> None:
    assert dead_neurons(BEFORE) == 1 / 3
    assert count_dead(BEFORE) == (1, 3)


def test_counts_are_exact_where_floats_are_not() -> None:
    ones = torch.ones(2**25 + 1, dtype=torch.bool)
    assert count_active([ones]) == (2**25 + 1, 2**25 + 1)


def test_order_in_memory_does_not_matter() -> None:
    layers = torch.rand(4, 3, 2, 2) < 0.5
    assert count_changed([layers.to(memory_format=torch.channels_last)], [~layers]) == (48, 48)


@given(st.lists(st.booleans(), max_size=40))
def test_the_bits_of_a_packed_mask_are_its_active_weights(entries: list[bool]) -> None:
    assert count_bits(pack(torch.tensor(entries, dtype=torch.bool))) == sum(entries)


def test_all_256_bytes_are_counted() -> None:
    assert [count_bits(torch.tensor([byte], dtype=torch.uint8)) for byte in range(256)] == [
        byte.bit_count() for byte in range(256)
    ]


def test_no_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="no mask"):
        sparsity([])


def test_weights_in_place_of_a_mask_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float32.*weight != 0"):
        sparsity([torch.ones(3)])


def test_masks_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(1, 2\)"):
        mask_change(BEFORE[:1], AFTER_[1:])


def test_masks_of_another_number_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="two times"):
        mask_change(BEFORE, AFTER_[:1])


def test_a_mask_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MaskedWeight\.rows"):
        dead_neurons([torch.ones(2, 3, 3, dtype=torch.bool)])
