"""A method's state in checkpoints, and the states that training can resume from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse.functional.masks import awake, count_true, unpack
from lightning_sparse.masks.checkpoint import CheckpointError, fault_of_seal, load_checkpoint, masks_by_method
from lightning_sparse.masks.layout import is_sharded, saved_everywhere
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.plan import canonical_name, judge_parameters
from lightning_sparse.masks.registry import Left, MaskRegistry
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.masks.shapes import shapes_in
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.interface import Method
from lightning_sparse.methods.run import Beginning, Loaded, Run
from lightning_sparse.methods.settings import settings_of
from lightning_sparse.methods.state import check_state, sealed
from lightning_sparse.trainer import callbacks_of, is_a

__all__ = [
    "beginning_of",
    "denser_checkpoints",
    "forget_stale",
    "hold_saved",
    "look_at_saved",
    "look_before_loading",
    "look_no_more",
    "resume_no_more",
    "state_of",
    "take",
    "take_state",
]

# Of the weights; less is rounding, or an epoch of a method that moves weights about.
_TOLERANCE = 0.005


def state_of(method: Method) -> dict[str, Any]:
    """The state of ``method`` for a checkpoint that is written now; empty if it has never trained.

    A collective where weights are sharded: process 0 then has all of it, and writes it.
    """
    run, loaded = method.last_run, method.loaded
    if method.is_set_up and not (loaded is not None and loaded.resumes):
        method.had_no_state = True  # finders ask before training begins: what an earlier one left is no state of this
        return {}
    state = None if loaded is None or (run is not None and run.active) else loaded.state
    left = loaded.left if loaded is not None and state is not None else None if run is None else run.left
    if run is not None and not run.active and _is_awake_since(left, run.module()):
        method.warn_once(
            "pruned weights were written after training, so the masks no longer fit the module and are not saved. To"
            " keep the masks, call save_masks with this callback, or set the weights to zero with apply_masks"
        )
        return {}
    if state is not None:
        return dict(state)  # the weights are those of the checkpoint that was loaded since
    if run is None or (not run.groups and not run.plan.frozen):
        return {}
    return sealed(_state(method, run))


def _is_awake_since(left: Left | None, module: pl.LightningModule | None) -> bool:
    """Whether weights that were left pruned are not zero any more; where they are sharded, a collective."""
    return left is not None and module is not None and bool(left.bits) and not left.masks_of(module)


def _state(method: Method, run: Run) -> dict[str, Any]:
    masks: dict[str, Any] = {}
    for group in run.groups:
        masks |= group.packed()
    return {
        "step": method.step + run.steps.stepped,
        "origin": run.origin,
        "began_at": run.began_at,
        "masks": masks,
        "dense": [candidate.name for candidate in run.plan.dense],
        "frozen": [candidate.name for candidate in run.plan.frozen],
        "not_finite_for": [group.not_finite_for for group in run.groups],
        "method": method.method_state(),
        **settings_of(method),
    }


def look_before_loading(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let a sharded module refuse a checkpoint of weights of other shapes before one of them is loaded.

    Torch's own refusal comes with some of them loaded, and as an exception that is no :class:`Exception`. No hook knows
    the path in time, so that the strategy is made to look until :func:`look_no_more`.
    """
    strategy = trainer.strategy
    if not any(map(is_sharded, module.parameters())) or "load_checkpoint" in vars(strategy):
        return
    load = strategy.load_checkpoint

    def load_if_it_fits(checkpoint_path: str | Path, *arguments: Any, **more: Any) -> Any:
        look_no_more(trainer)
        _refuse_other_weights(Path(strategy.broadcast(checkpoint_path)), module)
        return load(checkpoint_path, *arguments, **more)

    strategy.load_checkpoint = load_if_it_fits


def look_no_more(trainer: pl.Trainer) -> None:
    """Let the strategy load as it does."""
    vars(trainer.strategy).pop("load_checkpoint", None)


def _refuse_other_weights(path: Path, module: pl.LightningModule) -> None:
    saved = shapes_in(path)
    its = {canonical_name(name): parameter.shape for name, parameter in module.named_parameters()}
    differ = [
        f"{printable(name)} {tuple(saved[name])} and {tuple(shape)}"
        for name, shape in its.items()
        if saved.get(name, shape) != shape
    ]
    if differ:
        more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise MisconfigurationException(
            f"The checkpoint {path} is not of this {type(module).__name__}: their shapes are {'; '.join(differ[:3])}"
            f"{more}. Nothing was loaded. Resume with the module that wrote the checkpoint."
        )


@torch.no_grad()
def take(method: Method, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Take what ``checkpoint``, whose weights are in the module, holds of masks.

    Raises:
        MisconfigurationException: Its masks cannot be read, or are not those of the module that is to be trained.
    """
    resumes = trainer.state.fn == "fit"
    states: Mapping[str, Any] = checkpoint.get("callbacks", {})
    own = states.get(method.state_key)
    if resumes and own is not None:
        check_state(own, method.state_key, method.state_fields())
    # A digest says least of what is wrong, so it is looked at last: that of its own state in begin, with masks laid.
    masks = _masks_of_all(checkpoint, unchecked=list(states) if resumes else [])
    if resumes:
        _refuse_unshared(states, pl_module, trainer.ckpt_path)
        _refuse_other_shapes(masks, pl_module)
        _masks_of_all(checkpoint, unchecked=[method.state_key])
    is_finders = method.is_set_up and method.had_no_state
    if resumes and not masks and (method.loaded is not None or is_finders):
        return  # the file of a finder, which puts back the weights that were there before
    is_whole = not resumes or own is None or not fault_of_seal(own)
    left = MaskRegistry.leave(pl_module, masks, given=False) if masks and is_whole else None
    # One of the same class with other include= or exclude= is no other method: that resume is refused.
    same_class = any(key.startswith(f"{type(method).__name__}{{") and key != method.state_key for key in states)
    if resumes and own is None and same_class:
        left = None
    method.loaded = Loaded(left=left, resumes=resumes)
    if not resumes and own is not None:
        _follow(method, pl_module, own)


def _masks_of_all(checkpoint: Mapping[str, Any], unchecked: Collection[str]) -> dict[str, Tensor]:
    try:
        methods = masks_by_method(checkpoint, "the checkpoint", unchecked)
    except CheckpointError as error:
        raise MisconfigurationException(f"{error} Resume from an earlier checkpoint.") from error
    return {name: mask for masks in methods.values() for name, mask in masks.items()}


def _refuse_other_shapes(masks: Mapping[str, Tensor], module: pl.LightningModule) -> None:
    for candidate in judge_parameters(module):
        mask, shape = masks.get(candidate.name), candidate.parameter.shape
        if mask is not None and mask.shape != shape:
            raise MisconfigurationException(
                f"The checkpoint's mask of {printable(candidate.name)} has shape {tuple(mask.shape)}, but the weight"
                f" has {tuple(shape)}. Resume with the module that wrote the checkpoint."
            )


def _refuse_unshared(states: Mapping[str, Any], module: pl.LightningModule, path: object) -> None:
    """Refuse to resume if weights had other numbers of uses: masks and optimizers would not fit."""
    uses = {candidate.name: candidate.uses for candidate in judge_parameters(module)}
    masks = [its["masks"] for its in states.values() if isinstance(its, Mapping) and isinstance(its.get("masks"), dict)]
    differ = [
        name
        for its in masks
        for name, mask in its.items()
        if mask.get("uses", 1) != 1 and uses.get(name, 1) != mask["uses"]
    ]
    if differ:
        shown = ", ".join(map(printable, differ))
        raise MisconfigurationException(
            f"In the checkpoint {path}, convolutions share the weights of {shown}, as under EAST. In this"
            f" {type(module).__name__} each has its own, so neither masks nor optimizers fit. Add WeightSharing() to"
            " the callbacks, with the arguments that it had then."
        )


def take_state(method: Method, state: Mapping[str, Any]) -> None:
    """Take what a checkpoint holds of the method itself."""
    if state:
        method.loaded = replace(method.loaded or Loaded(left=None, resumes=True), state=state)


def _follow(method: Method, module: pl.LightningModule, state: Mapping[str, Any]) -> None:
    """Let the masks that can be read of a method be those of the weights that were just loaded."""
    run = method.last_run
    if run is None or run.active or run.module() is not module:
        return
    try:
        check_state(state, method.state_key, method.state_fields())
        for group in run.groups:
            group.load_(state["masks"], "checkpoint")
    except (MisconfigurationException, CheckpointError):
        method.last_run = None  # it is not of these weights
        return
    method.step = state["step"]


@torch.no_grad()
def hold_saved(method: Method, checkpoint: dict[str, Any]) -> None:
    """Zero pruned weights in a checkpoint that is about to be written, where an earlier callback has put others in it.

    What a later one puts there is looked at once it is written, by :func:`look_at_saved`.
    """
    run = method.last_run
    if run is None or not run.active:
        return
    others = [
        (name, value, weight)
        for name, value, weight in _stored(checkpoint, method)
        # Whole values of a sharded weight were gathered for the checkpoint just now.
        if not is_sharded(weight.parameter) and value.data_ptr() != weight.value.data_ptr()
    ]
    if others:
        checkpoint["state_dict"] = copy(checkpoint["state_dict"])
    for name, value, weight in others:
        checkpoint["state_dict"][name] = value.masked_fill(~weight.mask.to(value.device), 0.0)
    run.saved = checkpoint


def look_at_saved(method: Method) -> None:
    """Warn where pruned weights are not zero in the checkpoint that was written last.

    Most of its weights are the module's own tensors: what was written to them since cannot be told from what it holds.
    """
    run = method.last_run
    if run is None or run.saved is None:
        return
    checkpoint, run.saved = run.saved, None
    masks = (checkpoint.get("callbacks", {}).get(method.state_key) or {}).get("masks", {})
    names = [
        weight.name
        for _, value, weight in _stored(checkpoint, method)
        if weight.name in masks and _is_awake(value, unpack(masks[weight.name]["bits"], weight.shape))
    ]
    if names:
        method.warn_once(
            f"pruned weights of {enumerated(names)} were written while or after a checkpoint was saved, so the file may"
            " hold values that are not zero. If on_save_checkpoint of a later callback or of the module writes them,"
            f" list that callback before {type(method).__name__}, or let it write zeros"
        )


def _stored(checkpoint: Mapping[str, Any], method: Method) -> list[tuple[str, Tensor, MaskedWeight]]:
    """The tensors of masked weights in a checkpoint, by their names there, where they are whole."""
    weights = {weight.name: weight for weight in method.weights}
    state = checkpoint.get("state_dict", {})  # which ModelParallelStrategy takes out as it writes
    written = ((name, value, weights.get(canonical_name(name))) for name, value in state.items())
    return [
        (name, value, weight)
        for name, value, weight in written
        if weight is not None and isinstance(value, Tensor) and not is_sharded(value) and value.shape == weight.shape
    ]


def _is_awake(value: Tensor, mask: Tensor) -> bool:
    return bool(awake(value, mask.to(value.device)).any())


def forget_stale(method: Method, module: pl.LightningModule) -> None:
    """As ``fit`` sets up, forget what a checkpoint has brought whose weights are no longer in ``module``."""
    loaded = method.loaded
    if loaded is not None and not _is_still_there(loaded.left, module):
        method.loaded = None


def resume_no_more(method: Method) -> None:
    """As a ``fit`` ends that has not begun to train, keep what its checkpoint has brought: weights that were loaded."""
    if method.loaded is not None:
        method.loaded = replace(method.loaded, resumes=False)


def _is_still_there(left: Left | None, module: pl.LightningModule) -> bool:
    return left is not None and MaskRegistry.last_left(module) is left and left.is_still_in(module)


def beginning_of(method: Method, trainer: pl.Trainer, module: pl.LightningModule) -> Beginning:
    """What a training that is about to start begins with.

    Raises:
        MisconfigurationException: A checkpoint is resumed that holds no masks, or damaged ones.
    """
    loaded, run = method.loaded, method.last_run
    if loaded is not None and loaded.resumes:
        if loaded.state is not None:
            return Beginning(check_state(loaded.state, method.state_key, method.state_fields()), goes_on=True)
        if loaded.left is None and trainer.ckpt_path is not None and trainer.global_step > 0:
            raise MisconfigurationException(
                f"The checkpoint {trainer.ckpt_path} holds no masks of {method.state_key}, so training would continue"
                " dense. It was written with save_weights_only=True, without this callback, or with other include="
                " and exclude=. To start from its weights, load them with load_from_checkpoint and call fit without"
                " ckpt_path."
            )
    if run is not None and run.active and run.trainer() is trainer:
        return run.beginning  # the trial of a learning-rate finder, whose steps are taken back
    # A Trainer that has taken steps goes on; with a new one a new training begins.
    goes_on = trainer.global_step > 0
    if loaded is not None and loaded.state is not None and _is_still_there(loaded.left, module):
        return Beginning(check_state(loaded.state, method.state_key, method.state_fields()), goes_on=goes_on)
    if loaded is None and run is not None and run.module() is module and _is_still_there(run.left, module):
        with saved_everywhere():
            return Beginning(_state(method, run), goes_on=goes_on, source="module")
    return Beginning(inherited=MaskRegistry.left_in(module))


def denser_checkpoints(method: Method, trainer: pl.Trainer) -> list[str]:
    """A sentence on each checkpoint that a ``ModelCheckpoint`` holds for the best, and that is denser than the end.

    The best by a metric is often from before the last weights were pruned.
    """
    sentences: list[str] = []
    for callback in callbacks_of(trainer):
        path = Path(getattr(callback, "best_model_path", "") or "")
        monitored: str | None = getattr(callback, "monitor", None)
        if not (is_a(callback, "ModelCheckpoint") and monitored and path.is_file()):
            continue
        masks = _masks_in(path, method.state_key)
        weights = [weight for weight in method.weights if weight.name in masks]
        numel = sum(weight.unshared_numel for weight in weights)
        at_the_end = sum(weight.num_active for weight in weights)
        active = sum(count_true(masks[weight.name]) for weight in weights)
        if active - at_the_end > _TOLERANCE * numel:
            its, last = 1 - active / numel, 1 - at_the_end / numel
            sentences.append(
                f"the best checkpoint by {monitored}, {path.name}, has sparsity {its:.4f}, and training ended"
                f" at {last:.4f}: it was saved before the last weights were pruned. Add a ModelCheckpoint() without"
                " monitor=, which keeps the last epoch, or let this one wait until the sparsity is reached, as the"
                " documentation shows under 'Keep the best'"
            )
    return sentences


def _masks_in(path: Path, state_key: str) -> Mapping[str, Tensor]:
    """The masks that the checkpoint at ``path`` holds of a method; none where it does not tell."""
    try:
        return masks_by_method(load_checkpoint(path), path).get(state_key, {})
    except CheckpointError:  # of a user's own making, with objects that are not to be loaded; this is a hint alone
        return {}
