"""Fused optimizers in float16 remove the GradScaler's scale inside their step: masks are chosen without it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_sparse import MEST, SNFS, SNIP, GraSP, SparseMethod
from lightning_sparse.schedules import Constant
from lightning_sparse.testing import masks_of
from tests.helpers import ToyModel, make_trainer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

METHODS: dict[str, Callable[[], SparseMethod]] = {
    # At their own weights, gradients a thousand times as large would outrank them.
    "mest": lambda: MEST(0.5, update_every=2, stop=10, drop_fraction=Constant(0.3), gradient_weight=0.1),
    "snfs": lambda: SNFS(0.5, update_every=2, stop=10),
    "snip": lambda: SNIP(0.5, batches=6),
    "grasp": lambda: GraSP(0.5, batches=4),
}


@pytest.mark.parametrize("name", METHODS)
def test_masks_do_not_depend_on_who_removes_the_scale(name: str, tmp_path: Path) -> None:
    def masks(fused: bool | None) -> Any:
        """Those of weights that stay what they are, as the scale doubles; of no GradScaler where it is None."""
        method = METHODS[name]()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1)
        plugins = [] if fused is None else [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
        model = ToyModel(partial(torch.optim.AdamW, lr=0.0, weight_decay=0.0, fused=bool(fused)))
        make_trainer(tmp_path, plugins=plugins, callbacks=[method], max_epochs=2, max_steps=12).fit(model)
        return masks_of(method)

    plain, fused = masks(fused=False), masks(fused=True)
    assert all(torch.equal(fused[key], mask) for key, mask in plain.items())
    unscaled = masks(fused=None)  # in float32: a few ranks differ by rounding
    differing = sum(int((unscaled[key] != mask).sum()) for key, mask in fused.items())
    assert differing <= 0.03 * 344
