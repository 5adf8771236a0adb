"""What methods log and say: one value under each key, and no key that is another's folder."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_sparse import DST, GMP, RigL, SparseMethod, SparsityMonitor
from lightning_sparse.testing import ToyModel, make_trainer
from lightning_sparse.trainer import callbacks_of

if TYPE_CHECKING:
    from pathlib import Path

FIRST: dict[str, Any] = {"include": ["network.0.*"]}
REST: dict[str, Any] = {"exclude": ["network.0.*"]}
OFTEN: dict[str, Any] = {"update_every": 2, "stop": 11}


def logged(methods: list[SparseMethod], root: Path, model: ToyModel | None = None) -> dict[str, float]:
    trainer = make_trainer(root, callbacks=[*methods, SparsityMonitor()], logger=CSVLogger(root))
    trainer.fit(model or ToyModel())
    assert callbacks_of(trainer)
    return {key: float(value) for key, value in trainer.logged_metrics.items()}


def test_two_methods_of_a_class_have_keys_of_their_own(tmp_path: Path) -> None:
    values = logged([DST(0.01, **FIRST), DST(0.05, **REST)], tmp_path)
    assert (values["dst/alpha"], values["dst/alpha_2"]) == (pytest.approx(0.01), pytest.approx(0.05))


@pytest.mark.parametrize(
    "methods",
    [
        lambda: [DST(0.01, **FIRST), DST(0.05, **REST)],
        lambda: [GMP(0.8, **OFTEN, **FIRST), RigL(0.8, **OFTEN, **REST)],
    ],
    ids=["dst", "gmp-rigl"],
)
def test_no_key_is_the_folder_of_another(methods: Any, tmp_path: Path) -> None:
    """MLflow's store of files, for one, keeps a file for each key."""
    keys = logged(methods(), tmp_path).keys()
    assert [key for key in keys if any(other.startswith(f"{key}/") for other in keys)] == []


def test_a_sparsity_of_the_users_own_is_told(tmp_path: Path) -> None:
    class Own(ToyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("sparsity", 0.123, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    method = GMP(0.8, **OFTEN)
    with pytest.warns(UserWarning, match=r"the module also logs sparsity.*another name"):
        values = logged([method], tmp_path, Own())
    assert values["sparsity"] == pytest.approx(method.registry.sparsity)


def test_a_key_of_the_users_own_in_a_folder_of_ours_is_told(tmp_path: Path) -> None:
    class Own(ToyModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("sparsity/mine", 0.123, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    with pytest.warns(
        UserWarning, match=r"the module logs sparsity/mine, whose first part is a metric.*MLflow.*another name"
    ):
        logged([GMP(0.8, **OFTEN)], tmp_path, Own())


class Depthwise(ToyModel):
    """Sixteen channels, each with a filter of four weights."""

    @staticmethod
    def build() -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(12, 64), nn.Unflatten(1, (16, 4)), nn.Conv1d(16, 16, 4, groups=16), nn.Flatten(), nn.Linear(16, 3)
        )


@pytest.mark.parametrize("exclude", [None, ["@depthwise"]])
def test_depthwise_filters_that_die_are_told_with_counts(exclude: list[str] | None, tmp_path: Path) -> None:
    method = GMP(0.9, allocation="uniform", exclude=exclude, **OFTEN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, callbacks=[method]).fit(Depthwise())
    said = [str(one.message) for one in caught if "filters of depthwise" in str(one.message)]
    if exclude:
        assert said == []
    else:
        dead = int((~method.registry["network.2.weight"].mask.flatten(1).any(dim=1)).sum())
        assert len(said) == 1
        assert f"{dead} of 16 filters" in said[0]
        assert "exclude=['@depthwise']" in said[0]
