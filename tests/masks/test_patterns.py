"""Patterns: worked by hand, against slow references, and under the methods that take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_sparse import DSR, FGGP, GMP, MEST, SET, SNFS, GraNet, RigL, prune
from lightning_sparse.functional import num_active
from lightning_sparse.masks import MaskedWeight, select_weights
from lightning_sparse.masks.patterns import AnyPattern, ConstantFanIn, Filters, NofM, Pattern, as_pattern
from lightning_sparse.masks.pool import MaskPool
from lightning_sparse.methods import ScoredMethod
from lightning_sparse.schedules import Cosine, Linear
from lightning_sparse.testing import ToyClassifier
from tests.helpers import make_trainer

if TYPE_CHECKING:
    from pathlib import Path


SHAPED: dict[str, Pattern] = {"2:4": NofM(2, 4), "1:4": NofM(1, 4), "fan-in": ConstantFanIn(), "filters": Filters()}


def weight_of(values: Tensor) -> MaskedWeight:
    """A linear or convolution weight of these values."""
    outputs, inputs, *kernel = values.shape
    layer = nn.Conv2d(inputs, outputs, tuple(kernel)) if kernel else nn.Linear(inputs, outputs)  # type: ignore[arg-type]
    layer.weight = nn.Parameter(values.clone())
    return MaskPool(select_weights(layer).masked)[0]


def chosen(
    pattern: Pattern, values: list[list[float]], k: int, among: list[list[int]] | None = None
) -> list[list[int]]:
    weight = weight_of(torch.tensor(values))
    eligible = torch.ones_like(weight.mask) if among is None else torch.tensor(among, dtype=torch.bool)
    assert pattern.feasible(weight, k, eligible) == k
    return pattern.largest(weight, weight.value, k, eligible, key=torch.abs).int().tolist()


# By hand, eight weights.

ROWS = [[0.1, -0.9, 0.3, 0.2], [0.8, 0.7, -0.6, 0.5]]


def test_two_of_four() -> None:
    assert chosen(NofM(2, 4), ROWS, 4) == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_below_the_pattern_the_largest_of_those_that_fit_it_stay() -> None:
    # of .9, .3 | .8, .7 the three largest
    assert chosen(NofM(2, 4), ROWS, 3) == [[0, 1, 0, 0], [1, 1, 0, 0]]


def test_a_budget_between_the_pattern_and_dense_takes_a_looser_one() -> None:
    assert chosen(NofM(2, 4), ROWS, 6) == [[0, 1, 1, 1], [1, 1, 1, 0]]


def test_the_same_fan_in_for_all() -> None:
    assert chosen(ConstantFanIn(), ROWS, 4) == [[0, 1, 1, 0], [1, 1, 0, 0]]
    assert chosen(ConstantFanIn(), ROWS, 2) == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_neurons_that_are_wholly_pruned_do_not_count() -> None:
    assert chosen(ConstantFanIn(), ROWS, 3, among=[[0, 0, 0, 0], [1, 1, 1, 1]]) == [[0, 0, 0, 0], [1, 1, 1, 0]]


def test_fewer_weights_than_neurons_go_to_those_with_the_largest() -> None:
    assert chosen(ConstantFanIn(), ROWS, 1) == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert chosen(ConstantFanIn(), ROWS, 1, among=[[1, 0, 1, 1], [1, 1, 1, 1]]) == [[0, 0, 0, 0], [1, 0, 0, 0]]


def test_whole_filters_by_their_norm() -> None:
    # √.95 and √1.74
    assert chosen(Filters(), ROWS, 4) == [[0, 0, 0, 0], [1, 1, 1, 1]]


def test_equal_scores_are_taken_in_the_order_of_their_places() -> None:
    assert chosen(NofM(2, 4), [[1.0] * 4, [1.0] * 4], 4) == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_a_block_of_a_convolution_runs_along_its_inputs() -> None:
    values = torch.arange(1.0, 17.0).view(1, 4, 2, 2)
    weight = weight_of(values)
    mask = NofM(2, 4).largest(weight, values, 8, torch.ones_like(weight.mask))
    assert mask.sum(dim=1).tolist() == [[[2, 2], [2, 2]]]
    assert mask[0, 2:].all()


# Properties.


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    shape = (draw(st.integers(1, 5)), 4 * draw(st.integers(1, 3)), *([2, 1] if draw(st.booleans()) else []))
    numel = torch.Size(shape).numel()
    values = draw(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 2.0]), min_size=numel, max_size=numel))
    among = draw(st.lists(st.booleans(), min_size=numel, max_size=numel))
    return torch.tensor(values).view(shape), torch.tensor(among).view(shape), draw(st.integers(0, numel))


def obeys(pattern: Pattern, weight: MaskedWeight, mask: Tensor, k: int) -> bool:
    rows = weight.rows(mask)
    if isinstance(pattern, NofM) and k < weight.numel:
        blocks = mask.movedim(1, -1).reshape(-1, mask.shape[1] // pattern.m, pattern.m)
        return int(blocks.sum(dim=-1).max()) <= max(pattern.n, pattern.m * k // weight.numel)
    if isinstance(pattern, ConstantFanIn):
        return len(set(rows.sum(dim=1).tolist()) - {0}) <= 1
    if isinstance(pattern, Filters):
        return bool((rows.all(dim=1) | ~rows.any(dim=1)).all())
    return True


@pytest.mark.parametrize("pattern", [AnyPattern(), *SHAPED.values()], ids=str)
@given(layer=layers())
def test_a_mask_has_the_pattern_the_count_and_nothing_else(pattern: Pattern, layer: tuple[Tensor, Tensor, int]) -> None:
    values, among, budget = layer
    weight = weight_of(values)
    if isinstance(pattern, Filters):  # takes and leaves whole rows
        among = weight.from_rows(weight.rows(among)[:, :1].expand(weight.rows(among).shape).contiguous())
    if isinstance(pattern, AnyPattern):
        budget = min(budget, int(among.sum()))
    k = pattern.feasible(weight, budget, among)
    mask = pattern.largest(weight, values, k, among, key=torch.abs)
    assert int(mask.sum()) == k
    assert k <= max(budget, pattern.least(weight))
    assert not (mask & ~among).any()
    assert obeys(pattern, weight, mask, k)


@given(layer=layers(), m=st.sampled_from([2, 4]))
def test_n_of_m_is_the_best_of_all_masks_of_its_count(layer: tuple[Tensor, Tensor, int], m: int) -> None:
    values, _, _ = layer
    weight = weight_of(values)
    k = weight.numel // m
    mask = NofM(1, m).largest(weight, values, k, torch.ones_like(weight.mask), key=torch.abs)
    best = sum(float(block.abs().max()) for block in values.movedim(1, -1).reshape(-1, m))
    assert float(values[mask].abs().sum()) == pytest.approx(best)


# Under the methods.


class Four(ToyClassifier):
    """Linear layers of 16, 32 and 6 inputs, of which the last is no multiple of four."""

    def __init__(self) -> None:
        super().__init__(
            lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3)),
            (16,),
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
            8,
            64,
            0,
        )


OFTEN: dict[str, Any] = {"update_every": 2, "stop": 11, "allocation": "uniform"}
METHODS: dict[str, Any] = {
    "gmp": lambda s, **more: GMP(s, **OFTEN, **more),
    "fggp": lambda s, **more: FGGP(s, **OFTEN, **more),
    "set": lambda s, **more: SET(s, **OFTEN, **more),
    "rigl": lambda s, **more: RigL(s, **OFTEN, **more),
}
OTHERS: dict[str, Any] = {
    "set, no regrowth": lambda s, **more: SET(s, **OFTEN, regrow=False, **more),
    "falling": lambda s, **more: SET(Cosine(s, 0.3), **OFTEN, **more),
    "granet": lambda s, **more: GraNet(s, **OFTEN, **more),
    "mest": lambda s, **more: MEST(s, **OFTEN, soft=True, **more),
    "snfs": lambda s, **more: SNFS(s, **OFTEN, **more),
    "snfs, rising": lambda s, **more: SNFS(Linear(0.2, s), **OFTEN, **more),
    "dsr": lambda s, **more: DSR(s, **OFTEN, **more),
}


class Obeys(L.Callback):
    """Looks at every mask after every step, and after every update at what the schedule asks for."""

    def __init__(self, method: ScoredMethod, pattern: Pattern) -> None:
        self.method, self.pattern, self.looks = method, pattern, 0

    def on_train_batch_end(self, *_: Any) -> None:
        for weight in self.method.weights:
            assert obeys(self.pattern, weight, weight.mask, weight.num_active), weight
            assert weight.num_active == int(weight.mask.sum()) == weight.budget
            self.looks += 1
        self.method.step -= 1  # it has just been counted
        for group in self.method.groups:
            if group.updated_at == self.method.step:
                assert group.num_active <= num_active(self.method.sparsity_now, group.numel)
        self.method.step += 1


@pytest.mark.filterwarnings("ignore:.*hardly any gradient reaches")
@pytest.mark.parametrize("sparsity", [0.75, 0.9])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pattern", SHAPED)
def test_methods_hold_a_pattern_and_their_budget(name: str, pattern: str, sparsity: float, tmp_path: Path) -> None:
    method = METHODS[name](sparsity, pattern=SHAPED[pattern])
    obeys = Obeys(method, SHAPED[pattern])
    make_trainer(tmp_path, callbacks=[method, obeys]).fit(Four())
    assert obeys.looks > 0
    zeros = 1.0 - sum(w.num_active for w in method.weights) / sum(w.numel for w in method.weights)
    assert method.target_sparsity() == pytest.approx(zeros)
    assert zeros >= sparsity
    masked = {"network.0.weight", "network.2.weight", "network.4.weight"}
    left_out = {"fan-in": set[str](), "filters": {"network.4.weight"}}.get(pattern, {"network.4.weight"})
    assert set(method.registry) == masked - left_out


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("pattern", SHAPED)
def test_methods_that_move_budgets_hold_them_too(name: str, pattern: str, tmp_path: Path) -> None:
    method = OTHERS[name](0.8, pattern=SHAPED[pattern])
    obeys = Obeys(method, SHAPED[pattern])
    make_trainer(tmp_path, callbacks=[method, obeys]).fit(Four())
    assert obeys.looks > 0


def test_a_budget_below_one_filter_of_each_layer_is_refused(tmp_path: Path) -> None:
    # 16 of 512 and 32 of 192; 0.95 leaves 35 of 704
    with pytest.raises(Exception, match=r"at least 48 must stay active .*largest feasible sparsity is 0\.931818"):
        make_trainer(tmp_path, callbacks=[GMP(0.95, pattern=Filters())]).fit(Four())


def test_what_never_grows_wakes_no_zero_of_inherited_masks(tmp_path: Path) -> None:
    """Filters that are pruned in part are no whole filters."""
    model = Four()
    masks = prune(model, 0.5, allocation="uniform", exclude=["network.4.*"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Exception, match=r"a mask of network\.0\.weight that .*would train \d+ of the zeros"):
        make_trainer(tmp_path, callbacks=[GMP(0.75, pattern=Filters())]).fit(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for pattern in ("2:4", ConstantFanIn()):
        make_trainer(tmp_path, callbacks=[GMP(0.75, pattern=pattern, **OFTEN)]).fit(model)
        for name in ("network.0.weight", "network.2.weight"):
            assert not (model.state_dict()[name].bool() & ~masks[name]).any()


def test_a_layer_that_does_not_fit_stays_dense_with_the_reason(tmp_path: Path) -> None:
    method = GMP(0.5, pattern="2:4", **OFTEN)
    make_trainer(tmp_path, callbacks=[method]).fit(Four())
    reasons = {candidate.name: candidate.reason for candidate in method.dense}
    assert reasons["network.4.weight"] == "pattern: 6 inputs are not a multiple of 4"


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("4:2", r"give 1 ≤ n < m, such as NofM\(2, 4\)"),
        ("2-4", r"pattern is '2-4'; give 'any', N of M as '2:4'"),
        (3, r"pattern is 3; give"),
        ("0:4", r"give 1 ≤ n < m"),
    ],
)
def test_what_is_no_pattern_is_refused(pattern: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GMP(0.5, pattern=pattern)


def test_a_pattern_over_all_layers_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chosen layer by layer. Give allocation='uniform' or 'erk'"):
        FGGP(0.5, pattern="2:4")


def test_a_pattern_that_no_layer_fits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"cannot mask any weight of this module: .*not a multiple of 7"):
        make_trainer(tmp_path, callbacks=[GMP(0.5, pattern="2:7")]).fit(Four())


def test_the_short_forms() -> None:
    assert as_pattern("any") == AnyPattern()
    assert as_pattern("2:4") == NofM(2, 4)
