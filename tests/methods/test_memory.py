"""What methods hold between updates: one byte for each weight, and nothing else as large as the masks."""

from __future__ import annotations

import gc
from types import ModuleType
from typing import TYPE_CHECKING

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_sparse.methods import SNFS
from tests.helpers import ToyModel, make_trainer
from tests.methods.cases import CASES, Case

if TYPE_CHECKING:
    from pathlib import Path

HARD = [case for case in CASES if case.is_hard]


def held(root: object) -> int:
    """The bytes of all tensors that take one byte for each entry, as far as references lead from an object.

    They are not followed into classes and modules, nor into the variables of modules, which every function refers to.
    """
    seen, todo, found = {id(root)}, [root], {}
    while todo:
        thing = todo.pop()
        if type(thing) is Tensor and thing.element_size() == 1:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        for other in gc.get_referents(thing):
            skipped = isinstance(other, type | ModuleType) or (isinstance(other, dict) and "__builtins__" in other)
            if not skipped and id(other) not in seen:
                seen.add(id(other))
                todo.append(other)
    return sum(found.values())


class Scale(L.Callback):
    """Weighs what is held when the updates are over."""

    bytes = 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.current_epoch == 1 and trainer.is_last_batch:  # no case updates its masks here
            self.bytes = held(trainer)


@pytest.mark.parametrize("case", HARD, ids=lambda case: case.name)
def test_between_updates_a_method_with_hard_masks_holds_nothing_but_them(case: Case, tmp_path: Path) -> None:
    method, scale = case.make(), Scale()
    make_trainer(tmp_path, callbacks=[method, scale], max_epochs=2).fit(ToyModel())
    masks = sum(weight.numel for weight in method.weights)
    assert masks <= scale.bytes < 1.5 * masks


def test_the_scale_finds_what_is_as_large_as_the_masks(tmp_path: Path) -> None:
    class Hoarder(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.copy = method.weights[0].mask.clone()

    method, scale = SNFS(0.8, update_every=2, stop=11), Scale()
    hoarder = Hoarder()
    make_trainer(tmp_path, callbacks=[method, hoarder, scale], max_epochs=2).fit(ToyModel())
    assert scale.bytes >= sum(weight.numel for weight in method.weights) + hoarder.copy.numel()
    assert hoarder.copy.dtype == torch.bool
