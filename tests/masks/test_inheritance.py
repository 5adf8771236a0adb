"""What a method makes of the masks that another has left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sparse.masks import MaskGroup, MaskRegistry, select_weights
from lightning_sparse.masks.inheritance import forget_pruned, inherit_, waking_zeros


def group_of(row: Sequence[float]) -> MaskGroup:
    """One linear layer with one output and these weights, all active."""
    module = nn.Linear(len(row), 1, bias=False)
    module.weight = nn.Parameter(torch.tensor([row]))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    (group,) = MaskRegistry().claim("method", select_weights(module).masked, [optimizer])
    return group


def bits(text: str) -> Tensor:
    return torch.tensor([[bit == "1" for bit in text.replace(" ", "")]])


def shown(mask: Tensor) -> str:
    return "".join("1" if bit else "0" for bit in mask.flatten().tolist())


# By hand. Eight weights:
#   index    0    1    2    3    4    5    6    7
ROW = [0.9, 0.0, -0.6, 0.2, 0.0, -0.5, 0.1, 0.0]
BEFORE = bits("1011 0110")  # five active


def inherited(its_own: str) -> tuple[str, int]:
    group = group_of(ROW)
    group.mask.copy_(bits(its_own).flatten())
    inherit_(group, {"weight": BEFORE}, seed=0)
    return shown(group.mask), group[0].budget


def test_a_layer_that_would_begin_dense_begins_with_what_it_inherits() -> None:
    assert inherited("1111 1111") == ("10110110", 5)


def test_of_more_than_the_budget_the_largest_stay() -> None:
    # three of .9, .6, .2, .5, .1
    assert inherited("0100 1001") == ("10100100", 3)


def test_what_the_budget_has_left_is_the_methods_own() -> None:
    # Its own six are 0, 1, 3, 4, 6, 7; of those that are not inherited, 1, 4 and 7, one is drawn.
    mask, budget = inherited("1101 1011")
    assert budget == 6
    assert mask in ("11110110", "10111110", "10110111")


def test_a_weight_without_an_inheritance_keeps_its_own() -> None:
    group = group_of(ROW)
    group.mask.copy_(bits("0100 1001").flatten())
    inherit_(group, {"another.weight": BEFORE}, seed=0)
    assert shown(group.mask) == "01001001"


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([-1.0, 0.0, 0.5])), min_size=1, max_size=40),
    st.integers(0, 99),
)
def test_the_count_is_the_methods_and_the_places_are_inherited(
    entries: list[tuple[bool, bool, float]], seed: int
) -> None:
    own, before, values = (list(column) for column in zip(*entries, strict=True))
    group = group_of(values)
    group.mask.copy_(torch.tensor(own))
    inherit_(group, {"weight": torch.tensor([before])}, seed)
    mask = group.mask.tolist()
    assert sum(mask) == (sum(before) if all(own) else sum(own))
    if sum(mask) >= sum(before):
        assert all(after for after, was in zip(mask, before, strict=True) if was)
        assert all(mine or was for after, mine, was in zip(mask, own, before, strict=True) if after)
    else:
        assert all(was for after, was in zip(mask, before, strict=True) if after)
        kept = [abs(value) for value, after in zip(values, mask, strict=True) if after]
        lost = [abs(value) for value, after, was in zip(values, mask, before, strict=True) if was and not after]
        assert not kept or max(lost) <= min(kept)


def test_moments_stay_of_weights_alone_that_were_active_and_are() -> None:
    group = group_of(ROW)
    weight = group[0]
    group.optimizer.state[weight.parameter]["momentum_buffer"] = torch.ones(1, 8)
    group.mask.copy_(bits("1110 0110").flatten())
    forget_pruned(group, {"weight": BEFORE})
    assert group.optimizer.state[weight.parameter]["momentum_buffer"].tolist() == [[1, 0, 1, 0, 0, 1, 1, 0]]


def test_zeros_that_would_wake_are_named() -> None:
    pruned, inherits, masked, few, initial = (group_of(row) for row in (ROW, ROW, ROW, [*([1.0] * 10), 0.0], [0.0] * 8))
    masked.mask.copy_((masked[0].parameter != 0).flatten())
    assert waking_zeros([pruned], {}) == ["weight"]
    assert waking_zeros([inherits], {"weight": BEFORE}) == []
    assert waking_zeros([masked, few, initial], {}) == []
