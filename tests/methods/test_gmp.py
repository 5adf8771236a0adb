from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sparse import DSR, FGGP, GMP, MEST, SNFS, TopKAST
from lightning_sparse.functional import erdos_renyi, erdos_renyi_kernel, num_active, uniform
from lightning_sparse.masks import MaskedWeight, MaskGroup, MaskRegistry, select_weights
from lightning_sparse.methods.card import method
from lightning_sparse.methods.scored import ScoredMethod
from lightning_sparse.methods.state import check_state
from lightning_sparse.schedules import Constant, Linear, Polynomial, Schedule
from tests.helpers import ConvToy, ToyModel, make_trainer, within_training

VALUE = st.sampled_from([-1.0, -0.5, 0.0, 0.125, 0.25, 0.5, 1.0, 2.0])  # ties are the rule


def layers_of(rows: Sequence[Sequence[float]], grads: Sequence[Sequence[float]] | None = None) -> MaskGroup:
    """A group of linear layers with one output each, with these weights and gradients; all active."""
    module = nn.ModuleList(nn.Linear(len(row), 1, bias=False) for row in rows)
    for layer, row in zip(module, rows, strict=True):
        layer.weight = nn.Parameter(torch.tensor([row]))
    for layer, grad in zip(module, grads or (), strict=bool(grads)):
        layer.weight.grad = torch.tensor([grad])
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (group,) = MaskRegistry().claim("method", select_weights(module).masked, [optimizer])
    return group


@torch.no_grad()
def prune(method: ScoredMethod, group: MaskGroup) -> list[int]:
    """The flat indices that one update at the end of the schedule prunes."""
    within_training(method, [group]).update_masks(group)
    return (~group.mask).nonzero().squeeze(1).tolist()


# By hand. Eight weights in two layers:
#   index   0    1    2    3   |  4    5    6    7
#   |w|    .9   .6   .5   .7   | .3   .1   .4   .05
A, B = [0.9, -0.6, 0.5, -0.7], [0.3, 0.1, -0.4, 0.05]


def test_together_the_smallest_of_all_weights_go() -> None:
    # 4 of 8: .05, .1, .3, .4 are all of the second layer.
    assert prune(GMP(0.5, allocation="global"), layers_of([A, B])) == [4, 5, 6, 7]


def test_layer_by_layer_the_smallest_of_each_go() -> None:
    # 2 of 4 in each: .5 and .6; .05 and .1.
    assert prune(GMP(0.5), layers_of([A, B])) == [1, 2, 5, 7]


def test_a_second_update_prunes_only_what_is_missing() -> None:
    group = layers_of([A, B])
    assert prune(GMP(0.25), group) == [2, 7]
    group.recount()
    assert prune(GMP(0.5), group) == [1, 2, 5, 7]


def test_a_pruned_weight_is_not_chosen_again_though_it_is_the_smallest() -> None:
    group = layers_of([A, B])
    group.mask[[0, 4]] = False  # as if .9 and .3 had been pruned before
    group.recount()
    assert prune(GMP(0.5), group) == [0, 2, 4, 7]


def test_a_sparser_group_than_is_asked_for_is_left_as_it_is() -> None:
    group = layers_of([A, B])
    group.mask[2:8] = False
    group.recount()
    assert prune(GMP(0.5, allocation="global"), group) == [2, 3, 4, 5, 6, 7]


def test_gradients_do_not_matter() -> None:
    assert prune(GMP(0.5), layers_of([A, B], [[9.0, 0.0, 9.0, 0.0], [9.0, 9.0, 0.0, 9.0]])) == [1, 2, 5, 7]


def test_min_active_keeps_the_largest_of_each_layer() -> None:
    # 4 of 8 together, but .4 stays: .5 goes instead.
    assert prune(GMP(0.5, allocation="global", min_active=1), layers_of([A, B])) == [2, 4, 5, 7]


def test_min_active_of_a_layer_takes_weights_from_the_larger_layer() -> None:
    # uniform: 4 of 12 are 2.67 and 1.33, but each keeps 2.
    group = layers_of([[*A, *B], A])
    assert prune(GMP(2 / 3, min_active=2), group) == [1, 2, 4, 5, 6, 7, 9, 10]


def test_zero_weights_that_are_active_are_pruned_like_any_other() -> None:
    assert prune(GMP(0.5), layers_of([[0.0, 0.0, 0.0, 1.0]])) == [0, 1]


# Against a slow reference


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[list[float]], float]:
    rows = draw(st.lists(st.lists(VALUE, min_size=1, max_size=8), min_size=1, max_size=4))
    return rows, draw(st.integers(0, 99)) / 100


@given(networks())
def test_together_it_is_what_sorting_all_weights_would_prune(network: tuple[list[list[float]], float]) -> None:
    rows, sparsity = network
    flat = [abs(value) for row in rows for value in row]
    budget = num_active(sparsity, len(flat))
    expected = sorted(sorted(range(len(flat)), key=lambda i: (flat[i], i))[: len(flat) - budget])
    assert prune(GMP(sparsity, allocation="global"), layers_of(rows)) == expected


@given(networks())
def test_layer_by_layer_it_is_what_sorting_each_would_prune(network: tuple[list[list[float]], float]) -> None:
    rows, sparsity = network
    budgets = uniform([(1, len(row)) for row in rows], num_active(sparsity, sum(map(len, rows))))
    expected, offset = [], 0
    for row, budget in zip(rows, budgets, strict=True):
        order = sorted(range(len(row)), key=lambda i: (abs(row[i]), i))
        expected += [offset + i for i in order[: len(row) - budget]]
        offset += len(row)
    assert prune(GMP(sparsity), layers_of(rows)) == sorted(expected)


@pytest.mark.parametrize("share", [erdos_renyi, erdos_renyi_kernel], ids=["er", "erk"])
def test_layers_are_pruned_to_the_shares_of_their_allocation(share: Any) -> None:
    model = ConvToy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (group,) = MaskRegistry().claim("method", select_weights(model).masked, [optimizer])
    allocation: Any = "er" if share is erdos_renyi else "erk"
    prune(GMP(0.8, allocation=allocation), group)
    shapes = [tuple(weight.shape) for weight in group]
    assert [int(weight.mask.sum()) for weight in group] == share(shapes, num_active(0.8, group.numel))


# Real fits


class Record(L.Callback):
    """The masks in force after each batch."""

    def __init__(self, method: ScoredMethod) -> None:
        self.method = method
        self.masks: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.masks.append({name: weight.mask.clone() for name, weight in self.method.registry.items()})

    @property
    def counts(self) -> list[int]:
        return [sum(int(mask.sum()) for mask in masks.values()) for masks in self.masks]


def fit(method: ScoredMethod, root: Path, model: L.LightningModule | None = None, **settings: Any) -> Record:
    record = Record(method)
    make_trainer(root, callbacks=[method, record], **settings).fit(model or ToyModel())
    return record


def cubic(final: float, step: int, start: int, stop: int) -> float:
    return final * (1 - (1 - min(max(step - start, 0) / (stop - start), 1.0)) ** 3)


@pytest.mark.parametrize("allocation", ["global", "uniform", "er", "erk"])
def test_sparsity_follows_the_cubic_at_every_step_of_a_fit(allocation: Any, tmp_path: Path) -> None:
    record = fit(GMP(0.9, allocation=allocation, update_every=3, start=2, stop=12), tmp_path)
    updates = [2, 5, 8, 11, 12]
    for step, count in enumerate(record.counts):  # 16 steps; the model has 344 weights
        latest = max((update for update in updates if update <= step), default=0)
        exact = 344 * (1 - cubic(0.9, latest, start=2, stop=12))
        assert count in {math.floor(exact - 1e-9), math.floor(exact + 1e-9)}, step
    assert record.counts[-1] == 34


@pytest.mark.parametrize("method", [GMP, FGGP])
def test_default_times_reach_the_sparsity_in_a_short_fit(method: type[GMP] | type[FGGP], tmp_path: Path) -> None:
    assert fit(method(0.95), tmp_path).counts[-1] == 17  # ⌊0.05 · 344⌋


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_a_pruned_weight_never_returns(allocation: Any, tmp_path: Path) -> None:
    record = fit(GMP(0.9, allocation=allocation, update_every=1), tmp_path)
    for before, after in zip(record.masks, record.masks[1:], strict=False):
        assert all(not (after[name] & ~before[name]).any() for name in after)


@pytest.mark.parametrize("allocation", ["global", "uniform", "er", "erk"])
def test_a_fit_that_begins_half_pruned_begins_at_random_masks_of_that_count(allocation: Any, tmp_path: Path) -> None:
    method = GMP(Polynomial(0.5, 0.9), allocation=allocation, start=4, stop=12)
    record = fit(method, tmp_path)
    shapes = [(16, 12), (8, 16), (3, 8)]
    share = {"uniform": uniform, "er": erdos_renyi}.get(allocation, erdos_renyi_kernel)
    assert [int(mask.sum()) for mask in record.masks[0].values()] == share(shapes, 172)
    assert record.counts[-1] == 34


def test_initial_random_masks_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def first_mask(seed: int, global_seed: int) -> Tensor:
        L.seed_everything(global_seed, verbose=False)
        masks = fit(GMP(Constant(0.5), seed=seed), tmp_path, max_steps=1).masks[0]
        return torch.cat([mask.flatten() for mask in masks.values()])

    assert torch.equal(first_mask(0, 1), first_mask(0, 2))
    assert not torch.equal(first_mask(0, 1), first_mask(1, 1))


def test_initial_random_masks_do_not_keep_the_largest_weights(tmp_path: Path) -> None:
    model = ToyModel()
    dense = model.get_parameter("network.0.weight").detach().abs().flatten().clone()
    masks = fit(GMP(Constant(0.5)), tmp_path, model, max_steps=1).masks[0]
    kept = dense[masks["network.0.weight"].flatten()]
    assert 0.5 < float(kept.mean() / dense.mean()) < 1.5


@pytest.mark.parametrize("allocation", ["global", "uniform", "er", "erk"])
def test_min_active_holds_in_every_layer_at_every_step(allocation: Any, tmp_path: Path) -> None:
    record = fit(GMP(0.95, allocation=allocation, min_active=4, update_every=1), tmp_path)
    assert all(int(mask.sum()) >= 4 for masks in record.masks for mask in masks.values())
    assert record.counts[-1] == 17


def test_pruning_in_one_shot_works(tmp_path: Path) -> None:
    record = fit(GMP(0.9, start=10, stop=10), tmp_path)  # the first epoch ends at step 8
    assert record.counts == 10 * [344] + 6 * [sum(uniform([(16, 12), (8, 16), (3, 8)], 34))]


@pytest.mark.filterwarnings("ignore:.*no more than one weight per output")
def test_a_schedule_that_is_constant_keeps_its_random_masks(tmp_path: Path) -> None:
    record = fit(GMP(Constant(0.9)), tmp_path)
    assert record.counts == 16 * [34]
    assert all(torch.equal(record.masks[0][name], mask) for name, mask in record.masks[-1].items())


def test_updates_are_counted_where_masks_change_and_only_there(tmp_path: Path) -> None:
    method = GMP(0.9, update_every=4, start=0, stop=12)  # dense at 0, then at 4, 8 and 12
    record = fit(method, tmp_path)
    changes = sum(before != after for before, after in zip([344, *record.counts], record.counts, strict=False))
    assert method.registry.num_updates == changes == 3


def test_the_target_is_the_schedules_and_that_of_a_layer_its_budget(tmp_path: Path) -> None:
    method = GMP(0.9, stop=12)
    fit(method, tmp_path)
    assert method.target_sparsity() == 0.9
    weight = method.registry["network.2.weight"]
    assert method.target_sparsity("network.2.weight") == weight.sparsity == 1 - weight.budget / weight.numel


def test_a_sparsity_below_min_active_is_refused_with_one_that_is_feasible(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"34 of the 344 weights .* but at least 60") as raised:
        fit(GMP(0.9, min_active=20), tmp_path)
    named = re.search(r"largest feasible sparsity is ([\d.]+\d)", str(raised.value))
    assert named
    fit(GMP(float(named[1]), min_active=20), tmp_path)


@pytest.mark.parametrize("method", [GMP, FGGP])
def test_a_schedule_whose_sparsity_falls_is_refused(method: type[GMP] | type[FGGP]) -> None:
    with pytest.raises(ValueError, match=r"0\.9.*0\.5"):  # what is pruned stays pruned, so 0.5 cannot be reached
        method(Linear(0.9, 0.5))


# Arguments


@pytest.mark.parametrize("method", [GMP, FGGP])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1.* \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity is -0\.1.* \[0, 1\)"),
        ({"sparsity": 90}, r"sparsity is 90.* \[0, 1\).* Did you mean 0\.9\?"),
        ({"sparsity": math.nan}, r"sparsity is nan.* \[0, 1\)"),
        ({"sparsity": "0.9"}, r"0\.9"),
        ({"sparsity": None}, r"None"),
        ({"allocation": "Global"}, r"allocation is 'Global'; .*'global', 'uniform', 'er', 'erk'"),
        ({"update_every": 0}, r"update_every is 0; .*at least 1 step"),
        ({"update_every": -3}, r"update_every is -3; .*int.*float"),
        ({"update_every": 1.5}, r"update_every is 1\.5; .*\[0, 1\]"),
        ({"update_every": True}, r"update_every is True"),
        ({"start": -1}, r"start is -1; .*int.*float"),
        ({"stop": 1.01}, r"stop is 1\.01; .*\[0, 1\]"),
        ({"start": 0.9, "stop": 0.8}, r"start \(0\.9\) comes after stop \(0\.8\)"),
        ({"min_active": -1}, r"min_active is -1; .*at least 0"),
        ({"min_active": 1.5}, r"min_active is 1\.5"),
        ({"include": "Linear"}, r"include is the string 'Linear'; .*\['Linear'\]"),
        ({"exclude": "Linear"}, r"exclude is the string 'Linear'; .*\['Linear'\]"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named_with_its_value_and_what_is_allowed(
    method: type[GMP] | type[FGGP], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        method(**(dict[str, Any](sparsity=0.9) | arguments))


def test_a_schedule_that_leaves_the_range_is_refused_where_it_does() -> None:
    class Rising(Schedule):
        def __call__(self, progress: float) -> float:
            return 2 * progress

    with pytest.raises(ValueError, match=r"sparsity is 2 at progress 1\.00"):
        GMP(Rising())


class Adversarial(L.LightningModule):
    """A generator whose turn comes every few batches, and a discriminator that is stepped at each."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every
        self.generator, self.discriminator = nn.Linear(8, 8), nn.Linear(8, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        generator, discriminator = cast("list[LightningOptimizer]", self.optimizers())
        discriminator.zero_grad()
        loss = self.discriminator(self.generator(batch).detach()).mean() - self.discriminator(batch).mean()
        self.manual_backward(loss)
        discriminator.step()
        if batch_idx % self.every == 0:
            generator.zero_grad()
            self.manual_backward(-self.discriminator(self.generator(batch)).mean())
            generator.step()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return torch.optim.Adam(self.generator.parameters()), torch.optim.Adam(self.discriminator.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(64, 8), batch_size=8)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_clock_counts_batches_where_another_optimizer_steps_oftener(every: int, tmp_path: Path) -> None:
    method = GMP(0.75, include=["generator.*"])
    make_trainer(tmp_path, callbacks=[method], max_epochs=8).fit(Adversarial(every))
    assert method.step == 64
    assert method.registry.sparsity == 0.75


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("stop", [1.0, 0.8])
def test_the_epoch_that_averaging_adds_for_batch_norm_has_no_steps(
    accumulated: int, stop: float, tmp_path: Path
) -> None:
    gmp = GMP(0.9, stop=stop)
    model = ConvToy()
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    make_trainer(tmp_path, callbacks=[gmp, average], max_epochs=5, accumulate_grad_batches=accumulated).fit(model)
    assert gmp.run.total_steps == 5 * 8 // accumulated
    assert gmp.registry.sparsity == pytest.approx(0.9, abs=0.005)
    assert sum(int((w.value == 0).sum()) for w in gmp.weights) == sum(w.numel - w.num_active for w in gmp.weights)


@pytest.mark.parametrize("scheduling", [{0: 3}, {0: 1, 1: 3}, {2: 5, 9: 1}])
@pytest.mark.parametrize("max_steps", [-1, 10])
def test_batches_are_accumulated_in_other_numbers_in_later_epochs(
    scheduling: dict[int, int], max_steps: int, tmp_path: Path
) -> None:
    gmp = GMP(0.9, stop=1.0)
    accumulate = GradientAccumulationScheduler(scheduling)
    make_trainer(tmp_path, callbacks=[gmp, accumulate], max_epochs=4, max_steps=max_steps).fit(ToyModel())
    assert gmp.run.total_steps == gmp.step
    assert gmp.registry.sparsity == pytest.approx(0.9, abs=0.005)


# An update that fails, and schedules of a user's own.


@method
class Spoiled(ScoredMethod):
    """Scores of the last layer are NaN from step 5 on."""

    def drop_scores(self, weight: MaskedWeight) -> Tensor:
        return weight.value * math.nan if self.step >= 5 and weight is self.weights[-1] else weight.value


def test_an_update_that_fails_leaves_masks_counts_and_budgets_as_they_were(tmp_path: Path) -> None:
    spoiled = Spoiled(Linear(0.0, 0.8), allocation="uniform", update_every=2, start=1, stop=11)
    with pytest.raises(ValueError, match="NaN"):
        make_trainer(tmp_path, callbacks=[spoiled]).fit(ToyModel())
    assert spoiled.weights[0].sparsity == pytest.approx(0.16, abs=0.01)  # at step 3, the second of five fifths
    for weight in spoiled.weights:
        assert weight.budget == weight.num_active == int(weight.mask.sum())
    state = spoiled.state_dict()
    assert check_state(state, spoiled.state_key, spoiled.state_fields()) is state


class Squared(Schedule):
    """A schedule without a name of its own for what it is."""

    def __init__(self, final: float) -> None:
        self.final = final

    def __call__(self, progress: float) -> float:
        return self.final * progress**2


def test_settings_say_what_a_schedule_is_and_not_where() -> None:
    assert GMP(Squared(0.8)).settings() == GMP(Squared(0.8)).settings()
    assert GMP(Squared(0.8)).settings() != GMP(Squared(0.7)).settings()
    assert GMP(Squared(0.8)).settings() != GMP(Constant(0.8)).settings()


class Small(ToyModel):
    """Of 12 inputs a hundredth is little."""

    @staticmethod
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


NAMED = r"network\.0\.weight \(1 of 192\) will have fewer than one weight for every 8 outputs.*Give allocation='erk'"


@pytest.mark.filterwarnings("ignore:.*(without an|no) active")
def test_a_small_layer_that_the_same_sparsity_starves_is_named(tmp_path: Path) -> None:
    # Of 496 weights three stay: one of 192 for 16 outputs, two of 256 for as many, none of the last.
    with pytest.warns(UserWarning, match=NAMED):
        make_trainer(tmp_path, callbacks=[GMP(0.992)]).fit(Small())


@pytest.mark.filterwarnings("ignore:.*(without an|no) active")
@pytest.mark.parametrize("settings", [{"allocation": "erk"}, {"exclude": ["network.0.*"]}, {"sparsity": 0.95}])
def test_where_no_layer_is_starved_none_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"sparsity": 0.992} | settings
    make_trainer(tmp_path, callbacks=[GMP(**arguments)]).fit(Small())  # a warning would be an error


@pytest.mark.filterwarnings("ignore:.*(without an|no) active")
@pytest.mark.filterwarnings("ignore:.*hardly any gradient")
@pytest.mark.parametrize("kind", [MEST, DSR, SNFS, TopKAST])
def test_where_training_begins_with_one_random_weight_to_an_output_this_is_said(kind: Any, tmp_path: Path) -> None:
    names = r"network\.0\.weight \(9 of 192\).*network\.4\.weight \(2 of 48\) will have no more than"
    with pytest.warns(UserWarning, match=names + r" one weight per output, at random.*Give allocation='erk'"):
        make_trainer(tmp_path, callbacks=[kind(0.95)]).fit(Small())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*with the same sparsity as all other")
        make_trainer(tmp_path, callbacks=[kind(0.95, allocation="erk")]).fit(Small())
