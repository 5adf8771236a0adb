"""What is told where a training is resumed with other settings, or for another length, than wrote its checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sparse import DST, FGGP, GMP, SRSTE, STR, Feather, FixedMask, RigL, SparseMethod
from lightning_sparse.methods.state import sealed
from lightning_sparse.schedules import Linear, Schedule
from lightning_sparse.testing import random_masks
from tests.helpers import ToyModel, make_trainer
from tests.methods.spies import masks_of

# Trainings of eight steps reach no sparsity that thresholds have to learn.
pytestmark = [pytest.mark.filterwarnings("ignore:DST. training ended at sparsity")]

LATER = ("settings", "total_steps")


def written_by(method: SparseMethod, root: Path, epochs: int = 1) -> Path:
    """The checkpoint of a training of eight steps an epoch."""
    trainer = make_trainer(root, callbacks=[method], max_epochs=epochs)
    trainer.fit(ToyModel())
    trainer.save_checkpoint(root / "written.ckpt")
    return root / "written.ckpt"


def told(method: SparseMethod, path: Path, epochs: int = 2) -> list[str]:
    """What is told as a training goes on from there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(path.parent, callbacks=[method], max_epochs=epochs).fit(ToyModel(), ckpt_path=path)
    return [str(one.message) for one in caught if " resumed with " in str(one.message)]


def rigl(sparsity: Any = 0.8, **settings: Any) -> RigL:
    times: dict[str, Any] = {"update_every": 2, "start": 0, "stop": 7}
    return RigL(sparsity, **(times | settings))


@pytest.mark.parametrize(
    ("first", "second", "change"),
    [
        (rigl(0.8), rigl(0.9), "sparsity=Constant(value=0.9) (was Constant(value=0.8))"),
        (rigl(update_every=2), rigl(update_every=3), "update_every=3 (was 2)"),
        (rigl(Linear(0.5, 0.8)), rigl(0.8), "sparsity=Constant(value=0.8) (was Linear(initial=0.5, final=0.8))"),
        (DST(0.05), DST(0.01), "alpha=0.01 (was 0.05)"),
        (SRSTE(decay=1e-4), SRSTE(decay=1e-3), "decay=0.001 (was 0.0001)"),
        (Feather(0.8, stop=6), Feather(0.8, stop=7), "stop=7 (was 6)"),
    ],
    ids=["sparsity", "times", "schedule", "alpha", "decay", "stop"],
)
def test_another_setting_is_told_with_what_it_was(
    first: SparseMethod, second: SparseMethod, change: str, tmp_path: Path
) -> None:
    (sentence,) = told(second, written_by(first, tmp_path))
    assert f"{type(second).__name__} at step 8: resumed with {change}. The masks are kept" in sentence


def test_all_that_differs_is_one_sentence(tmp_path: Path) -> None:
    path = written_by(FGGP(0.8, seed=1), tmp_path)
    (sentence,) = told(FGGP(0.7, seed=2), path)
    assert all(
        each in sentence for each in ("final=0.7", "final=0.8", "seed=2 (was 1)", "16 steps of training (was 8)")
    )


@pytest.mark.parametrize("method", [GMP(0.8), DST(sparsity=0.8), Feather(0.8)], ids=["gmp", "dst", "feather"])
def test_another_length_is_told_where_it_counts(method: SparseMethod, tmp_path: Path) -> None:
    path = written_by(method, tmp_path)
    (sentence,) = told(method, path)
    assert "resumed with 16 steps of training (was 8)." in sentence


@pytest.mark.parametrize(
    "make",
    [
        rigl,
        lambda: DST(0.05),
        SRSTE,
        lambda: FixedMask(random_masks(ToyModel())),
        lambda: GMP(0.8, update_every=2, start=0, stop=6),
    ],
    ids=["rigl", "dst", "srste", "fixed", "gmp"],
)
def test_another_length_is_not_told_where_it_does_not_count(make: Any, tmp_path: Path) -> None:
    assert told(make(), written_by(make(), tmp_path)) == []


def test_a_trainer_that_goes_on_for_longer_tells_of_it(tmp_path: Path) -> None:
    trainer, model = make_trainer(tmp_path, callbacks=[GMP(0.8)]), ToyModel()
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 4
    with pytest.warns(UserWarning, match=r"resumed with 32 steps of training \(was 16\)"):
        trainer.fit(model)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FixedMask(random_masks(ToyModel())), FixedMask()),
        (rigl(initial_scale="density"), rigl()),
        (STR(-5.0, decay=1e-3), STR(-6.0, decay=1e-3)),
    ],
    ids=["masks", "scale", "thresholds"],
)
def test_how_a_training_began_need_not_be_said_again(first: SparseMethod, second: SparseMethod, tmp_path: Path) -> None:
    assert told(second, written_by(first, tmp_path)) == []


def test_another_training_from_the_same_masks_may_be_asked_for_anything(tmp_path: Path) -> None:
    model = ToyModel()
    make_trainer(tmp_path, callbacks=[rigl(0.8)], max_epochs=1).fit(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, callbacks=[rigl(0.9)]).fit(model)
    assert not [one for one in caught if "resumed with" in str(one.message)]


def test_a_state_from_before_settings_were_written_is_resumed(tmp_path: Path) -> None:
    path = written_by(rigl(), tmp_path)
    whole = rigl()
    assert told(whole, path) == []
    checkpoint = torch.load(path, weights_only=True)
    ((key, state),) = checkpoint["callbacks"].items()
    assert {*LATER} < state.keys()
    older = {name: value for name, value in state.items() if name not in (*LATER, "version", "digest")}
    torch.save({**checkpoint, "callbacks": {key: sealed(older)}}, path)
    resumed = rigl()
    assert told(resumed, path) == []
    for name, mask in masks_of(whole).items():
        assert torch.equal(masks_of(resumed)[name], mask)
    assert told(rigl(0.9), path) == []  # nobody knows what it was


class Rising(Schedule):
    """A schedule of a user's own, which says nothing of itself."""

    def __init__(self, last: float) -> None:
        self.last = last

    def __call__(self, progress: float) -> float:
        return self.last * progress


def test_what_says_nothing_of_itself_is_told_by_its_type(tmp_path: Path) -> None:
    path = written_by(rigl(Rising(0.8)), tmp_path)
    assert told(rigl(Rising(0.8)), path) == []
    (sentence,) = told(rigl(0.8), path)
    assert "(was Rising)" in sentence
