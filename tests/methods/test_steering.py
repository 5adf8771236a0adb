"""The law that steers a regulariser, and where DST(sparsity=...) ends with it on real data."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_sparse import DST
from lightning_sparse.methods.steering import Steering
from lightning_sparse.zoo import DigitsDataModule, LeNet300100
from tests.helpers import make_trainer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, 95, math.nan, math.inf])
def test_a_sparsity_that_is_no_fraction_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity is"):
        Steering(sparsity)


def test_the_target_rises_from_dense_and_stays_at_the_end() -> None:
    steering = Steering(0.9)
    targets = [steering.target(percent / 100) for percent in range(101)]
    assert targets[0] == 0.0
    assert all(before <= after for before, after in itertools.pairwise(targets))
    assert set(targets[71:]) == {0.9}


@pytest.mark.parametrize(("sparsity", "sign"), [(0.5, 1), (0.899, 1), (0.901, -1), (0.99, -1)])
def test_the_strength_pushes_towards_the_target(sparsity: float, sign: int) -> None:
    steering = Steering(0.9)
    steering.observe(sparsity, 0.8, 0.01)
    assert steering.alpha * sign > 0.0


def test_nothing_pushes_before_training_or_on_target() -> None:
    steering = Steering(0.9)
    assert steering.alpha == 0.0
    steering.observe(0.0, 0.0, 0.0)
    assert steering.alpha == 0.0


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_the_strength_is_bounded_whatever_happens(sparsity: float) -> None:
    steering = Steering(0.5)
    for step in range(1000):
        steering.observe(sparsity, step / 1000, 0.001)
    assert math.isfinite(steering.alpha)
    assert 0.0 < abs(steering.alpha) <= 0.5


def _plant(gain: float, steps: int, sparsity: float = 0.9) -> Iterator[float]:
    """Thresholds that move by ``gain`` times alpha a step, with a drift, over weights of a normal distribution."""
    steering, threshold = Steering(sparsity), 0.0
    for step in range(steps):
        threshold += gain * steering.alpha - 0.2 / steps
        actual = math.erf(max(threshold, 0.0) / math.sqrt(2.0))
        yield actual
        steering.observe(actual, step / steps, 1.0 / steps)


@pytest.mark.parametrize("gain", [1e-1, 1.0, 10.0])
def test_plants_of_very_different_gain_are_held_on_target(gain: float) -> None:
    course = list(_plant(gain, steps=1000))
    assert max(abs(actual - 0.9) for actual in course[850:]) < 0.005


def test_a_state_goes_on_as_if_it_had_not_been_put_away() -> None:
    whole, resumed = Steering(0.9), Steering(0.9)
    for step in range(20):
        whole.observe(0.02 * step, step / 40, 1 / 40)
    resumed.load(whole.state())
    for steering in (whole, resumed):
        steering.observe(0.5, 0.6, 1 / 40)
    assert resumed.state() == whole.state()
    assert resumed.alpha == whole.alpha


class _Sparsities(L.Callback):
    """The sparsity after each step."""

    def __init__(self, method: DST) -> None:
        self.method = method
        self.course: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.course.append(self.method.registry.sparsity)


STEPS = 322  # 14 epochs
OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=5e-3),
}


class _Digits(L.LightningModule):
    """LeNet-300-100 on the digits, with little around it."""

    def __init__(self, optimizer: str, cosine: bool) -> None:
        super().__init__()
        self.network = LeNet300100(in_features=64)
        self.optimizer_name = optimizer
        self.cosine = cosine

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer_name](self.parameters())
        if not self.cosine:
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    return DigitsDataModule()


@pytest.mark.parametrize(
    ("optimizer", "sparsity", "cosine"),
    [
        ("sgd", 0.5, False),
        ("sgd", 0.8, True),
        ("sgd", 0.95, True),
        ("sgd", 0.98, True),
        ("adam", 0.9, True),
        ("adam", 0.98, False),
    ],
)
def test_training_ends_with_the_sparsity_that_was_asked_for(
    digits: DigitsDataModule, optimizer: str, sparsity: float, cosine: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    method = DST(sparsity=sparsity)
    seen = _Sparsities(method)
    trainer = make_trainer(tmp_path, callbacks=[method, seen], max_steps=STEPS, max_epochs=None, limit_val_batches=0)
    trainer.fit(_Digits(optimizer, cosine), digits.train_dataloader())
    assert seen.course[-1] == pytest.approx(sparsity, abs=0.005)
    tail = seen.course[int(0.7 * STEPS) :]
    assert max(abs(after - before) for before, after in itertools.pairwise(tail)) < 0.01
    assert sum(method.resets.values()) == 0


class _Normalized(_Digits):
    """A small CNN with BatchNorm, which divides the gradients of an empty filter by a deviation of nearly zero."""

    def __init__(self) -> None:
        super().__init__("sgd", cosine=True)
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(512, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)),
        )


def test_empty_filters_under_batch_norm_do_not_make_it_push_until_layers_collapse(
    digits: DigitsDataModule, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, method = _Normalized(), DST(sparsity=0.98)
    trainer = make_trainer(tmp_path, callbacks=[method], max_steps=STEPS, max_epochs=None, limit_val_batches=0)
    trainer.fit(module, digits.train_dataloader())
    assert method.registry.sparsity == pytest.approx(0.98, abs=0.005)
    held_out = digits.val_set
    with torch.no_grad():
        right = module.network.eval()(held_out.images).argmax(1) == held_out.labels
    assert right.double().mean() > 0.9  # with the pull unlimited, 0.47 and 0.70 in two runs


class _Pull(L.LightningModule):
    """A linear layer whose loss pulls strongly at its thresholds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return 1e3 * self.layer(batch[0]).square().sum()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 8)), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class _Moves(L.Callback):
    """How far the thresholds move in a step, over the learning rate, and how far they may."""

    def __init__(self, method: DST) -> None:
        self.method = method
        self.moves: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = self.method.thresholds["layer.weight"].detach().clone()
        steering = self.method._own.steering
        assert steering is not None
        alpha = abs(steering.alpha) * float(torch.exp(-self.before).max())
        self.limit = steering.scale + alpha

    def on_train_batch_end(self, *_: Any) -> None:
        moved = (self.method.thresholds["layer.weight"].detach() - self.before).abs().max()
        self.moves.append((float(moved) / 1e-6, self.limit))


@pytest.mark.filterwarnings("ignore:DST. training ended at sparsity")
def test_the_loss_pulls_at_a_threshold_no_harder_than_the_regulariser_can(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = DST(sparsity=0.5)
    seen = _Moves(method)
    make_trainer(tmp_path, callbacks=[method, seen], max_epochs=1, max_steps=-1).fit(_Pull())
    assert len(seen.moves) == 10
    assert all(0.0 < moved <= 1.01 * limit for moved, limit in seen.moves)
