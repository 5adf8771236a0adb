"""The start of training, for all methods together, and its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from lightning_sparse.masks.distributed import agree_to_begin, broadcast_masks_
from lightning_sparse.masks.inheritance import forget_pruned, waking_zeros
from lightning_sparse.masks.layout import is_sharded
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.plan import Plan, select_weights
from lightning_sparse.masks.registry import MaskRegistry
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods import checkpoints, holding, steps
from lightning_sparse.methods.interface import Method
from lightning_sparse.methods.run import LivePlan, Run
from lightning_sparse.methods.settings import changes_since
from lightning_sparse.methods.state import check_digest
from lightning_sparse.trainer import steps_of_training, steps_taken

__all__ = ["begin_together", "leave"]


@torch.no_grad()
def begin_together(methods: Sequence[Method], trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let all methods of a Trainer plan, load and resolve before any changes the module. All of them begin, or none.

    Raises:
        Exception: One of them cannot, on this process or on another; everything is as it was before.
    """
    before = [(method, method.last_run, method.step) for method in methods]
    registry = MaskRegistry()
    try:
        plans = _plan_and_make(methods, trainer, pl_module, registry)
    except Exception:
        for method, run, step in before:
            method.last_run, method.step = run, step
        raise
    registry.begin(pl_module)
    for method in methods:
        for group in method.groups:
            broadcast_masks_(group)
    for method, plan in zip(methods, plans, strict=True):
        _put_to_work(method, trainer, pl_module)
        for remark in plan.remarks:
            method.warn_once(remark.removesuffix("."))
        rank_zero_info(f"{type(method).__name__}: {plan.summary} Sparsity {registry.sparsity:.4f}.")


def _plan_and_make(
    methods: Sequence[Method], trainer: pl.Trainer, pl_module: pl.LightningModule, registry: MaskRegistry
) -> list[Plan]:
    plans: list[Plan] = []
    error = None
    try:
        plans += [_plan(method, trainer, pl_module, registry) for method in methods]
    except Exception as refused:  # on one process perhaps, and the others have to know
        error = refused
    if any(map(is_sharded, pl_module.parameters())):  # masks are made together, so who differs must be known before
        agree_to_begin(_settings(methods, error), error)
    try:
        if error is None:
            for method in methods:
                _make_masks(method)
            _warn_of_waking(methods, trainer, pl_module)
    except Exception as refused:
        error = refused
    agree_to_begin(_settings(methods, error), error)
    return plans


def _plan(method: Method, trainer: pl.Trainer, pl_module: pl.LightningModule, registry: MaskRegistry) -> Plan:
    beginning = checkpoints.beginning_of(method, trainer, pl_module)
    state = beginning.state
    plan = select_weights(pl_module, include=method.include, exclude=method.exclude, frozen=method.masks_what_thaws)
    were_frozen: Sequence[str] = ()
    if state is not None:
        plan = plan.without(dict.fromkeys(state["dense"], "dense in the run that is resumed"))
        were_frozen = state["frozen"]
    plan = _without_refused(method, plan)
    dense = [candidate for candidate in plan if candidate.reason]
    frozen = [candidate for candidate in dense if candidate.reason == "frozen" or candidate.name in were_frozen]
    groups = registry.claim(method.state_key, plan.masked, trainer.optimizers)
    # load state → resolve times → initialise masks
    method.step = 0 if state is None else state["step"]
    clock = state if state is not None and beginning.goes_on else None
    began_at = steps_taken(trainer, pl_module) if clock is None else clock["began_at"]
    run = Run(
        trainer=ref(trainer),
        module=ref(pl_module),
        registry=registry,
        groups=groups,
        plan=LivePlan(dense, frozen),
        beginning=beginning,
        origin=method.step if clock is None else clock["origin"],
        began_at=began_at,
        total_steps=steps_of_training(trainer, pl_module) - began_at,
    )
    method.last_run = run
    times = method.timetable(run.total_steps)
    run.timetable = None if times is None else times.shifted(run.origin)
    return plan


def _make_masks(method: Method) -> None:
    """Let a method that is planned make its masks, or take those that it goes on from."""
    method.prepare()
    if method.run.beginning.state is None:
        _initialize(method, method.run)
    else:
        _resume(method, method.run)
    for group in method.run.groups:
        holding.refuse_nan_outputs(method, group)


def _without_refused(method: Method, plan: Plan) -> Plan:
    """The plan without the weights that the method cannot mask; the method says which."""
    masked = plan.masked
    reasons = {c.name: reason for c in masked if (reason := method.refuses(c, is_last=c is masked[-1]))}
    if not reasons:
        return plan
    left = plan.without(reasons)
    if not left.masked:
        some = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise MisconfigurationException(
            f"{method!r} cannot mask any weight of this module: {some}{more}. Give another pattern, or a module that"
            " fits it."
        )
    numel = sum(candidate.parameter.numel() for candidate in masked if candidate.name in reasons)
    total = sum(candidate.parameter.numel() for candidate in masked)
    first = next(iter(reasons))
    rank_zero_info(
        f"{type(method).__name__}: {len(reasons)} of {len(masked)} layers ({numel:,} of {total:,} weights) stay dense:"
        f" {first} ({reasons[first]}){' and others' if len(reasons) > 1 else ''}."
    )
    return left


def _initialize(method: Method, run: Run) -> None:
    inherited = run.beginning.inherited
    for weight in method.weights:
        if weight.name in inherited and inherited[weight.name].shape != weight.mask.shape:
            raise MisconfigurationException(
                f"The mask left by an earlier training for {printable(weight.name)} has shape"
                f" {tuple(inherited[weight.name].shape)}, but the weight has {tuple(weight.mask.shape)}. Train the"
                " module that the masks belong to."
            )
    for group in run.groups:
        method.initialize_masks(group)
    names = waking_zeros(run.groups, inherited)
    if names:
        method.warn_once(
            f"{enumerated(names)} have zeros that look pruned, but no masks: the zeros will be trained again. To keep"
            " them, call lightning_sparse.apply_masks(model, masks) before fit, with the model that fit is given,"
            " resume with ckpt_path, or train with FixedMask"
        )


def _resume(method: Method, run: Run) -> None:
    state = run.beginning.state
    assert state is not None
    for group in run.groups:
        group.load_(state["masks"], run.beginning.source)
    for group, lasted in zip(run.groups, state["not_finite_for"], strict=False):
        group.not_finite_for = lasted
    method.load_method_state(state["method"])
    if run.beginning.source == "checkpoint":
        check_digest(state, method.state_key)
    if run.beginning.goes_on:
        _tell_of_changes(method, state)
    else:
        for group in run.groups:
            method.clock_starts(group)


def _tell_of_changes(method: Method, state: Mapping[str, Any]) -> None:
    if changes := changes_since(method, state):
        method.warn_once(
            f"resumed with {', '.join(map(printable, changes))}. The masks are kept, and the new settings apply from"
            " here on; to continue as before, use the old ones"
        )


def _warn_of_waking(methods: Sequence[Method], trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Warn of masks that were left in the module and that no method takes over: their zeros would be trained."""
    left = MaskRegistry.left_in(pl_module)
    taken = {name for method in methods for name in method.run.registry}
    # What is frozen is not trained; the warning comes when it thaws.
    frozen = {candidate.name for method in methods for candidate in method.run.plan.frozen}
    unmasked = left.keys() - taken - frozen
    if unmasked:
        methods[-1].warn_once(
            f"{enumerated(sorted(unmasked))} had masks until now, but no method of this Trainer takes them over: their"
            " zeros will be trained again. Widen include= or exclude=, or add FixedMask(include=...) for them"
        )


def _settings(methods: Sequence[Method], error: Exception | None) -> dict[str, str]:
    """What must be equal in every process; nothing where there is an error, which is told instead."""
    settings: dict[str, str] = {}
    for method in methods if error is None else ():
        run, key = method.run, method.state_key
        settings[f"the arguments of {key}"] = method.settings()
        settings[f"the weights of {key}"] = ", ".join(f"{w.name} {tuple(w.shape)}{_divided(w)}" for w in method.weights)
        settings[f"the times of {key}"] = f"{run.timetable}, {run.total_steps} steps from {run.origin}"
    return settings


def _divided(weight: MaskedWeight) -> str:
    return "" if weight.layout.is_whole else f" divided by {weight.layout}"


def _put_to_work(method: Method, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    run = method.run
    run.active, method.is_set_up = True, False
    run.averages.look(trainer, pl_module, method.weights)
    for group in run.groups:
        steps.put_to_work(method, trainer, group)
        if run.beginning.state is None:
            forget_pruned(group, run.beginning.inherited)
    method.masks_are_on()


@torch.no_grad()
def leave(method: Method, pl_module: pl.LightningModule) -> None:
    """End a training, however it ended: leave the module sparse, and nothing else behind."""
    run, method.is_set_up = method.last_run, False
    if run is None or not run.active:
        checkpoints.resume_no_more(method)
        return
    steps.clip_again(method)
    run.watch_no_more()
    run.saved = None
    for group in run.groups:
        if group in run.steps.awaiting:  # an error between the gradients and the step
            method.step_skipped(group)
        group.apply_()
        run.steps.unhook(group)
    run.averages.apply_(method.weights)
    run.active = False
    method.loaded = None
    run.left = MaskRegistry.forget(pl_module)
