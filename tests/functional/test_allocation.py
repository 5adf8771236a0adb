from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sparse.functional import erdos_renyi, erdos_renyi_kernel, num_active, uniform

Shape = tuple[int, ...]
Allocate = Callable[..., list[int]]
ALLOCATIONS: list[Allocate] = [uniform, erdos_renyi, erdos_renyi_kernel]

SHAPE = st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple)
SHAPES: st.SearchStrategy[list[Shape]] = st.lists(SHAPE, min_size=1, max_size=6)

# ResNet-50's first convolution, a block of its last stage and its classifier, for CIFAR-10.
RESNET = [(64, 3, 3, 3), (512, 2048, 1, 1), (512, 512, 3, 3), (2048, 512, 1, 1), (10, 2048)]


def sizes_of(shapes: Sequence[Shape]) -> list[int]:
    return [math.prod(shape) for shape in shapes]


def erk_density(shape: Shape) -> Fraction:
    return Fraction(sum(shape), math.prod(shape))


def er_density(shape: Shape) -> Fraction:
    fan_out, fan_in = shape[0], shape[1] if len(shape) > 1 else 1
    return Fraction(fan_in + fan_out, fan_in * fan_out)


DENSITIES: dict[Allocate, Callable[[Shape], Fraction]] = {
    uniform: lambda shape: Fraction(1),
    erdos_renyi: er_density,
    erdos_renyi_kernel: erk_density,
}


def solve_as_rigl_does(shapes: Sequence[Shape], total: int, density: Callable[[Shape], Fraction]) -> list[Fraction]:
    """RigL's loop in exact numbers: make dense what would exceed 1, and solve epsilon again for the others."""
    dense: set[int] = set()
    while True:
        open_layers = [layer for layer in range(len(shapes)) if layer not in dense]
        left = total - sum(math.prod(shapes[layer]) for layer in dense)
        slope = sum((density(shapes[layer]) * math.prod(shapes[layer]) for layer in open_layers), Fraction(0))
        epsilon = left / slope if open_layers else Fraction(0)
        exceeding = [layer for layer in open_layers if epsilon * density(shapes[layer]) > 1]
        if not exceeding:
            break
        dense.update(exceeding)
    densities = [Fraction(1) if layer in dense else epsilon * density(shape) for layer, shape in enumerate(shapes)]
    return [share * math.prod(shape) for share, shape in zip(densities, shapes, strict=True)]


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[Shape], int]:
    shapes = draw(SHAPES)
    return shapes, draw(st.integers(0, sum(sizes_of(shapes))))


@st.composite
def constrained_networks(draw: st.DrawFn) -> tuple[list[Shape], int, list[int], int]:
    """Shapes, a feasible total, capacities and ``min_active``."""
    shapes = draw(SHAPES)
    capacities = [draw(st.integers(0, size)) for size in sizes_of(shapes)]
    min_active = draw(st.integers(0, 20))
    least = sum(min(min_active, capacity) for capacity in capacities)
    return shapes, draw(st.integers(least, sum(capacities))), capacities, min_active


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@given(constrained_networks())
def test_budgets_sum_to_the_total_within_their_bounds(
    allocate: Allocate, network: tuple[list[Shape], int, list[int], int]
) -> None:
    shapes, total, capacities, min_active = network
    budgets = allocate(shapes, total, capacities=capacities, min_active=min_active)
    assert sum(budgets) == total
    for budget, capacity in zip(budgets, capacities, strict=True):
        assert isinstance(budget, int)
        assert min(min_active, capacity) <= budget <= capacity


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@given(networks())
def test_budgets_are_those_of_rigls_solver_to_the_rounding(
    allocate: Allocate, network: tuple[list[Shape], int]
) -> None:
    shapes, total = network
    expected = solve_as_rigl_does(shapes, total, DENSITIES[allocate])
    for budget, exact in zip(allocate(shapes, total), expected, strict=True):
        assert abs(budget - exact) < 1 + 1e-6


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@given(constrained_networks())
def test_one_more_weight_takes_no_more_than_a_rounding_from_any_layer(
    allocate: Allocate, network: tuple[list[Shape], int, list[int], int]
) -> None:
    shapes, total, capacities, min_active = network
    fewer = allocate(shapes, total, capacities=capacities, min_active=min_active)
    if total < sum(capacities):
        more = allocate(shapes, total + 1, capacities=capacities, min_active=min_active)
        assert all(after >= before - 1 for before, after in zip(fewer, more, strict=True))


@pytest.mark.parametrize("allocate", ALLOCATIONS)
@given(SHAPES)
def test_the_extreme_totals_are_empty_and_dense(allocate: Allocate, shapes: list[Shape]) -> None:
    assert allocate(shapes, 0) == [0] * len(shapes)
    assert allocate(shapes, sum(sizes_of(shapes))) == sizes_of(shapes)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("allocate", ALLOCATIONS)
def test_millions_of_weights_are_shared_to_the_last_one(allocate: Allocate, sparsity: float) -> None:
    total = num_active(sparsity, sum(sizes_of(RESNET)))
    budgets = allocate(RESNET, total)
    assert sum(budgets) == total
    expected = solve_as_rigl_does(RESNET, total, DENSITIES[allocate])
    assert all(abs(budget - exact) < 1 + 1e-6 for budget, exact in zip(budgets, expected, strict=True))


def test_uniform_by_hand() -> None:
    # 7 of 30 weights: 10 · 7/30 = 2.33, 20 · 7/30 = 4.67; the one left goes to the larger remainder.
    assert uniform([(10,), (5, 4)], 7) == [2, 5]


def test_equal_remainders_go_to_the_first_layers() -> None:
    # 5 of 9: 1.67 each; 1 each leaves two.
    assert uniform([(3,), (3,), (3,)], 5) == [2, 2, 1]


def test_uniform_with_capacities_by_hand() -> None:
    # 12 of 30, 4 each; the second layer holds 1, and the 3 that it cannot take go to the others: 5.5 each.
    assert uniform([(10,), (10,), (10,)], 12, capacities=[10, 1, 10]) == [6, 1, 5]


def test_uniform_with_a_minimum_by_hand() -> None:
    # 10 of 102 is less than 5 of the first layer: it keeps both of its weights, and the other holds 8.
    assert uniform([(2,), (100,)], 10, min_active=5) == [2, 8]


def test_erdos_renyi_kernel_by_hand() -> None:
    # (2, 2) has Σd = 4 and (10, 10) has 20: of 12 weights 2 and 10.
    assert erdos_renyi_kernel([(2, 2), (10, 10)], 12) == [2, 10]


def test_a_layer_that_would_exceed_one_is_dense_and_the_others_share_the_rest() -> None:
    # epsilon = 40 / 24 gives (2, 2) 6.67 of its 4 weights: it is dense, and 36 are left.
    assert erdos_renyi_kernel([(2, 2), (10, 10)], 40) == [4, 36]


def test_saturation_of_one_layer_can_saturate_the_next() -> None:
    # Σd = 3, 5, 40 for 2, 6, 400 weights. 120: epsilon = 2.5 → 7.5 (dense), 12.5 (dense), 100 → 112 are left.
    assert erdos_renyi_kernel([(2, 1), (3, 2), (20, 20)], 120) == [2, 6, 112]


def test_erdos_renyi_ignores_the_kernel_and_erk_counts_it() -> None:
    # (8, 4, 3, 3) has (8 + 4) · 9 = 108 under ER and Σd = 18 under ERK; (9, 3) has 12 under both.
    assert erdos_renyi([(8, 4, 3, 3), (9, 3)], 20) == [18, 2]
    assert erdos_renyi_kernel([(8, 4, 3, 3), (9, 3)], 20) == [12, 8]


def test_erdos_renyi_and_its_kernel_agree_on_matrices() -> None:
    shapes = [(300, 784), (100, 300), (10, 100)]
    assert erdos_renyi(shapes, 2_000) == erdos_renyi_kernel(shapes, 2_000)


# 21,265,088 weights are ResNet-34's and 23,467,712 ResNet-50's, for CIFAR-10.
@pytest.mark.parametrize(
    ("numel", "sparsity", "budget"),
    [
        (21_265_088, 0.999, 21_265),
        (21_265_088, 0.9995, 10_632),
        (21_265_088, 0.9999, 2_126),
        (23_467_712, 0.999, 23_467),
        (23_467_712, 0.9995, 11_733),
        (23_467_712, 0.9999, 2_346),
    ],
)
def test_extreme_sparsities_leave_the_integers_of_the_paper(numel: int, sparsity: float, budget: int) -> None:
    assert num_active(sparsity, numel) == budget


@given(st.integers(0, 999), st.integers(0, 10**8))
def test_num_active_is_exact_for_every_sparsity_of_three_decimals(thousandths: int, numel: int) -> None:
    assert num_active(thousandths / 1000, numel) == (1000 - thousandths) * numel // 1000


def test_num_active_takes_an_integer_sparsity() -> None:
    assert (num_active(0, 7), num_active(1, 7)) == (7, 0)


def test_num_active_takes_a_sparsity_in_scientific_notation() -> None:
    assert num_active(1e-05, 100_000) == 99_999


# Infeasible totals


def feasible_sparsity_named_by(error: BaseException) -> float:
    match = re.search(r"largest feasible sparsity is\s+([\d.]+\d)", str(error))
    assert match, str(error)
    return float(match[1])


@pytest.mark.parametrize("allocate", ALLOCATIONS)
def test_a_total_below_the_minima_names_received_and_allowed(allocate: Allocate) -> None:
    with pytest.raises(ValueError, match=r"budget of 5 .* at least 6 of 200") as raised:
        allocate([(10, 10), (10, 10)], 5, min_active=3)
    assert feasible_sparsity_named_by(raised.value) == pytest.approx(0.97)


@given(SHAPES, st.integers(1, 5))
def test_the_largest_feasible_sparsity_that_an_error_names_is_feasible(shapes: list[Shape], min_active: int) -> None:
    least = sum(min(min_active, size) for size in sizes_of(shapes))
    with pytest.raises(ValueError, match="cannot be shared") as raised:
        uniform(shapes, least - 1, min_active=min_active)
    named = feasible_sparsity_named_by(raised.value)
    total = num_active(named, sum(sizes_of(shapes)))
    assert sum(uniform(shapes, total, min_active=min_active)) == total


@pytest.mark.parametrize("allocate", ALLOCATIONS)
def test_a_total_above_the_capacities_is_not_answered_with_ask_for_less(allocate: Allocate) -> None:
    with pytest.raises(ValueError, match=r"budget of 101 .* at most 100") as raised:
        allocate([(10, 10)], 101)
    assert "ask for less" not in str(raised.value)  # less sparsity would be more weights


@pytest.mark.parametrize("allocate", ALLOCATIONS)
def test_a_negative_total_is_refused(allocate: Allocate) -> None:
    with pytest.raises(ValueError, match="-1"):
        allocate([(10, 10)], -1)
