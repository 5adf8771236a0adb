from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sparse import FGGP
from lightning_sparse.functional import erdos_renyi_kernel, num_active
from lightning_sparse.schedules import Constant, Linear, Polynomial
from tests.helpers import within_training
from tests.methods.test_gmp import VALUE, fit, layers_of, prune

# By hand. Eight weights:
#   index   0    1    2    3   |  4    5    6    7
#   |w|    .9   .1   .5   .2   | .3   .8   .4   .05
#   |g|    .1   .8   .2   .3   | .05  .4   .01  .9
WEIGHT = [0.9, -0.1, 0.5, -0.2, 0.3, 0.8, -0.4, 0.05]
GRAD = [-0.1, 0.8, 0.2, -0.3, 0.05, 0.4, 0.01, -0.9]


def select(n: int, *, among: list[int] | None = None, **settings: Any) -> list[int]:
    """The indices of the ``n`` weights above that are pruned at the end of training."""
    return dropped(FGGP(0.9, **settings), WEIGHT, GRAD, n, among=range(8) if among is None else among)


def dropped(
    fggp: FGGP, weight: list[float], grad: list[float], n: int, *, among: Sequence[int], step: int = 100
) -> list[int]:
    """The indices of the ``n`` of these weights, of those ``among`` them, that are pruned after ``step`` steps."""
    group = layers_of([weight], [grad])
    group.mask.zero_()
    group.mask[list(among)] = True
    pruned = within_training(fggp, [group], step=step, total_steps=200).dropped(group, group.mask, n)
    return pruned.nonzero().squeeze(1).tolist()


def test_of_the_half_with_small_gradients_the_smallest_weights_go() -> None:
    # 4 smallest |g|: 6, 4, 0, 2; their |w|: .4, .3, .9, .5
    assert select(2) == [4, 6]


def test_magnitude_first_pools_by_magnitude_and_prunes_by_gradient() -> None:
    # 4 smallest |w|: 7, 1, 3, 4; their |g|: .9, .8, .3, .05
    assert select(2, first="magnitude") == [3, 4]


def test_a_pool_of_survivors_is_larger_by_the_pruned_ones() -> None:
    # 2 + 6/2 = 5 smallest |g|: 6, 4, 0, 2, 3; their |w|: .4, .3, .9, .5, .2
    assert select(2, pool_of="survivors") == [3, 4]


def test_magnitude_first_with_a_pool_of_survivors() -> None:
    # 5 smallest |w|: 7, 1, 3, 4, 6; their |g|: .9, .8, .3, .05, .01
    assert select(2, pool_of="survivors", first="magnitude") == [4, 6]


@pytest.mark.parametrize(("pool", "pruned"), [(0.0, [0, 4, 6]), (0.1, [0, 4, 6]), (0.375, [0, 4, 6])])
def test_a_pool_smaller_than_what_is_pruned_is_as_large_as_that(pool: float, pruned: list[int]) -> None:
    # 3 smallest |g|: 6, 4, 0; all go
    assert select(3, pool=pool) == pruned


def test_a_pool_of_everything_prunes_by_magnitude_alone() -> None:
    # 3 smallest |w|: 7, 1, 3
    assert select(3, pool=1.0) == [1, 3, 7]


def test_magnitude_first_with_a_pool_of_everything_prunes_by_gradient_alone() -> None:
    # 3 smallest |g|: 6, 4, 0
    assert select(3, pool=1.0, first="magnitude") == [0, 4, 6]


def test_the_pool_is_a_rate_of_the_active_weights() -> None:
    # 6 are active (without 4 and 6): 3 smallest |g|: 0, 2, 3; their |w|: .9, .5, .2
    assert select(1, among=[0, 1, 2, 3, 5, 7]) == [3]


def test_a_pool_of_survivors_counts_active_weights_alone() -> None:
    # 6 are active: 2 + ⌊4/2⌋ = 4 smallest |g|: 0, 2, 3, 5; their |w|: .9, .5, .2, .8
    assert select(2, among=[0, 1, 2, 3, 5, 7], pool_of="survivors") == [2, 3]


def test_pruning_everything_prunes_everything() -> None:
    assert select(8) == list(range(8))


@pytest.mark.parametrize(("step", "pruned"), [(0, [1, 3, 7]), (50, [2, 4, 6]), (100, [0, 4, 6])])
def test_an_annealed_pool_shrinks_with_progress(step: int, pruned: list[int]) -> None:
    # γ = 1: 3 smallest |w|. γ = .5: of 6, 4, 0, 2 those with .4, .3, .5. γ = 0: 3 smallest |g|.
    fggp = FGGP(0.9, pool=Linear(1.0, 0.0), stop=100)
    assert dropped(fggp, WEIGHT, GRAD, 3, among=range(8), step=step) == pruned


@pytest.mark.parametrize(("pool", "size"), [(0.29, 29), (0.57, 57), (0.58, 58)])
def test_the_pool_is_the_rate_that_is_written_and_not_its_neighbour_in_floating_point(pool: float, size: int) -> None:
    # 0.29 · 100 is 28.999999999999996. The weight with the smallest |w| is the last that fits the pool.
    weight, grad = [1.0] * 100, [float(index) for index in range(100)]
    weight[size - 1] = 0.0
    assert dropped(FGGP(0.9, pool=pool), weight, grad, 1, among=range(100)) == [size - 1]


def test_all_layers_are_ranked_together_by_default() -> None:
    # 2 of 8: pool 6, 4, 0, 2 of both layers; .3 and .4 go, both of the second.
    assert prune(FGGP(0.25), layers_of([WEIGHT[:4], WEIGHT[4:]], [GRAD[:4], GRAD[4:]])) == [4, 6]


def test_layer_by_layer_each_has_a_pool_of_its_own() -> None:
    # 1 of 4 each. First: pool 0, 2 with .9 and .5. Second: pool 6, 4 with .4 and .3.
    group = layers_of([WEIGHT[:4], WEIGHT[4:]], [GRAD[:4], GRAD[4:]])
    assert prune(FGGP(0.25, allocation="uniform"), group) == [2, 4]


def test_with_a_pattern_what_is_not_in_the_pool_stays() -> None:
    # 4 of 8 go, pool 6: the 2 largest |g|, 7 and 1, stay; beside them, of each four, the largest |w|: 0 and 5.
    settings: dict[str, Any] = {"allocation": "uniform", "pattern": "2:4"}
    assert prune(FGGP(0.5, pool=0.75, **settings), layers_of([WEIGHT], [GRAD])) == [2, 3, 4, 6]
    # A pool of the 4 that go leaves nothing to choose: what stays has the largest |g|, or |w|, of each four.
    assert prune(FGGP(0.5, **settings), layers_of([WEIGHT], [GRAD])) == [0, 2, 4, 6]
    assert prune(FGGP(0.5, first="magnitude", **settings), layers_of([WEIGHT], [GRAD])) == [1, 3, 4, 7]


def test_min_active_keeps_the_largest_weights_of_a_layer_out_of_the_pool() -> None:
    # 6 of 8, each layer keeps its largest: 0 and 5 (.9 and .8); the others go.
    group = layers_of([WEIGHT[:4], WEIGHT[4:]], [GRAD[:4], GRAD[4:]])
    assert prune(FGGP(0.75, min_active=1), group) == [1, 2, 3, 4, 6, 7]


def test_a_weight_without_a_gradient_is_the_first_in_the_pool() -> None:
    # The second layer took no part in the loss: its 4 are the pool; .05 and .3 go.
    group = layers_of([WEIGHT[:4], WEIGHT[4:]], [GRAD[:4], GRAD[4:]])
    group[1].parameter.grad = None
    assert prune(FGGP(0.25), group) == [4, 7]


# Against a slow reference


def reference(
    weight: list[float], grad: list[float], active: list[int], n: int, pool: float, pool_of: str, first: str
) -> list[int]:
    """Sort twice, in the words of the paper."""
    rate, remaining = Fraction(str(pool)), len(active)
    size = max(n, math.floor(rate * remaining)) if pool_of == "active" else n + math.floor(rate * (remaining - n))
    by_pool, by_prune = (grad, weight) if first == "gradient" else (weight, grad)
    pool_members = sorted(active, key=lambda i: (abs(by_pool[i]), i))[:size]
    return sorted(sorted(pool_members, key=lambda i: (abs(by_prune[i]), i))[:n])


@st.composite
def updates(draw: st.DrawFn) -> tuple[list[float], list[float], list[int], int]:
    size = draw(st.integers(1, 16))
    weight, grad = (draw(st.lists(VALUE, min_size=size, max_size=size)) for _ in range(2))
    active = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
    return weight, grad, active, draw(st.integers(1, len(active)))


@pytest.mark.parametrize("first", ["gradient", "magnitude"])
@pytest.mark.parametrize("pool_of", ["active", "survivors"])
@given(update=updates(), pool=st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0]))
def test_selection_is_what_sorting_twice_would_choose(
    update: tuple[list[float], list[float], list[int], int], pool: float, pool_of: Any, first: Any
) -> None:
    weight, grad, active, n = update
    fggp = FGGP(0.9, pool=pool, pool_of=pool_of, first=first)
    assert dropped(fggp, weight, grad, n, among=active) == reference(weight, grad, active, n, pool, pool_of, first)


@given(updates(), st.integers(0, 99), st.integers(1, 15))
def test_layers_ranked_together_are_pruned_as_one(
    update: tuple[list[float], list[float], list[int], int], percent: int, cut: int
) -> None:
    weight, grad, active, _ = update
    parts = [part for part in (slice(0, cut), slice(cut, None)) if weight[part]]
    group = layers_of([weight[part] for part in parts], [grad[part] for part in parts])
    group.mask.zero_()
    group.mask[active] = True
    group.recount()
    pruned_before = set(range(len(weight))) - set(active)
    n = max(0, len(active) - num_active(percent / 100, len(weight)))
    expected = pruned_before | set(reference(weight, grad, active, n, 0.5, "active", "gradient"))
    assert prune(FGGP(percent / 100), group) == sorted(expected)


# Real fits


def test_a_fit_that_begins_half_pruned_begins_at_random_erk_masks(tmp_path: Path) -> None:
    record = fit(FGGP(Polynomial(0.5, 0.95), update_every=2, start=3, stop=13), tmp_path)
    budgets = erdos_renyi_kernel([(16, 12), (8, 16), (3, 8)], 172)
    for masks in record.masks[:3]:
        assert [int(mask.sum()) for mask in masks.values()] == budgets
    assert record.counts[-1] == 17


@pytest.mark.parametrize(
    "settings", [{}, {"first": "magnitude"}, {"pool_of": "survivors"}, {"allocation": "erk"}], ids=str
)
def test_a_pruned_weight_never_returns(settings: dict[str, Any], tmp_path: Path) -> None:
    record = fit(FGGP(0.95, update_every=1, **settings), tmp_path)
    for before, after in zip(record.masks, record.masks[1:], strict=False):
        assert all(not (after[name] & ~before[name]).any() for name in after)
    assert record.counts[-1] == 17


def test_min_active_holds_in_every_layer_at_every_step(tmp_path: Path) -> None:
    record = fit(FGGP(0.95, min_active=5, update_every=1), tmp_path)
    assert all(int(mask.sum()) >= 5 for masks in record.masks for mask in masks.values())
    assert record.counts[-1] == 17


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pool": -0.1}, r"pool is -0\.1.* \[0, 1\]"),
        ({"pool": 1.5}, r"pool is 1\.5.* \[0, 1\]"),
        ({"pool": 50}, r"pool is 50,.* Did you mean 0\.5\?"),
        ({"pool": math.nan}, r"pool is nan.* \[0, 1\]"),
        ({"pool": Linear(0.5, 1.5)}, r"pool is 1\.5 at progress 1\.00"),
        ({"pool": None}, "None"),
        ({"pool_of": "all"}, r"pool_of is 'all'; give one of 'active', 'survivors'"),
        ({"first": "weight"}, r"first is 'weight'; give one of 'gradient', 'magnitude'"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named_with_its_value_and_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FGGP(0.9, **arguments)


@pytest.mark.parametrize("pool", [0, 0.0, 1, 1.0, Constant(0.5)])
def test_a_pool_may_be_nothing_everything_or_a_schedule(pool: Any) -> None:
    FGGP(0.9, pool=pool)
