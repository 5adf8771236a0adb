"""GraNet, AC/DC, MEST, SNFS, DSR and SRigL on weights that can be worked by hand, and against slow references."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_sparse import ACDC, DSR, MEST, SET, SNFS, GraNet, RigL, SRigL
from lightning_sparse.functional.allocation import proportional, share
from lightning_sparse.masks import MaskGroup, MaskRegistry, select_weights
from lightning_sparse.masks.randomness import random_scores
from lightning_sparse.schedules import Constant, Linear, Polynomial, Steps
from tests.helpers import ConvToy, ToyModel, make_trainer
from tests.methods.hand import Row, layers, prepared, updated

if TYPE_CHECKING:
    from pathlib import Path

ONCE: dict[str, Any] = {"update_every": 1, "start": 0, "stop": 1}
HALF: dict[str, Any] = {"sparsity": Constant(0.5), "drop_fraction": Constant(0.5), **ONCE}


def _any(**arguments: Any) -> dict[str, Any]:
    return arguments


# Eight weights in two layers.
A, B = [0.9, -0.6, 0.5, -0.7], [0.3, 0.1, -0.4, 0.05]
ROW = st.lists(st.sampled_from([-1.0, -0.5, -0.25, 0.125, 0.25, 0.75, 2.0]), min_size=4, max_size=4)
TWO_ROWS = st.tuples(ROW, ROW)


def largest(values: Row, k: int, among: list[int]) -> set[int]:
    return set(sorted(among, key=lambda i: (-abs(values[i]), i))[:k])


def smallest(values: Row, k: int, among: list[int]) -> set[int]:
    return set(sorted(among, key=lambda i: (abs(values[i]), i))[:k])


# GraNet


def test_granet_prunes_all_layers_together_and_exchanges_in_each() -> None:
    # 4 of 8 stay: .05, .1, .3 go, and .5, because .4 is the last of its layer. Of A's three ⌊½·3⌋ = 1 is exchanged:
    # .6 goes, and of it and .5 the gradient of .5 is larger. Of B's one, ⌊½⌋ = 0.
    granet, group = GraNet(**HALF), layers([A, B], grads=[[0, 1, 5, 0], [9, 9, 9, 9]])
    prepared(granet, group)
    assert updated(granet, group) == [[1, 0, 1, 1], [0, 0, 1, 0]]


def test_granet_may_grow_what_it_has_just_pruned_or_not() -> None:
    grads = [[0, 5, 1, 0], [0, 0, 0, 0]]
    for regrow, expected in ((True, [1, 1, 0, 1]), (False, [1, 0, 1, 1])):
        granet, group = GraNet(**HALF, regrow=regrow), layers([A, B], grads=grads)
        prepared(granet, group)
        assert updated(granet, group)[0] == expected


def test_granet_is_pruned_half_way_and_regenerates_to_the_end() -> None:
    granet = GraNet(0.8, update_every=1, stop=100)
    group = layers([A, B])
    sparsities = []
    for step in (0, 25, 50, 75, 100):
        prepared(granet, group, step=step, total_steps=200)
        sparsities.append(granet.target_sparsity())
    assert sparsities == pytest.approx([0.0, 0.8 * (1 - 0.5**3), 0.8, 0.8, 0.8])


@given(TWO_ROWS, TWO_ROWS)
def test_granet_does_what_sorting_would(weights: tuple[Row, Row], grads: tuple[Row, Row]) -> None:
    granet, group = GraNet(**HALF, min_active=0), layers(weights, grads=grads)
    prepared(granet, group)
    flat = [*weights[0], *weights[1]]
    left = set(range(8)) - smallest(flat, 4, list(range(8)))
    expected = []
    for layer in (0, 1):
        active = [i - 4 * layer for i in sorted(left) if i // 4 == layer]
        kept = set(active) - smallest(weights[layer], len(active) // 2, active)
        free = [i for i in range(4) if i not in kept]
        kept |= largest(grads[layer], len(active) // 2, free)
        expected.append([int(i in kept) for i in range(4)])
    assert updated(granet, group) == expected


# RigL, SET and MEST


@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize(
    ("kind", "own"), [(RigL, {"update_replaces_step": False}), (SET, {}), (MEST, {"gradient_weight": 0.5})]
)
@given(TWO_ROWS, TWO_ROWS)
def test_an_exchange_does_what_sorting_would(
    kind: Any, own: dict[str, Any], regrow: bool, weights: tuple[Row, Row], grads: tuple[Row, Row]
) -> None:
    masks = [[1, 1, 0, 0], [0, 1, 0, 1]]
    method, group = kind(**HALF, regrow=regrow, **own), layers(weights, masks, grads)
    prepared(method, group)
    expected = []
    for row, grad, mask, weight in zip(weights, grads, masks, group, strict=True):
        active = [i for i in range(4) if mask[i]]
        scores = [abs(w) + 0.5 * abs(g) for w, g in zip(row, grad, strict=True)] if kind is MEST else row
        kept = set(active) - smallest(scores, 1, active)
        free = [i for i in range(4) if i not in kept and (regrow or not mask[i])]
        kept |= largest(grad if kind is RigL else random_scores(weight, 0, 1).flatten().tolist(), 1, free)
        expected.append([int(i in kept) for i in range(4)])
    assert updated(method, group) == expected


# AC/DC


@given(TWO_ROWS)
def test_acdc_compresses_as_sorting_would(weights: tuple[Row, Row]) -> None:
    acdc, group = ACDC(0.5, update_every=1, start=0, last_dense=1, stop=3), layers(weights)
    prepared(acdc, group, step=0, total_steps=10)
    kept = set(range(8)) - smallest([*weights[0], *weights[1]], 4, list(range(8)))
    assert updated(acdc, group) == [[int(4 * layer + i in kept) for i in range(4)] for layer in (0, 1)]


def test_acdc_takes_the_largest_of_all_and_wakes_all() -> None:
    acdc, group = ACDC(0.5, update_every=1, start=0, last_dense=1, stop=3), layers([A, B])
    prepared(acdc, group, step=0, total_steps=10)
    assert updated(acdc, group) == [[1, 1, 1, 1], [0, 0, 0, 0]]
    acdc.step = 1
    assert updated(acdc, group) == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert group[1].value.tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_the_phases_of_acdc_are_those_of_the_authors() -> None:
    """100 epochs on ImageNet, 200 on CIFAR, a step an epoch."""
    group = layers([A])
    imagenet, cifar = ACDC(0.9), ACDC(0.9, start=0.05, update_every=0.1)
    for acdc, total, sparse in (
        (imagenet, 100, [(10, 15), (20, 25), (30, 35), (40, 45), (50, 55), (60, 65), (70, 75), (85, 100)]),
        (cifar, 200, [(10, 30), (50, 70), (90, 110), (130, 150), (170, 200)]),
    ):
        prepared(acdc, group, step=0, total_steps=total)
        for step in range(total):
            acdc.step = step
            assert acdc.is_compressed == any(begin <= step < end for begin, end in sparse), (total, step)


def test_acdc_alternates_in_a_training_and_ends_sparse(tmp_path: Path) -> None:
    acdc = ACDC(0.8, min_active=1, update_every=3, start=2, last_dense=11, stop=13)
    counts: list[int] = []

    class Look(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            counts.append(sum(weight.num_active for weight in acdc.weights))

    make_trainer(tmp_path, callbacks=[acdc, Look()]).fit(ToyModel())
    assert counts == [344] * 2 + [68] * 3 + [344] * 3 + [68] * 3 + [344] * 2 + [68] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": Linear(0.0, 0.5)}, "AC/DC has phases of its own: give a number"),
        ({"sparsity": 0.5, "last_dense": 0.9}, r"last_dense \(0\.9\) comes after stop \(0\.85\)"),
    ],
)
def test_phases_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ACDC(**arguments)


# MEST

WEIGHT, MASK = [0.9, -0.1, 0.5, -0.2, 0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1, 0, 0, 0, 0]
GRAD = [0.0, 9.0, 0.0, 0.1, -3.0, 1.0, 2.0, -0.5]


def test_mest_prunes_by_magnitude_and_gradient() -> None:
    # |w| + 1·|g| is .9, 9.1, .5, .3: the last two go, two others come from anywhere.
    grown: set[int] = set()
    for seed in range(12):
        mest, group = MEST(**HALF, gradient_weight=1.0, seed=seed), layers([WEIGHT], [MASK], [GRAD])
        prepared(mest, group)
        (mask,) = updated(mest, group)
        assert sum(mask) == 4
        assert mask[0] == mask[1] == 1
        grown |= {index for index in range(2, 8) if mask[index]}
    assert grown >= {4, 5, 6, 7}


def test_mest_without_gradients_prunes_by_magnitude() -> None:
    mest, group = MEST(**HALF, gradient_weight=0.0, regrow=False), layers([WEIGHT], [MASK], [GRAD])
    prepared(mest, group)
    assert updated(mest, group)[0][:4] == [1, 0, 1, 0]


def test_under_a_soft_bound_mest_prunes_to_its_budget_and_grows_beyond() -> None:
    # s = ½ and r = ½: 4 of 8 are kept, 4 + ½·4 = 6 are active.
    weight, mask = [0.9, 0.1, 0.5, 0.2, 0.3, 0.4, 0.0, 0.0], [1, 1, 1, 1, 1, 1, 0, 0]
    mest, group = MEST(**HALF, soft=True, gradient_weight=0.0), layers([weight], [mask])
    prepared(mest, group)
    assert mest.target_sparsity() == 0.25
    (after,) = updated(mest, group)
    assert [after[i] for i in (0, 2, 4, 5)] == [1, 1, 1, 1]
    assert sum(after) == 6


@pytest.mark.parametrize("soft", [False, True])
def test_mest_ends_at_its_sparsity_in_the_authors_steps(soft: bool) -> None:
    fractions = Steps((0.5, 0.25, 0.0) if soft else (0.2, 0.1, 0.0), at=(0.75, 1.0))
    mest = MEST(0.9, soft=soft, drop_fraction=fractions, update_every=1, stop=120)
    group = layers([[1.0] * 1000])
    seen = []
    for epoch in (1, 89, 90, 119, 120):
        prepared(mest, group, step=epoch, total_steps=160)
        seen.append(round(mest.target_sparsity(), 9))
    assert seen == ([0.85, 0.85, 0.875, 0.875, 0.9] if soft else [0.9] * 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradient_weight": -1.0}, r"gradient_weight is -1\.0; give a number of at least 0"),
        ({"soft": True, "allocation": "global"}, "allocation is 'global', but with soft=True"),
    ],
)
def test_what_mest_cannot_do_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MEST(0.9, **arguments)


# SNFS


def test_snfs_gives_what_was_pruned_to_layers_with_much_momentum() -> None:
    # Each layer of two loses ⌊½·2⌋ = 1: .1 and .2. The mean |m| of what was active is 3 and 1, so of the 2 the first
    # gets 1.5 and the second 0.5, rounded by largest remainder, the first before: 2 and 0. It grows where |m| is 9, 5.
    snfs = SNFS(**HALF)
    group = layers(
        [[0.9, 0.1, 0.0, 0.0], [0.8, 0.2, 0.0, 0.0]],
        [[1, 1, 0, 0], [1, 1, 0, 0]],
        [[-3.0, 3.0, 9.0, -5.0], [1.0, 1.0, 9.0, 9.0]],
    )
    prepared(snfs, group)
    assert updated(snfs, group) == [[1, 0, 1, 1], [1, 0, 0, 0]]


def test_a_full_layer_passes_on_what_it_cannot_hold() -> None:
    snfs = SNFS(**(HALF | _any(sparsity=Constant(0.25))))
    group = layers([[0.9, 0.1], [0.8, 0.2, 0.3, 0.4, 0.0, 0.0]], [[1, 1], [1, 1, 1, 1, 0, 0]], [[9.0] * 2, [1.0] * 6])
    prepared(snfs, group)
    assert [sum(mask) for mask in updated(snfs, group)] == [2, 4]


def test_the_momentum_of_snfs_is_that_of_all_weights() -> None:
    snfs, group = SNFS(**HALF, momentum=0.5), layers([WEIGHT], [MASK], [GRAD])
    prepared(snfs, group)
    for expected in (1.0, 1.5, 1.75):
        snfs.observe(group[0])
        assert snfs.memory(group[0], "momentum").flatten().tolist() == pytest.approx([expected * g for g in GRAD])


def test_a_schedule_that_rises_is_met_by_pruning_alone() -> None:
    snfs = SNFS(Constant(0.75), drop_fraction=Constant(0.0), **ONCE)
    group = layers([A, B])
    prepared(snfs, group)
    assert [sum(mask) for mask in updated(snfs, group)] == [1, 1]


@given(TWO_ROWS, TWO_ROWS)
def test_snfs_does_what_sorting_would(weights: tuple[Row, Row], grads: tuple[Row, Row]) -> None:
    snfs, group = SNFS(**HALF), layers(weights, [[1, 1, 0, 0], [1, 0, 1, 0]], grads)
    prepared(snfs, group)
    active = [[0, 1], [0, 2]]
    kept = [set(a) - smallest(w, 1, a) for w, a in zip(weights, active, strict=True)]
    means = [Fraction(sum(abs(Fraction(g[i])) for i in a), 2) for g, a in zip(grads, active, strict=True)]
    ideal = [2 * mean / sum(means) for mean in means]
    grown = [floor(value) for value in ideal]
    if sum(grown) < 2:  # one is left for the larger remainder, the first where they are equal
        grown[0 if ideal[0] - grown[0] >= ideal[1] - grown[1] else 1] += 1
    for layer in (0, 1):
        free = [i for i in range(4) if i not in kept[layer]]
        kept[layer] |= largest(grads[layer], grown[layer], free)
    assert updated(snfs, group) == [[int(i in its) for i in range(4)] for its in kept]


# DSR


def test_dsr_prunes_below_its_threshold_and_lets_survivors_grow() -> None:
    # |w| < .35 are .3, .1 and .05, all of B: A keeps 4, B 1. Of the 3, A has no room, so all come back to B.
    # N_p = ⌊.5·8⌋ = 4, and 3 < .9·4: the threshold doubles.
    dsr = DSR(Constant(0.0), drop_fraction=Constant(0.5), threshold=0.35, **ONCE)
    group = layers([A, B])
    run = prepared(dsr, group)
    assert updated(dsr, group) == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert run.own.threshold == 0.7
    assert dsr.method_state()["threshold"] == 0.7


@pytest.mark.parametrize(
    ("fraction", "threshold"),
    # 5 of 10 are below .35
    [(0.4, 0.175), (0.5, 0.35), (0.6, 0.7)],
)
def test_the_threshold_of_dsr_halves_stays_or_doubles(fraction: float, threshold: float) -> None:
    dsr = DSR(Constant(0.0), drop_fraction=Constant(fraction), threshold=0.35, **ONCE)
    group = layers([[0.1] * 5 + [0.9] * 5])
    run = prepared(dsr, group)
    updated(dsr, group)
    assert run.own.threshold == threshold


def test_growth_of_dsr_is_shared_by_survivors() -> None:
    # Of 12 active (each 6 of 12) the first layer keeps 4, the second 2: of the 6 pruned it gets 4, the other 2.
    first, second = [0.9] * 4 + [0.1] * 2 + [0.0] * 6, [0.9] * 2 + [0.1] * 4 + [0.0] * 6
    mask = [1] * 6 + [0] * 6
    dsr = DSR(Constant(0.5), threshold=0.5, **ONCE)
    group = layers([first, second], [mask, mask])
    prepared(dsr, group)
    after = updated(dsr, group)
    assert [sum(its) for its in after] == [8, 4]
    assert after[0][:4] + after[1][:2] == [1] * 6


@given(TWO_ROWS)
def test_dsr_prunes_and_shares_as_loops_would(weights: tuple[Row, Row]) -> None:
    dsr, group = DSR(Constant(0.25), threshold=0.3, min_active=0, **ONCE), layers(weights, [[1, 1, 1, 0]] * 2)
    prepared(dsr, group)
    after = updated(dsr, group)
    left = [{i for i in range(3) if abs(row[i]) >= 0.3} for row in weights]
    assert all({i for i in its if mask[i]} == its for its, mask in zip(left, after, strict=True))
    assert sum(map(sum, after)) == 6
    counts = [len(its) for its in left]
    shares = proportional(counts, 6 - sum(counts), [4 - count for count in counts])
    assert [sum(mask) for mask in after] == [count + its for count, its in zip(counts, shares, strict=True)]


@pytest.mark.parametrize(("before", "sparsity"), [([1] * 8, 0.5), ([1] * 6 + [0] * 2, 0.125)])
def test_without_regrowth_no_more_is_exchanged_than_was_pruned_before(before: list[int], sparsity: float) -> None:
    # Of 8 active 4 may stay, and none was pruned before. Of 6 active 7 may be: one of the 2 that were pruned is due.
    granet = GraNet(Constant(sparsity), allocation="uniform", regrow=False, drop_fraction=Constant(0.5), **ONCE)
    weights = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    group = layers([weights], [before], [[1.0] * 8])
    prepared(granet, group)
    after = updated(granet, group)[0]
    assert after == ([0, 0, 0, 0, 1, 1, 1, 1] if sparsity == 0.5 else [0, 1, 1, 1, 1, 1, 1, 1])


def test_survivors_of_dsr_are_counted_after_a_denser_network_was_pruned() -> None:
    # All 12 are active, 6 may be: the 6 smallest of both layers go first, which are the second. The others are above
    # the threshold.
    first, second = [0.9] * 6, [0.6] * 6
    dsr = DSR(Constant(0.5), allocation="global", threshold=0.5, min_active=0, **ONCE)
    group = layers([first, second])
    prepared(dsr, group)
    assert updated(dsr, group) == [[1] * 6, [0] * 6]


def test_a_layer_of_dsr_keeps_a_weight_under_any_threshold() -> None:
    dsr = DSR(Constant(0.5), threshold=9.0, **ONCE)
    group = layers([A, B], [[1, 1, 0, 0], [0, 0, 1, 1]])
    prepared(dsr, group)
    after = updated(dsr, group)
    assert after[0][0] == after[1][2] == 1
    assert sum(map(sum, after)) == 4


def test_a_threshold_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold is 0\.0; give a magnitude above 0"):
        DSR(0.9, threshold=0.0)


# SRigL

STEPPING: dict[str, Any] = HALF | {"allocation": "uniform", "update_replaces_step": False}
A_QUARTER: dict[str, Any] = STEPPING | _any(drop_fraction=Constant(0.25))


def neurons(weights: list[Row], masks: list[Row], grads: list[Row]) -> MaskGroup:
    """A layer with a neuron for each row, before one that stays dense."""
    module = nn.Sequential(
        nn.Linear(len(weights[0]), len(weights), bias=False), nn.Linear(len(weights), 1, bias=False)
    ).double()
    first = module.get_parameter("0.weight")
    first.data = torch.tensor(weights, dtype=torch.float64)
    for parameter, grad in ((first, grads), (module.get_parameter("1.weight"), [[0.0] * len(weights)])):
        parameter.grad = torch.tensor(grad, dtype=torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (group,) = MaskRegistry().claim("method", select_weights(module).masked, [optimizer])
    group[0].mask.copy_(torch.tensor(masks, dtype=torch.bool))
    group.recount()
    return group


def rows_after(group: MaskGroup) -> list[list[int]]:
    return group[0].mask.int().tolist()


def test_srigl_fills_each_neuron_up_to_the_same_fan_in() -> None:
    # Eight weights, four active, ⌊½·4⌋ = 2 exchanged: .1 and .2 go, one of each neuron. Each fills up one place where
    # its own gradient is largest, though the second neuron's are the smaller.
    srigl = SRigL(**STEPPING, ablation=0.0)
    group = neurons(
        [[0.9, 0.1, 0, 0], [0.8, 0.2, 0, 0]], [[1, 1, 0, 0], [1, 1, 0, 0]], [[0, 1, 9, 8], [0, 0.1, 0.2, 0.3]]
    )
    prepared(srigl, group)
    updated(srigl, group)
    assert rows_after(group) == [[1, 0, 1, 0], [1, 0, 0, 1]]


def test_a_neuron_with_more_kept_weights_than_its_fan_in_keeps_the_largest() -> None:
    # .9, .7 and .6 are the three of four that stay, all of the first neuron, whose fan-in is 2.
    srigl = SRigL(**A_QUARTER, ablation=0.0)
    group = neurons([[0.6, 0.7, 0.9, 0], [0.1, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]], [[0, 0, 0, 9], [0, 1, 2, 3]])
    prepared(srigl, group)
    updated(srigl, group)
    assert rows_after(group) == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_a_neuron_with_too_few_salient_weights_is_ablated_and_the_others_take_its_place() -> None:
    # Eight of sixteen are active in four neurons. Salient are the six largest and the two largest gradients elsewhere:
    # 3, 3, 2 and 0. The last neuron goes, and ⌊8 / 3⌋ = 2 are left to each of the others.
    srigl = SRigL(**A_QUARTER, ablation=0.5)
    group = neurons(
        [[0.9, 0.8, 0, 0], [0.7, 0.6, 0, 0], [0.5, 0.4, 0, 0], [0.2, 0.1, 0, 0]],
        [[1, 1, 0, 0]] * 4,
        [[0, 0, 5, 0], [0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 0, 0]],
    )
    prepared(srigl, group)
    updated(srigl, group)
    assert rows_after(group) == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert group[0].budget == 6


def test_neurons_are_left_to_hold_the_budget() -> None:
    # All salient weights are the first neuron's, but its four places do not hold a budget of six.
    srigl = SRigL(**(A_QUARTER | _any(sparsity=Constant(0.25))), ablation=1.0)
    group = neurons([[0.9, 0.8, 0.7, 0.6], [0.1, 0.1, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]], [[9] * 4, [0] * 4])
    prepared(srigl, group)
    updated(srigl, group)
    assert [sum(row) for row in rows_after(group)] == [3, 3]


@pytest.mark.parametrize("model", [ToyModel, ConvToy])
def test_every_neuron_of_srigl_has_the_same_fan_in_or_none(model: Any, tmp_path: Path) -> None:
    srigl = SRigL(0.7, update_every=2, stop=13, ablation=0.6)
    fan_ins: list[set[int]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            for weight in srigl.weights:
                counts = set(weight.rows(weight.mask).sum(dim=1).tolist())
                fan_ins.append(counts - {0})
                assert weight.num_active == weight.budget
            assert srigl.weights[-1].rows(srigl.weights[-1].mask).any(dim=1).all()

    make_trainer(tmp_path, callbacks=[srigl, Look()]).fit(model())
    assert all(len(counts) == 1 for counts in fan_ins)


@given(st.tuples(ROW, ROW, ROW), st.tuples(ROW, ROW, ROW))
def test_srigl_does_what_sorting_would(weights: tuple[Row, ...], grads: tuple[Row, ...]) -> None:
    # Six of twelve are active, ⌊½·6⌋ = 3 of them stay; the fan-in was 2, so ⌈1⌉ salient weight is enough.
    active = [(row, column) for row in range(3) for column in (0, 1)]
    group = neurons(list(weights), [[1, 1, 0, 0]] * 3, list(grads))
    srigl = SRigL(**STEPPING, ablation=0.3)
    prepared(srigl, group)
    updated(srigl, group)
    every = [(row, column) for row in range(3) for column in range(4)]
    order = {place: index for index, place in enumerate(every)}
    top = sorted(active, key=lambda p: (-abs(weights[p[0]][p[1]]), order[p]))[:3]
    others = [place for place in every if place not in top]
    wanted = sorted(others, key=lambda p: (-abs(grads[p[0]][p[1]]), order[p]))[:3]
    salient = [sum(place[0] == row for place in [*top, *wanted]) for row in range(3)]
    alive = [row for row in range(3) if salient[row] >= 1]
    alive = alive if len(alive) >= 2 else sorted(range(3), key=lambda row: (-salient[row], row))[:2]
    fan_in = 6 // len(alive)
    expected = [[0] * 4 for _ in range(3)]
    for row in alive:
        kept = sorted((c for r, c in top if r == row), key=lambda c: (-abs(weights[row][c]), c))
        rest = sorted((c for c in range(4) if c not in kept), key=lambda c: (-abs(grads[row][c]), c))
        for column in [*kept, *rest][:fan_in]:
            expected[row][column] = 1
    assert rows_after(group) == expected


def test_srigl_grows_what_it_has_just_pruned_only_where_there_is_no_other_place() -> None:
    # Six of eight are active, and as two are free two go: .1 and .2. The first neuron, of whose three one is left, has
    # one place that was free; the other that it needs is one of those just pruned.
    srigl = SRigL(**(STEPPING | _any(sparsity=Constant(0.25))), ablation=0.0, regrow=False)
    group = neurons([[0.9, 0.1, 0.2, 0], [0.8, 0.7, 0.6, 0]], [[1, 1, 1, 0]] * 2, [[0, 1, 9, 8], [0, 0, 9, 1]])
    prepared(srigl, group)
    updated(srigl, group)
    assert rows_after(group) == [[1, 1, 0, 1], [1, 1, 1, 0]]


def test_an_update_that_fails_leaves_nothing_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no memory")

    srigl = SRigL(0.7, update_every=2, stop=13)
    monkeypatch.setattr(SRigL, "grown_to", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        make_trainer(tmp_path, callbacks=[srigl]).fit(ToyModel())
    assert srigl.registry.num_updates == 0
    assert not srigl.run.own.alive
    assert not srigl.run.own.largest


def test_srigl_shares_no_budget_over_all_layers() -> None:
    with pytest.raises(ValueError, match=r"allocation.*'global'"):
        SRigL(0.9, allocation="global")


# What they share


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5), st.data())
def test_proportional_shares_sum_and_fit(layers_of: list[tuple[int, int]], data: st.DataObject) -> None:
    weights, capacities = [float(w) for w, _ in layers_of], [c for _, c in layers_of]
    total = data.draw(st.integers(0, sum(capacities)))
    shares = proportional(weights, total, capacities)
    assert sum(shares) == total
    assert all(0 <= its <= most for its, most in zip(shares, capacities, strict=True))
    open_layers = [i for i, its in enumerate(shares) if its < capacities[i]]
    for i in open_layers:  # nobody who has room is behind another by more than rounding
        for j in range(len(weights)):
            assert weights[i] * shares[j] <= weights[j] * (shares[i] + 1) + max(weights) + 1e-6


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match="9 cannot be shared out; give a total of 0 to 8"):
        proportional([1.0, 1.0], 9, [4, 4])


@given(st.integers(0, 1000), st.integers(0, 10_000))
def test_a_share_rounded_up_is_the_ceiling(thousandths: int, numel: int) -> None:
    assert share(thousandths / 1000, numel, up=True) == -(-thousandths * numel // 1000)


@pytest.mark.parametrize(
    ("values", "at", "message"),
    [((1.0, 0.5), (), "2 values and 0 times"), ((1.0, 0.5, 0.0), (0.7, 0.3), "rise"), ((1.0, 0.0), (1.5,), "rise")],
)
def test_steps_that_cannot_be_are_refused(values: Any, at: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Steps(values, at)


def test_all_layers_together_can_grow(tmp_path: Path) -> None:
    # From 2 of 8 to 4 of 8, where the gradients of all layers are largest: 9 and 8.
    granet = GraNet(Constant(0.5), drop_fraction=Constant(0.0), **ONCE)
    group = layers([A, B], [[1, 0, 0, 0], [1, 0, 0, 0]], [[0, 9, 1, 0], [0, 2, 8, 0]])
    prepared(granet, group)
    assert updated(granet, group) == [[1, 1, 0, 0], [1, 0, 1, 0]]


@pytest.mark.parametrize("pruned_by", [0.0, 1.5, True, "half"])
def test_a_first_stage_that_is_no_fraction_is_refused(pruned_by: Any) -> None:
    with pytest.raises(ValueError, match=r"pruned_by is .*; give a fraction of the time to stop, in \(0, 1\]"):
        GraNet(Polynomial(0.5, 0.9), pruned_by=pruned_by)
