"""Keeps pruned weights at zero: which weights are checked, when, and how they are repaired."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sparse.functional.masks import row_counts
from lightning_sparse.masks.distributed import check_weights_agree, masks_agree
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.memory import SHARED, overlapping
from lightning_sparse.masks.moments import clear_moments
from lightning_sparse.masks.norms import nan_outputs
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.guard import count_awake
from lightning_sparse.methods.interface import Method

__all__ = [
    "compare_processes",
    "forget_moments",
    "look_after_step",
    "look_at_all",
    "look_before_step",
    "look_now_and_then",
    "masks_are_others",
    "masks_changed",
    "mend_gradients",
    "refuse_nan_outputs",
    "repair_written",
    "warn_of_dead_filters",
    "warn_of_empty",
    "warn_of_thawed",
]

_MANY = 0.02  # share of dead depthwise filters above which we warn
_EVERY = 100  # steps between two checks of every weight
_FIRST = (1, 2)  # steps after which averaged copies have changed, whether they are written before or after us


def masks_changed(method: Method, group: MaskGroup) -> None:
    """Apply masks that were just written: update the counts, and zero weights and averaged copies."""
    group.recount()
    if group not in method.run.steps.differentiated:  # for these, after the step
        group.apply_()
    method.registry.num_updates += 1
    masks_are_others(method, group)


def masks_are_others(method: Method, group: MaskGroup) -> None:
    """Tell averages and the guard that the masks of ``group`` have changed, and warn of empty layers."""
    run = method.run
    run.averages.apply_(group)
    run.guards[group].masks_changed()
    run.guards[group].note_weights()
    warn_of_empty(method, group)


def refuse_nan_outputs(method: Method, group: MaskGroup) -> None:
    """Stop before a mask makes an output NaN, as weight norm does with one that has no weight other than zero.

    Raises:
        MisconfigurationException: The masks of ``group`` would.
    """
    nan = {weight.name: count for weight in group if (count := nan_outputs(weight))}
    if nan:
        raise MisconfigurationException(
            f"The masks of {type(method).__name__} at step {method.step} leave {sum(nan.values())} output(s) of"
            f" {enumerated(nan)} no weight other than zero, and under weight norm they would be NaN. Lower the"
            " sparsity, leave the weight out of include=, or remove the norm before fit"
            " (torch.nn.utils.parametrize.remove_parametrizations, or torch.nn.utils.remove_weight_norm for the older"
            " function)."
        )


def warn_of_empty(method: Method, group: MaskGroup) -> None:
    """Warn of each layer once, as soon as all of its weights are pruned."""
    run = method.run
    empty = [weight for weight in group if weight.num_active == 0 and f"empty: {weight.name}" not in run.warned]
    if empty:
        run.warned.update(f"empty: {weight.name}" for weight in empty)
        them = "it" if len(empty) == 1 else "them"
        depthwise = any("@depthwise" in weight.candidate.traits for weight in empty)
        advice = "exclude=['@depthwise']" if depthwise else "exclude="
        if hasattr(method, "min_active"):
            advice += ", or set min_active"
        method.warn_once(
            f"{enumerated(weight.name for weight in empty)} {'has' if len(empty) == 1 else 'have'} no active weight"
            f" left; no signal passes through {them}. To train {them}, leave {them} out with {advice}"
        )


def forget_moments(group: MaskGroup, weights: Sequence[MaskedWeight]) -> None:
    """Clear the optimizer's moments of all pruned weights."""
    for weight in weights:
        clear_moments(group.optimizer, weight.parameter, ~weight.mask)


def repair_written(method: Method) -> None:
    """If other code has written to weights since our last action, zero the pruned ones again."""
    run = method.last_run
    if run is None or not run.active:
        return
    for group, guard in run.guards.items():
        written = guard.written_weights()
        if written:
            _mend(method, group, written, "were written between two steps")
        if guard.suspects or guard.finds_some_awake():
            _look(method, group)


@torch.no_grad()
def look_at_all(method: Method, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Check every weight, because autograd's counters can miss writes, and every averaged copy."""
    run = method.last_run
    if run is None or not run.active:
        return
    run.averages.look(trainer, pl_module, method.weights)
    for group, guard in run.guards.items():
        written = guard.written_weights()
        if written:
            _mend(method, group, written, "were written between two steps")
        _look(method, group)
        run.averages.apply_(group)


@torch.no_grad()
def _look(
    method: Method, group: MaskGroup, cause: str = "were written without autograd's notice (.data, numpy)"
) -> None:
    awake = [weight for weight, count in zip(group, count_awake(group), strict=True) if count]
    if awake:
        method.run.guards[group].suspects = True
        _mend(method, group, awake, cause)


def look_after_step(method: Method, group: MaskGroup) -> None:
    """Check every weight after a step that prunes, after a step with more writes than before, or under suspicion."""
    guard = method.run.guards[group]
    if guard.step_is_odd() or guard.suspects or group.updated_at == method.step:
        _look(method, group, "were written between the gradients and the step")


def look_before_step(method: Method, group: MaskGroup) -> None:
    """Check every weight before an update of masks, or values that are written back, would hide foreign writes."""
    taken = method.step - method.run.origin
    if taken in (0, *_FIRST) or taken % _EVERY == 0 or method.updates_now(group):
        _look(method, group)


def look_now_and_then(method: Method) -> None:
    """Check every weight after every hundredth step; after the first two, also find which copies are averages."""
    run = method.run
    taken = method.step - run.origin
    if taken in _FIRST:
        run.averages.apply_(method.weights)
    if taken in _FIRST or taken % _EVERY == 0:
        for group in run.guards:
            _look(method, group)


def mend_gradients(method: Method, group: MaskGroup, written: Sequence[MaskedWeight]) -> None:
    """Undo, for pruned weights, a step on gradients that other code has changed after us."""
    for weight in written:
        weight.apply_()
    forget_moments(group, written)
    _say(
        method,
        written,
        "got gradients after this callback had cleared them (in a later callback, the module's"
        " on_before_optimizer_step or configure_gradient_clipping)",
    )


@torch.no_grad()
def _mend(method: Method, group: MaskGroup, written: Sequence[MaskedWeight], cause: str) -> None:
    if method.run.guards[group].has_moved():
        _refuse_shared_memory(method)
    if any(not weight.lies_as_its_mask for weight in group):
        group.lay_masks()
        method.run.guards[group].laid_anew()
    awake = [weight for weight, count in zip(written, count_awake(written), strict=True) if count]
    trainer = method.run.trainer()
    if trainer is not None and trainer.evaluating:
        # Averages that are swapped in and out, for example. Weights that stay are checked when training continues.
        for weight in written:
            weight.apply_()
    else:
        method.weights_written(written)
        method.run.guards[group].note_weights()
    if awake:
        if method.clears_gradients:  # otherwise pruned weights are trained too
            forget_moments(group, awake)
        steps = method.run.steps
        # Another warning says of these that no mask is applied.
        is_said = method.run.watched or group in steps.had_gradients - steps.seen
        if not is_said:
            _say(method, awake, cause)


def _refuse_shared_memory(method: Method) -> None:
    """Refuse two weights that were laid into one memory while a training runs, as in ``a.data = b.data.t()``."""
    weights = list(method.registry.values())
    shared = sorted({place for pair in overlapping([weight.value for weight in weights]) for place in pair})
    if shared:
        raise MisconfigurationException(SHARED.format(names=enumerated(weights[place].name for place in shared)))


def _say(method: Method, weights: Sequence[MaskedWeight], cause: str) -> None:
    if cause in method.run.warned:
        return
    method.run.warned.add(cause)
    method.warn_once(f"pruned weights of {enumerated(weight.name for weight in weights)} {cause}; they are zero again")


def compare_processes(method: Method) -> None:
    """Compare masks and weights between the processes. A collective.

    Raises:
        MisconfigurationException: Masks differ.
    """
    for group in method.groups:
        masks_agree(group)
        differ = check_weights_agree(group)
        if differ:
            method.warn_once(
                f"the weights of {enumerated(differ)} differ between the processes. Look for code that writes weights"
                " on some processes only"
            )


def warn_of_dead_filters(method: Method) -> None:
    """Warn of depthwise convolutions that have lost filters: a filter has few weights, and its channel needs it."""
    weights = [weight for weight in method.weights if "@depthwise" in weight.candidate.traits]
    alive = {weight: row_counts(weight.rows(weight.mask)) > 0 for weight in weights}
    dead = sum(int((~its).sum()) for its in alive.values())
    total = sum(its.numel() for its in alive.values())
    if dead > _MANY * total:
        names = enumerated(weight.name for weight, its in alive.items() if not its.all())
        method.warn_once(
            f"{dead:,} of {total:,} filters of depthwise convolutions have no active weight left, so their channels are"
            f" lost: {names}. exclude=['@depthwise'] leaves these few weights dense"
        )


def warn_of_thawed(method: Method) -> None:
    """Warn of weights that were frozen when masks were made, and are trained now without a mask."""
    left_dense = [name for name in method.run.plan.thawed if name not in method.registry]
    if left_dense:
        method.warn_once(
            f"trained now, but frozen when masks were made, so left dense: {enumerated(left_dense)}. To mask them,"
            " make them trainable before fit begins"
        )
