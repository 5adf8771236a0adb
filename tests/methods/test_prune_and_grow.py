"""SET, RigL and EAST on weights that can be worked by hand, and against a slow obvious reference."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_sparse import EAST, GMP, SET, DyReLUPhasing, RigL, WeightSharing
from lightning_sparse.functional import erdos_renyi_kernel, num_active
from lightning_sparse.masks import select_weights
from lightning_sparse.modules import share_weights
from lightning_sparse.modules.dyrelu import phased_relus
from lightning_sparse.schedules import Constant, Cyclic, Linear, as_schedule
from lightning_sparse.zoo import ResNet34, ResNet50
from tests.helpers import ConvToy, ToyModel, make_trainer
from tests.methods.hand import layers, prepared

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from lightning_sparse import SparseMethod
    from lightning_sparse.methods.growing import GrowingMethod


class EightWeights(L.LightningModule):
    """Eight weights whose gradient is given: the loss is their product with it."""

    def __init__(self, grad: list[float], lr: float = 0.0, steps: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1, bias=False)
        self.grad = torch.tensor([grad])
        self.lr = lr
        self.steps = steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.layer.weight * self.grad).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(self.steps, 1))  # pyright: ignore[reportArgumentType]


class Begin(L.Callback):
    """Puts a state by hand in the place of a random beginning."""

    def __init__(self, method: GrowingMethod, weight: list[float], mask: list[int]) -> None:
        self.method, self.weight, self.mask = method, weight, mask

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (weight,) = self.method.weights
        weight.mask.copy_(torch.tensor([self.mask], dtype=torch.bool))
        with torch.no_grad():
            weight.parameter.copy_(torch.tensor([self.weight]))
        self.method.groups[0].recount()


def one_update(method: GrowingMethod, weight: list[float], mask: list[int], grad: list[float], root: Path) -> Any:
    """Take two steps, with an update at the second; return the module."""
    model = EightWeights(grad)
    make_trainer(root, callbacks=[method, Begin(method, weight, mask)], max_epochs=1).fit(model)
    return model


WEIGHT = [0.9, -0.1, 0.5, -0.2, 0.0, 0.0, 0.0, 0.0]
MASK = [1, 1, 1, 1, 0, 0, 0, 0]
GRAD = [0.0, 9.0, 0.0, 0.1, -3.0, 1.0, 2.0, -0.5]
HALF: dict[str, Any] = {"sparsity": 0.5, "drop_fraction": Constant(0.5), "update_every": 1, "stop": 1}


def mask_of(method: GrowingMethod) -> list[int]:
    return method.weights[0].mask.int().flatten().tolist()


def test_rigl_prunes_the_smallest_and_grows_where_the_gradient_is_largest(tmp_path: Path) -> None:
    # ⌊0.5 · 4⌋ = 2: −0.1 and −0.2 are pruned; of the six then inactive |∂L/∂w| is 9, 0.1, 3, 1, 2, 0.5: the first of
    # these is the one just pruned.
    rigl = RigL(**HALF, update_replaces_step=False)
    model = one_update(rigl, WEIGHT, MASK, GRAD, tmp_path)
    assert mask_of(rigl) == [1, 1, 1, 0, 1, 0, 0, 0]
    assert model.layer.weight.flatten().tolist() == pytest.approx([0.9, -0.1, 0.5, 0, 0, 0, 0, 0])


def test_rigl_that_may_not_regrow_takes_the_next(tmp_path: Path) -> None:
    rigl = RigL(**HALF, update_replaces_step=False, regrow=False)
    one_update(rigl, WEIGHT, MASK, GRAD, tmp_path)
    assert mask_of(rigl) == [1, 0, 1, 0, 1, 0, 1, 0]


def test_a_grown_weight_begins_at_zero_without_momentum(tmp_path: Path) -> None:
    rigl = RigL(**HALF, update_replaces_step=False, regrow=False)
    model = EightWeights(GRAD, lr=0.001)
    trainer = make_trainer(tmp_path, callbacks=[rigl, Begin(rigl, WEIGHT, MASK)], max_epochs=1)
    trainer.fit(model)
    momentum = trainer.optimizers[0].state[model.layer.weight]["momentum_buffer"].flatten()
    assert momentum[4].item() == -3.0  # of this step alone
    assert model.layer.weight[0, 4].item() == pytest.approx(0.003)  # 0 − 0.001 · (−3)
    assert momentum[[1, 3]].tolist() == [0.0, 0.0]


def test_where_rigl_updates_no_step_is_taken(tmp_path: Path) -> None:
    arguments: dict[str, Any] = HALF | {"update_every": 2, "stop": 2}
    rigl = RigL(**arguments)
    model = EightWeights(GRAD, lr=0.001, steps=3)
    make_trainer(tmp_path, callbacks=[rigl, Begin(rigl, WEIGHT, MASK)], max_epochs=1).fit(model)
    # Two steps were taken: w ← w − 0.001 · (1 + 1.9) g on the active four. The update exchanges, and moves nothing.
    assert mask_of(rigl) == [1, 1, 1, 0, 1, 0, 0, 0]
    assert model.layer.weight.flatten().tolist() == pytest.approx([0.9, -0.1 - 0.0261, 0.5, 0, 0, 0, 0, 0])


def test_set_prunes_the_smallest_and_grows_anywhere_else(tmp_path: Path) -> None:
    grown: set[int] = set()
    for seed in range(12):
        method = SET(**HALF, seed=seed)
        one_update(method, WEIGHT, MASK, GRAD, tmp_path)
        mask = mask_of(method)
        assert sum(mask) == 4
        assert mask[0] == mask[2] == 1
        grown |= {index for index in range(8) if mask[index] and index not in (0, 2)}
    assert grown >= {4, 5, 6, 7}


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.25, [1, 1, 1, 1, 1, 0, 1, 0]),  # two more: where |∂L/∂w| is 3 and 2
        (0.75, [1, 0, 1, 0, 0, 0, 0, 0]),  # two fewer: −0.1 and −0.2
        (0.5, [1, 0, 1, 0, 1, 0, 1, 0]),  # none: an exchange
    ],
)
def test_a_new_budget_is_met_by_growing_or_pruning_alone(sparsity: float, expected: list[int], tmp_path: Path) -> None:
    arguments: dict[str, Any] = HALF | {"sparsity": Linear(0.5, sparsity)}
    rigl = RigL(**arguments, update_replaces_step=False, regrow=False)
    one_update(rigl, WEIGHT, MASK, GRAD, tmp_path)
    assert mask_of(rigl) == expected
    assert rigl.target_sparsity() == sparsity


class Counts(L.Callback):
    """Notes the active weights of each layer, and the target, after each step."""

    def __init__(self, method: GrowingMethod) -> None:
        self.method = method
        self.layers: list[list[int]] = []
        self.targets: list[float] = []

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.layers.append([weight.num_active for weight in self.method.weights])
        self.targets.append(self.method.target_sparsity())


@pytest.mark.parametrize("shape", ["cosine", "triangular"])
def test_cyclic_budgets_are_exact_in_every_layer(shape: Any, tmp_path: Path) -> None:
    cyclic = Cyclic(0.8, cycles=2, length=0.4, multiplier=3.0, shape=shape)
    rigl = RigL(cyclic, update_every=1, stop=10, update_replaces_step=False)
    counts = Counts(rigl)
    make_trainer(tmp_path, callbacks=[rigl, counts]).fit(ConvToy())
    shapes = [weight.shape for weight in rigl.weights]
    numel = sum(math.prod(shape) for shape in shapes)
    for step, counted in enumerate(counts.layers[1:], start=0):
        expected = erdos_renyi_kernel(shapes, num_active(cyclic(min(1.0, step / 10)), numel), min_active=1)
        assert counted == expected, step


def test_east_begins_and_ends_each_cycle_at_its_sparsity(tmp_path: Path) -> None:
    east = EAST(0.9, cycle_update_every=1, update_every=4, cycles=2, cycle_length=0.25, phasing=False, sharing=False)
    counts = Counts(east)
    make_trainer(tmp_path, callbacks=[east, counts], max_epochs=5).fit(ToyModel())
    active = [sum(layers) for layers in counts.layers]
    assert active[0] == active[11] == active[-1] == num_active(0.9, 344)
    assert min(max(active[1:11]), max(active[11:21])) > 2.8 * active[0]
    assert set(active[21:]) == {active[0]}


def test_east_exchanges_when_its_cycles_are_over(tmp_path: Path) -> None:
    east = EAST(0.9, cycle_update_every=1, update_every=4, phasing=False, sharing=False)
    masks: list[Tensor] = []

    class Look(L.Callback):
        def on_before_zero_grad(self, *_: Any) -> None:
            masks.append(east.groups[0].mask.clone())

    make_trainer(tmp_path, callbacks=[east, Look()], max_epochs=5).fit(ToyModel())
    changed = {step for step in range(39) if not torch.equal(masks[step], masks[step + 1])}  # step + 1 sees step's
    after = {step for step in changed if step >= 16}
    assert {16, 20, 24} <= after <= {16, 20, 24, 28, 32, 36}  # as the fraction falls, fewer than one weight is due


def masks_of_each_step(east: EAST, root: Path, **settings: Any) -> list[Tensor]:
    masks: list[Tensor] = []

    class Look(L.Callback):
        def on_before_zero_grad(self, *_: Any) -> None:
            masks.append(east.groups[0].mask.clone())

    make_trainer(root, callbacks=[east, Look()], **settings).fit(ToyModel())
    return masks


def test_within_cycles_masks_move_by_what_budgets_ask_for_alone(tmp_path: Path) -> None:
    # Cycles that ask for nothing: as many weights in their middle as at their ends.
    east = EAST(0.9, multiplier=1.0, cycle_update_every=1, update_every=4, phasing=False, sharing=False)
    masks = masks_of_each_step(east, tmp_path, max_epochs=5)
    changed = [step for step in range(39) if not torch.equal(masks[step], masks[step + 1])]
    assert changed
    assert min(changed) > 16  # where the cycles end
    # In cycles that rise and fall, a layer that grows prunes nothing, and one that shrinks grows nothing.
    east = EAST(0.9, cycle_update_every=1, update_every=4, phasing=False, sharing=False)
    masks = masks_of_each_step(east, tmp_path, max_epochs=5)
    for before, after in pairwise(masks[:18]):
        for was, its in zip(before.split([192, 128, 24]), after.split([192, 128, 24]), strict=True):
            assert not ((was & ~its).any() and (its & ~was).any())


def test_an_exchange_of_east_takes_at_least_one_weight_of_each_layer() -> None:
    east = EAST(0.9, cycles=0, drop_fraction=Constant(0.005), update_every=1, stop=1, phasing=False, sharing=False)
    group = layers([[0.9, 0.1, 0.0, 0.0]], [[1, 1, 0, 0]], [[0, 0, 1, 2]])  # ⌈.005 · 2⌉ = 1
    prepared(east, group)
    assert east.kept(group, [2]) == [1]
    assert RigL(0.9).exchanged(group[0], 2) == 0  # which rounds down


@pytest.mark.parametrize(("limit", "expected"), [(None, [0.6, 0.0]), (0.5, [0.3, 0.0]), (2.0, [0.6, 0.0])])
def test_the_dense_norm_of_gradients_can_be_clipped(limit: float | None, expected: list[float], tmp_path: Path) -> None:
    # g = (.6, .8), of norm 1, and only the first is active: to .5 it is halved, though its own norm is .6.
    east = EAST(0.5, cycles=0, phasing=False, sharing=False, stop=1.0, clip_dense_norm=limit)
    seen: list[list[float]] = []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            seen.append(east.weights[0].grad.flatten()[:2].tolist())

    begin = Begin(east, [1.0, 0, 1.0, 1.0, 1.0, 0, 0, 0], [1, 0, 1, 1, 1, 0, 0, 0])
    model = EightWeights([0.6, 0.8, *[0.0] * 6])
    make_trainer(tmp_path, callbacks=[east, begin, Look()], max_epochs=1).fit(model)
    assert seen[0] == pytest.approx(expected)


@pytest.mark.parametrize("limit", [0.0, -1.0, True, "1"])
def test_a_dense_norm_that_is_none_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"clip_dense_norm is .*; give a norm above 0, or None not to clip"):
        EAST(0.9, clip_dense_norm=limit)


# The scale of sparse initial weights.


@pytest.mark.filterwarnings("ignore:RigL at step 16. resumed with 32 steps of training")
def test_initial_weights_are_scaled_by_the_root_of_their_density_once(tmp_path: Path) -> None:
    plain, model = ToyModel(), ToyModel()
    rigl = RigL(0.75, allocation="uniform", update_every=10, initial_scale="density")
    first: dict[str, Tensor] = {}

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            first.update({name: value.clone() for name, value in pl_module.state_dict().items()})

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.max_epochs == 2:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    make_trainer(tmp_path, callbacks=[rigl, Look()]).fit(model)
    for name, value in plain.state_dict().items():
        kept = first[name] != 0
        assert torch.equal(first[name][kept], (2.0 if name in rigl.registry else 1.0) * value[kept])  # 1 / √¼
    # Neither resumed nor trained on are weights scaled again.
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    for again, path in ((model, None), (ToyModel(), tmp_path / "last.ckpt")):
        method = RigL(0.75, allocation="uniform", update_every=10, initial_scale="density")
        make_trainer(tmp_path, callbacks=[method, Look()], max_epochs=4).fit(again, ckpt_path=path)
        for name, value in trained.items():
            assert torch.equal(first[name], value), name


def test_an_initial_scale_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="initial_scale is 'unit'; give one of 'none', 'density'"):
        SET(0.9, initial_scale="unit")  # type: ignore[arg-type]


class Deep(L.LightningModule):
    """Linear layers and ReLUs without normalisation, through which little comes when they are sparse."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        L.seed_everything(0, verbose=False)
        parts = [part for _ in range(6) for part in (nn.Linear(64, 64), nn.ReLU())]
        self.network = nn.Sequential(*parts, nn.Linear(64, 3))
        self.gain = nn.Parameter(torch.full((1,), gain))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.gain * self.network(batch), torch.zeros(len(batch), dtype=torch.long))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(32, 64), batch_size=16)  # pyright: ignore[reportArgumentType]


def test_a_network_through_which_no_gradient_comes_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"hardly any gradient reaches network\.0\.weight.*initial_scale=.density"):
        make_trainer(tmp_path, callbacks=[SET(0.97)], max_epochs=1).fit(Deep())


def test_a_gain_that_begins_at_zero_is_meant_and_so_is_a_scale(tmp_path: Path) -> None:
    make_trainer(tmp_path, callbacks=[SET(0.97)], max_epochs=1).fit(Deep(gain=0.0))
    make_trainer(tmp_path, callbacks=[SET(0.8, initial_scale="density")], max_epochs=1).fit(Deep())


def test_east_without_cycles_is_rigl_in_itops_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RigL, "rounds_up", True)  # as ITOP's code does

    def final(method: GrowingMethod) -> dict[str, Tensor]:
        model = ToyModel()
        make_trainer(tmp_path, callbacks=[method]).fit(model)
        return model.state_dict()

    east = final(EAST(0.8, cycles=0, phasing=False, sharing=False, update_every=3))
    rigl = final(RigL(0.8, drop_fraction=EAST(0.8).drop_fraction, update_every=3, stop=1.0, update_replaces_step=False))
    for name, value in rigl.items():
        assert torch.equal(value, east[name]), name


def test_east_brings_its_parts_into_the_trainer_once(tmp_path: Path) -> None:
    east = EAST(0.8, phasing=DyReLUPhasing(1, 4), sharing=False, cycle_update_every=1, update_every=2)
    trainer = make_trainer(tmp_path, callbacks=[east])
    for epochs in (2, 3):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(ToyModel())
        assert [type(callback).__name__ for callback in trainer.callbacks[:2]] == ["EAST", "DyReLUPhasing"]  # type: ignore[attr-defined]
        assert sum(isinstance(callback, DyReLUPhasing) for callback in trainer.callbacks) == 1  # type: ignore[attr-defined]


def test_a_refused_fit_leaves_no_part_of_east_in_the_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[EAST(0.8, sharing=False, include=["nothing.like.this"])])
    before = list(trainer.callbacks)  # type: ignore[attr-defined]
    model = ToyModel()
    with pytest.raises(MisconfigurationException, match=r"nothing\.like\.this"):
        trainer.fit(model)
    assert trainer.callbacks == before  # type: ignore[attr-defined]
    assert not phased_relus(model)
    before[0] = GMP(0.8, update_every=2, stop=8)
    trainer.callbacks = before  # type: ignore[attr-defined]
    trainer.fit(model)
    assert not any(isinstance(callback, DyReLUPhasing) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    assert before[0].registry.sparsity == pytest.approx(0.8, abs=0.01)


def test_the_parts_of_east_can_be_chosen() -> None:
    sharing = WeightSharing(own=3)
    assert EAST(0.9, phasing=False, sharing=sharing).companions() == [sharing]
    assert [type(part) for part in EAST(0.9).companions()] == [WeightSharing, DyReLUPhasing]


# Extreme budgets, as exact integers (EAST, table of ResNets with CIFAR's stem).


@pytest.mark.parametrize(
    ("network", "own", "expected"),
    [
        (ResNet34, (21_265_088, 11_164_352), {0.999: 21_265, 0.9995: 10_632, 0.9999: 2_126}),
        (ResNet50, (23_467_712, 13_928_128), {0.999: 23_467, 0.9995: 11_733, 0.9999: 2_346}),
    ],
)
@pytest.mark.parametrize("share", [False, True])
def test_extreme_budgets_are_exact_and_leave_no_layer_empty(
    network: Any, own: tuple[int, int], expected: dict[float, int], share: bool
) -> None:
    with torch.device("meta"):
        module = network()
    if share:
        share_weights(module)
    masked = select_weights(module).masked
    assert sum(candidate.parameter.numel() for candidate in masked) == own[share]
    assert sum(candidate.parameter.numel() * candidate.uses for candidate in masked) == own[0]
    for sparsity, active in expected.items():
        assert num_active(sparsity, own[0]) == active
        budgets = erdos_renyi_kernel([candidate.parameter.shape for candidate in masked], active, min_active=1)
        assert sum(budgets) == active
        assert min(budgets) >= 1


def test_a_budget_below_one_weight_a_layer_is_refused_and_a_layer_left_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"leaves 2 of the 344 weights.*at least 3 must stay"):
        make_trainer(tmp_path, callbacks=[RigL(0.993)]).fit(ToyModel())
    with pytest.warns(UserWarning, match=r"network\.\d\.weight has no active weight left"):
        make_trainer(tmp_path, callbacks=[RigL(0.993, min_active=0, update_every=2)]).fit(ToyModel())


# Schedules.


@pytest.mark.parametrize("shape", ["cosine", "triangular"])
def test_a_cycle_is_densest_in_its_middle(shape: Any) -> None:
    cyclic = Cyclic(0.9, cycles=1, length=0.5, multiplier=4.0, shape=shape)
    values = [cyclic(step / 40) for step in range(41)]
    assert values[0] == values[20] == values[40] == 0.9
    assert min(values) == values[10] == pytest.approx(0.6)
    assert [values[5], values[15]] == pytest.approx([0.75, 0.75])


def test_cycles_grow_in_length() -> None:
    cyclic = Cyclic(0.9, cycles=3, length=0.1, growth=2.0)
    assert cyclic.end == pytest.approx(0.7)
    assert [cyclic(x) for x in (0.1, 0.3)] == pytest.approx([0.9, 0.9])
    assert [round(cyclic(x), 9) for x in (0.05, 0.2, 0.5)] == [0.7, 0.7, 0.7]


def test_no_cycle_is_denser_than_dense() -> None:
    assert Cyclic(0.5, multiplier=3.0)(0.1) == 0.0
    assert min(Cyclic(percent / 100)(0.1) for percent in range(67)) == 0.0  # no rounding error below
    assert EAST(0.3).target_sparsity() == 0.3


def test_cycles_may_last_to_the_end() -> None:
    for cycles in range(1, 30):
        assert EAST(0.9, cycles=cycles, cycle_length=1 / cycles).times.start == pytest.approx(1.0)


def test_the_stop_of_east_may_be_a_number_of_steps() -> None:
    times = EAST(0.9, stop=1000).times
    assert (times.start, times.stop) == (400, 1000)


def test_the_last_update_of_the_cycles_comes_when_they_are_over() -> None:
    # They end at 0.35 · 7 = 2.45 steps: at step 2 the network would still be too dense.
    assert EAST(0.9, cycles=1, cycle_length=0.35, stop=7).times.start == 3
    for stop in range(1, 200):
        east = EAST(0.9, cycles=3, cycle_length=0.1, stop=stop)  # 0.1 + 0.1 + 0.1 is a little above 0.3
        assert east.times.start == math.ceil(Fraction(3, 10) * stop)
        assert as_schedule(east.sparsity)(east.times.start / stop) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phasing": "yes"}, r"phasing is 'yes'; give True, False, or the callback, such as DyReLUPhasing\(\)\."),
        ({"phasing": 1}, "phasing is 1; give True"),
        ({"sharing": None}, r"sharing is None; give True, False, or the callback, such as WeightSharing\(\)\."),
        ({"sharing": WeightSharing}, "sharing is the class WeightSharing; give True"),
        ({"phasing": WeightSharing()}, "phasing is <.*WeightSharing.*>; give True"),
    ],
)
def test_parts_of_east_that_are_none_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EAST(0.9, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is a fraction in \[0, 1\)"),
        ({"sparsity": 0.9, "cycles": 0}, "at least 1 cycle"),
        ({"sparsity": 0.9, "multiplier": 0.5}, "multiplier of at least 1"),
        ({"sparsity": 0.9, "cycles": 6}, r"take 1\.2 of the schedule's time"),
        ({"sparsity": 0.9, "length": 0.0}, r"must fit into \(0, 1\]"),
        ({"sparsity": 0.9, "shape": "square"}, "shape is one of 'cosine', 'triangular'"),
    ],
)
def test_cycles_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cyclic(**arguments)


@pytest.mark.parametrize(
    "method",
    [RigL(0.9, update_every=100), SET(0.9, update_every=1000), GMP(0.9, update_every=100)],
    ids=lambda method: type(method).__name__,
)
def test_an_interval_longer_than_the_time_of_updates_is_named(method: SparseMethod, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"update_every is \d+ steps, but updates begin at step 0 and end at step \d+"):
        make_trainer(tmp_path, max_steps=10, callbacks=[method]).fit(ToyModel())


@pytest.mark.filterwarnings("error:.*update_every")
@pytest.mark.parametrize(
    "method",
    [GMP(0.9, start=3, stop=3), RigL(0.9, stop=0), EAST(0.9, phasing=False, sharing=False), SET(0.9, update_every=4)],
    ids=lambda method: type(method).__name__,
)
def test_one_update_that_is_meant_to_be_one_is_not_named(method: SparseMethod, tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=10, callbacks=[method]).fit(ToyModel())
