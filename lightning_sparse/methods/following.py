"""Changes during training: replaced optimizers and parameters, and layers that are unfrozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from lightning_sparse.masks.distributed import broadcast_masks_
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.plan import Candidate, judge_parameters
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods import holding, steps
from lightning_sparse.methods.interface import Method

__all__ = ["follow_optimizer", "follow_parameters", "is_replaced", "take_in_thawed"]


def is_replaced(method: Method) -> bool:
    """Whether the module holds another parameter in the place of a masked one."""
    run = method.last_run
    return run is not None and run.active and any(guard.replaced_weights() for guard in run.guards.values())


@torch.no_grad()
def follow_parameters(method: Method, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Find averages that have come, and let masks follow to parameters that have taken the place of others."""
    run = method.last_run
    if run is None or not run.active:
        return
    run.averages.look(trainer, pl_module, method.weights)
    plan = judge_parameters(pl_module, include=method.include, exclude=method.exclude) if _moved(method) else ()
    here = {candidate.name: candidate for candidate in plan}
    for group in list(run.groups) if plan else ():
        gone = [weight for weight in group if _parameter_of(here.get(weight.name)) is not weight.parameter]
        if gone:
            _follow(method, trainer, group, gone, here)


def _moved(method: Method) -> bool:
    """Whether a masked parameter is no longer reached from the module under its name."""
    module = method.run.module()
    return module is not None and any(
        weight.layout.is_whole and _reached(module, weight.name) is not weight.parameter for weight in method.weights
    )


def _reached(module: torch.nn.Module, name: str) -> object:
    *path, last = name.split(".")
    for part in path:
        inner = getattr(module, part, None)
        module = getattr(inner, "_orig_mod", getattr(inner, "_checkpoint_wrapped_module", inner))  # type: ignore[arg-type]
    return getattr(module, last, None)


def _parameter_of(candidate: Candidate | None) -> object:
    return None if candidate is None else candidate.parameter


def _follow(
    method: Method, trainer: pl.Trainer, group: MaskGroup, gone: Sequence[MaskedWeight], here: Mapping[str, Candidate]
) -> None:
    steppers = _steppers(group, trainer)
    others = {id(weight.parameter) for weight in method.registry.values() if weight not in gone}
    found = {weight.name: candidate for weight in gone if (candidate := here.get(weight.name)) is not None}
    tied = [name for name, candidate in found.items() if id(candidate.parameter) in others]
    new = {name: c for name, c in found.items() if name not in tied and id(c.parameter) in steppers}
    followed = [weight for weight in gone if weight.name in new and new[weight.name].parameter.shape == weight.shape]
    lost = [weight for weight in gone if weight not in followed]
    for weight in followed:
        weight.follow(new[weight.name])
    method.weights_written(followed)
    for weight in lost:
        method.registry.drop(weight.name)
    anew = [new[weight.name] for weight in lost if weight.name in new and not new[weight.name].reason]
    added = _claim(method, steppers, anew) if method.masks_new_weights else []
    kept = [weight for weight in group if weight not in lost]
    by_optimizer: dict[Optimizer, list[MaskedWeight]] = {}
    for weight in (*kept, *added):
        by_optimizer.setdefault(steppers.get(id(weight.parameter), group.optimizer), []).append(weight)
    for changed in steps.regroup(method, group, by_optimizer):
        if some := [weight for weight in changed if weight in added]:
            method.weights_added(changed, some)
    if followed:
        method.warn_once(
            f"{_names(followed)} was replaced by another parameter of the same shape, which now has its mask"
        )
    if added:
        method.warn_once(f"{_names(added)} was replaced by a layer of another shape, which has a new mask")
    if tied:
        method.warn_once(f"{enumerated(tied)} is now tied to a weight that is masked already, and shares its mask")
    dense = [w for w in lost if w.name not in tied and w.name not in {one.name for one in added}]
    if dense:
        method.warn_once(
            f"{_names(dense)} was replaced, so it is no longer masked. Call fit again to mask its replacement"
        )


def _steppers(group: MaskGroup, trainer: pl.Trainer) -> dict[int, Optimizer]:
    """The optimizer of each parameter, by its ``id``: that of ``group``, unless another has taken its place."""
    live, own = trainer.optimizers, group.optimizer
    ordered = [*live, own] if own in live else [own, *live]  # the last one counts
    return {key: optimizer for optimizer in ordered for key in _stepped_by(optimizer)}


def _claim(method: Method, steppers: Mapping[int, Optimizer], candidates: Sequence[Candidate]) -> list[MaskedWeight]:
    optimizers = list(dict.fromkeys(steppers[id(candidate.parameter)] for candidate in candidates))
    groups = [
        group
        for optimizer in optimizers
        for group in method.registry.claim_more(
            method.state_key, [c for c in candidates if steppers[id(c.parameter)] is optimizer], [optimizer]
        )
    ]
    return [weight for group in groups for weight in group]


def _names(weights: Sequence[MaskedWeight]) -> str:
    return enumerated(weight.name for weight in weights)


def _stepped_by(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for param_group in optimizer.param_groups for parameter in param_group["params"]}


def follow_optimizer(method: Method, trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Let the masked weights that ``optimizer`` steps, instead of one that is gone, become its group."""
    run = method.last_run
    if run is None or not run.active or any(group.optimizer is optimizer for group in run.groups):
        return
    stepped = _stepped_by(optimizer)
    for group in list(run.groups):
        moved = [weight for weight in group if id(weight.parameter) in stepped]
        if moved and group.optimizer not in trainer.optimizers:
            stay = [weight for weight in group if weight not in moved]
            steps.dissolve(method, group)
            if stay:
                steps.form(method, stay, group.optimizer, like=group)
            steps.form(method, moved, optimizer, like=group)


@torch.no_grad()
def take_in_thawed(method: Method, trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Mask what was frozen until now and is about to be stepped, where the method has masks for it."""
    if method.last_run is None or not method.last_run.plan.frozen:
        return
    run, plan = method.run, method.run.plan
    # Not what has a gradient here: on another process it may have none.
    trainable = [candidate for candidate in plan.frozen if candidate.parameter.requires_grad]
    if not trainable:
        return
    stepped = _stepped_by(optimizer)
    thawed = [candidate for candidate in trainable if id(candidate.parameter) in stepped]
    masks = {c.name: mask for c in thawed if (mask := method.mask_of_thawed(c.name)) is not None}
    masked = [candidate for candidate in thawed if candidate.name in masks]
    for group in run.registry.claim_more(method.state_key, masked, [optimizer]):
        for weight in group:
            weight.mask.copy_(masks[weight.name])
        group.updated_at = method.step
        broadcast_masks_(group)
        run.groups.append(group)
        steps.put_to_work(method, trainer, group)
        holding.forget_moments(group, group)
        for weight in group:
            weight.budget = weight.num_active
    # Decided once: zeros that a dense layer comes by later are no mask.
    gone = {candidate.name for candidate in thawed}
    plan.thawed += [name for name in gone if name not in masks]
    plan.frozen = [candidate for candidate in plan.frozen if candidate.name not in gone]
    plan.dense = [candidate for candidate in plan.dense if candidate.name not in masks]
