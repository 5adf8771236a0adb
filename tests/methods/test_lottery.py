"""The lottery tickets of docs/fine-tuning.md: a level trains what its masks and the early weights say, no more."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_sparse import FixedMask, apply_masks
from tests.helpers import ToyModel, make_trainer
from tests.test_readme import blocks

PAGE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"
EPOCHS = 3


class Momentum(ToyModel):
    """Moments and a schedule, which must not come along from one level to the next."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


@pytest.fixture
def namespace() -> dict[str, Any]:
    """The loop of the page, but for the lines that run it."""
    (block,) = (text for text in blocks(PAGE.read_text(encoding="utf-8"), "python") if "def lottery" in text)
    loaded: dict[str, Any] = {"L": L, "deepcopy": deepcopy}
    exec(block.partition("def short_trainer")[0], loaded)
    return loaded


def tickets(namespace: dict[str, Any], model: ToyModel, folder: Path, **arguments: Any) -> list[dict[str, Tensor]]:
    def new_trainer(*callbacks: L.Callback) -> L.Trainer:
        L.seed_everything(1, verbose=False)
        return make_trainer(folder, callbacks=list(callbacks), max_epochs=EPOCHS)

    return list(namespace["lottery"](model, None, new_trainer, levels=3, **arguments))


@pytest.mark.parametrize("rewind_to", [0, 3])
def test_the_last_level_is_a_training_of_its_masks_from_the_early_weights(
    rewind_to: int, namespace: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Momentum()
    fresh = deepcopy(model)
    masks = tickets(namespace, model, tmp_path, rewind_to=rewind_to)[-1]
    early = namespace["Early"](rewind_to)
    L.seed_everything(1, verbose=False)
    make_trainer(tmp_path, callbacks=[early], max_epochs=EPOCHS).fit(fresh)
    alone = Momentum()
    alone.load_state_dict(early.state)
    apply_masks(alone, masks)
    L.seed_everything(1, verbose=False)
    make_trainer(tmp_path, callbacks=[FixedMask(masks)], max_epochs=EPOCHS).fit(alone)
    for name, value in model.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name


def test_each_level_leaves_four_fifths_and_wakes_nothing(namespace: dict[str, Any], tmp_path: Path) -> None:
    levels = tickets(namespace, Momentum(), tmp_path)
    total = sum(mask.numel() for mask in levels[0].values())
    counts = [sum(int(mask.sum()) for mask in masks.values()) for masks in levels]
    assert counts == [int(total * 0.8**level + 1e-9) for level in (1, 2, 3)]
    for before, after in pairwise(levels):
        assert not any((after[name] & ~before[name]).any() for name in before)


def test_with_learning_rate_rewinding_weights_stay(namespace: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Momentum(), Momentum()
    other.load_state_dict(model.state_dict())
    tickets(namespace, model, tmp_path, rewind="learning rate")
    tickets(namespace, other, tmp_path, rewind="weights")
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
