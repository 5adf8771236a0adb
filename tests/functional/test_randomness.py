from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sparse.functional.hashing import content_hash
from lightning_sparse.functional.randomness import uniform_by_place, uniform_in_order

_WORD = (1 << 64) - 1


def split_mix(key: int, place: int) -> float:
    """SplitMix64 as it is defined, in integers without a limit, to 24 bits."""
    bits = ((place + 1) * 0x9E3779B97F4A7C15 + key) & _WORD
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _WORD
    return ((bits ^ (bits >> 31)) >> 40) / 2**24


@given(st.integers(-(1 << 70), 1 << 70), st.lists(st.integers(0, 1 << 62), min_size=1, max_size=8))
def test_it_is_what_the_definition_gives(key: int, places: list[int]) -> None:
    assert uniform_by_place(key, torch.tensor(places)).tolist() == [split_mix(key & _WORD, place) for place in places]


def test_large_tensors_are_drawn_in_parts_alike() -> None:
    places = torch.arange(200_003)
    drawn = uniform_by_place(5, places)
    assert torch.equal(drawn[130_000:130_005], uniform_by_place(5, places[130_000:130_005]))
    assert torch.equal(places, torch.arange(200_003))


@pytest.mark.parametrize("number", [0, 1, 1 << 15, 100_001])
@pytest.mark.parametrize("key", [-3, 0, (1 << 64) - 1])
def test_places_in_order_are_drawn_like_any_others(number: int, key: int) -> None:
    drawn = uniform_in_order(key, number, torch.device("cpu"))
    assert torch.equal(drawn, uniform_by_place(key, torch.arange(number)))


def test_numbers_are_uniform_and_two_keys_have_nothing_in_common() -> None:
    one, other = (uniform_by_place(key, torch.arange(100_000)).double() for key in (1, 2))
    assert float(one.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(one.var()) == pytest.approx(1 / 12, abs=0.002)
    counts = torch.histc(one, bins=64, min=0, max=1)
    assert float(((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum()) < 120  # χ² of 63 degrees: mean 63, sd 11
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1])) < 0.02


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_a_hash_leaves_its_tensor_alone_and_sees_a_swap(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 0, 1, 1]).to(dtype)
    before = tensor.clone()
    swapped = tensor[[1, 0, 2, 3, 4]]
    assert int(content_hash(tensor)) == int(content_hash(before)) != int(content_hash(swapped))
    assert torch.equal(tensor, before)


def test_order_in_memory_does_not_change_a_hash() -> None:
    tensor = torch.randn(2, 3, 4, 4)
    assert content_hash(tensor) == content_hash(tensor.to(memory_format=torch.channels_last))
