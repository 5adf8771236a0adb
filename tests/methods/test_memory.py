"""What methods with hard masks hold between updates: one byte for each weight, and no second mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sparse.methods import SNFS
from tests.helpers import ToyModel, make_trainer
from tests.methods.cases import CASES, Case

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HARD = [case for case in CASES if case.is_hard]


class Scale(TorchDispatchMode, L.Callback):
    """Weighs the boolean tensors that were made in a fit and are still held when the updates are over."""

    bytes = 0

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.dtype is torch.bool:
                memory = result.untyped_storage()
                self.made[StorageWeakRef(memory)] = memory.nbytes()
        return results

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.current_epoch == 1 and trainer.is_last_batch:  # no case updates its masks here
            self.bytes = sum(size for memory, size in self.made.items() if not memory.expired())


@pytest.mark.parametrize("case", HARD, ids=lambda case: case.name)
def test_between_updates_a_method_with_hard_masks_holds_nothing_but_them(case: Case, tmp_path: Path) -> None:
    method, scale = case.make(), Scale()
    with scale:
        make_trainer(tmp_path, callbacks=[method, scale], max_epochs=2).fit(ToyModel())
    masks = sum(weight.numel for weight in method.weights)
    assert masks <= scale.bytes < 1.5 * masks


def test_the_scale_finds_what_is_as_large_as_the_masks(tmp_path: Path) -> None:
    class Hoarder(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.copy = method.weights[0].mask.clone()

    method, scale = SNFS(0.8, update_every=2, stop=11), Scale()
    hoarder = Hoarder()
    with scale:
        make_trainer(tmp_path, callbacks=[method, hoarder, scale], max_epochs=2).fit(ToyModel())
    assert scale.bytes >= sum(weight.numel for weight in method.weights) + hoarder.copy.numel()
    assert hoarder.copy.dtype == torch.bool
