"""Layers whose weights, masks and gradients are written by hand, and one update of them without a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from lightning_sparse.masks import MaskGroup, MaskRegistry, select_weights
from lightning_sparse.methods.hard_mask import HardMaskMethod
from lightning_sparse.methods.run import Beginning, LivePlan, Run
from lightning_sparse.schedules import Timetable

__all__ = ["Row", "layers", "masks_after", "prepared", "updated"]

Row = Sequence[float]


def layers(weights: Sequence[Row], masks: Sequence[Row] | None = None, grads: Sequence[Row] | None = None) -> MaskGroup:
    """A group of linear layers with one output each; all active where no masks are given, in float64."""
    module = nn.ModuleList(nn.Linear(len(row), 1, bias=False, dtype=torch.float64) for row in weights)
    for index, row in enumerate(weights):
        layer = cast("Any", module[index])
        layer.weight = nn.Parameter(torch.tensor([row], dtype=torch.float64))
        layer.weight.grad = torch.tensor([grads[index] if grads else [0.0] * len(row)], dtype=torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (group,) = MaskRegistry().claim("method", select_weights(module).masked, [optimizer])
    for index, mask in enumerate(masks or ()):
        group[index].mask.copy_(torch.tensor([mask], dtype=torch.bool))
    group.recount()
    with torch.no_grad():
        group.apply_()
    return group


def prepared(method: HardMaskMethod, group: MaskGroup, *, step: int = 1, total_steps: int = 2) -> Run:
    """Give ``method`` a run of ``group``, in which it is at ``step``; its times are as its arguments say."""
    times = method.times.resolve(total_steps)
    assert isinstance(times, Timetable)
    registry = MaskRegistry()
    registry._weights.update({weight.name: weight for weight in group})
    nothing = cast("Any", lambda: None)
    run = Run(nothing, nothing, registry, [group], LivePlan([], []), Beginning(), 0, 0, total_steps, timetable=times)
    method.last_run, method.step = run, step
    method.prepare()
    return run


@torch.no_grad()
def updated(method: HardMaskMethod, group: MaskGroup) -> list[list[int]]:
    """The masks of the layers after one update."""
    if type(method).observe is not HardMaskMethod.observe:
        for weight in group:
            method.observe(weight)
    method.update_masks(group)
    group.recount()
    group.apply_()
    return masks_after(group)


def masks_after(group: MaskGroup) -> list[list[int]]:
    return [weight.mask.int().flatten().tolist() for weight in group]
