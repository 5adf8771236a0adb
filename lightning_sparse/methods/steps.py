"""Around an optimizer's step: which one is announced, whether it came, and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.layout import laid_like
from lightning_sparse.masks.moments import scaler_of_step, skipped_step
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods import holding
from lightning_sparse.methods.interface import Method
from lightning_sparse.trainer import clips_gradients

__all__ = [
    "announced",
    "batch_ended",
    "clip_again",
    "dissolve",
    "form",
    "leave_out",
    "put_to_work",
    "regroup",
    "warn_of_unseen",
]


def announced(method: Method, trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Lightning announces a step of ``optimizer``: let the method act on the gradients of the weights in it."""
    run = method.last_run
    if run is None or not run.active:
        return
    module = run.module()
    if module is not None:
        run.averages.notice(trainer, module, method.weights)
    groups = [group for group in run.groups if group.optimizer is optimizer]
    if not groups:
        run.steps.stepped = True  # as of a discriminator, while the generator's turn comes every fifth batch
    for group in groups:
        run.steps.awaiting.add(group)
        run.steps.seen.add(group)
        # Somebody may have written within training_step or after backward.
        written = run.guards[group].written_weights()
        graphs = _make_plain(method, group)
        if not graphs:  # else autograd would refuse
            if written:
                holding.repair_written(method)
            holding.look_before_step(method, group)
        if graphs:
            run.steps.differentiated.add(group)
        method.before_step(trainer, group)
        _put_back(graphs, masked=method.clears_gradients)
        if method.clears_gradients:
            run.guards[group].note_gradients()
            if run.guards[group].moments_are_others():  # of weights that were active then
                holding.forget_moments(group, group)
            run.guards[group].step_begins()
        else:
            run.guards[group].note_weights()  # their dense values are laid in


def _make_plain(method: Method, group: MaskGroup) -> dict[MaskedWeight, Tensor]:
    """Let methods change gradients in place: the sparse gradients of ``Embedding(sparse=True)`` become dense.

    Returns:
        The gradients with their graphs, if the optimizer may differentiate them in its step, as AdaHessian and
        SophiaH do.
    """
    torchs = type(group.optimizer).__module__.startswith("torch.optim")  # which differentiate nothing
    graphs: dict[MaskedWeight, Tensor] = {}
    for weight in group:
        grad = weight.parameter.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            if isinstance(group.optimizer, torch.optim.SparseAdam):
                raise MisconfigurationException(
                    f"{weight.name} has sparse gradients, which {type(method).__name__} makes dense, and SparseAdam"
                    " takes no dense ones. Give the weight to another optimizer, or leave it out with exclude=."
                )
            weight.parameter.grad = grad.to_dense()
        elif grad.grad_fn is not None and not torchs:
            graphs[weight] = grad
            weight.parameter.grad = grad.detach().clone()
        elif (laid := laid_like(grad, weight.parameter)) is not grad:
            weight.parameter.grad = laid
    return graphs


class _Rewritten(torch.autograd.Function):
    """A gradient as a method has changed it, with the derivatives that it had before, where weights are active."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """The values that a method has given it."""
        ctx.mask = mask
        return values.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """The derivative of the gradient itself, or of the masked one."""
        return grad if ctx.mask is None else grad * ctx.mask, None, None


def _put_back(graphs: dict[MaskedWeight, Tensor], *, masked: bool) -> None:
    with torch.enable_grad():
        for weight, grad in graphs.items():
            values = weight.parameter.grad
            weight.parameter.grad = _Rewritten.apply(grad, values, weight.mask if masked else None)  # type: ignore[assignment]


def leave_out(method: Method, trainer: pl.Trainer, optimizer: Optimizer) -> None:
    """Let ``optimizer`` find no gradient, where a method has updated its masks instead of a step."""
    idle = method.registry.idle_optimizers
    if optimizer in idle:
        idle.discard(optimizer)
        scaler = scaler_of_step(trainer, optimizer)
        if scaler is not None:
            scaler.unscale_(optimizer)  # it refuses to go on from a step in which it has seen no gradient
        optimizer.zero_grad()  # torch's optimizers leave alone what has no gradient
        if trainer.gradient_clip_algorithm == "value":  # which torch cannot do where there is no gradient at all
            method.run.steps.clip_val, trainer.gradient_clip_val = trainer.gradient_clip_val, None


def clip_again(method: Method) -> None:
    """Give the Trainer back how it clips, after a step that was left out."""
    steps, trainer = method.run.steps, method.run.trainer()
    if steps.clip_val is not None and trainer is not None:
        trainer.gradient_clip_val, steps.clip_val = steps.clip_val, None


def put_to_work(method: Method, trainer: pl.Trainer, group: MaskGroup) -> None:
    """Let the masks of ``group`` hold from now on."""
    run = method.run
    holding.refuse_nan_outputs(method, group)
    group.recount()
    group.apply_()
    run.guard(group)
    holding.masks_are_others(method, group)
    _hook(method, trainer, group)


def regroup(
    method: Method, group: MaskGroup, by_optimizer: Mapping[Optimizer, Sequence[MaskedWeight]]
) -> list[MaskGroup]:
    """Put a group for each optimizer, of weights that have masks already, in the place of ``group``."""
    dissolve(method, group)
    return [form(method, weights, optimizer, like=group) for optimizer, weights in by_optimizer.items()]


def dissolve(method: Method, group: MaskGroup) -> None:
    """Let go of a group; its weights keep their masks."""
    run = method.run
    run.groups.remove(group)
    run.guards.pop(group, None)
    run.steps.unhook(group)
    run.steps.awaiting.discard(group)
    run.steps.differentiated.discard(group)


def form(method: Method, weights: Sequence[MaskedWeight], optimizer: Optimizer, like: MaskGroup) -> MaskGroup:
    """Make a group of weights that have masks already, and let them hold under ``optimizer``."""
    run, trainer = method.run, method.run.trainer()
    new = MaskGroup.of(weights, optimizer, like=like)
    run.groups.append(new)
    for groups in (run.steps.seen, run.steps.had_gradients):
        if like in groups:
            groups.add(new)
    new.apply_()
    run.guard(new)
    if trainer is not None:
        _hook(method, trainer, new)
    method.group_changed(new)
    return new


def _hook(method: Method, trainer: pl.Trainer, group: MaskGroup) -> None:
    optimizer, steps = group.optimizer, method.run.steps
    if hasattr(optimizer, "_optimizer_step_post_hooks"):  # not of wrappers that never call Optimizer.__init__
        steps.handles[group] = [
            optimizer.register_step_pre_hook(_before_step(method, group)),
            optimizer.register_step_post_hook(_after_step(method, group, clipped=clips_gradients(trainer))),
        ]


def _before_step(method: Method, group: MaskGroup) -> Callable[..., None]:
    # In automatic optimization the closure, with forward and backward in it, runs between this hook and the next.
    def repair(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if (args[1] if len(args) > 1 else kwargs.get("closure")) is not None:  # what comes first is the optimizer
            method.run.steps.given_closures.add(group)
        if not method.run.steps.awaiting:
            holding.repair_written(method)

    return _uncompiled(repair)


def _after_step(method: Method, group: MaskGroup, *, clipped: bool) -> Callable[..., None]:
    @torch.no_grad()
    def finish(optimizer: Optimizer, *_: Any) -> None:
        steps = method.run.steps
        if group not in steps.seen:
            raise MisconfigurationException(_unseen(method, optimizer, ignores=group in steps.given_closures))
        if group in steps.awaiting:  # an optimizer whose step calls super().step() comes here twice
            steps.awaiting.discard(group)
            _stepped(method, group, clipped=clipped)

    return _uncompiled(finish)


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that a compiled ``optimizer.step`` calls as it is."""
    return cast("Callable[..., None]", torch.compiler.disable(hook))


def _unseen(method: Method, optimizer: Optimizer, *, ignores: bool) -> str:
    """Why a step was never announced: its closure was ignored, by which it is, or it had none."""
    kind, name = type(optimizer).__name__, type(method).__name__
    if ignores:
        return (
            f"{kind}.step() does not call the closure that Lightning gives it, so {name} never saw gradients. Let"
            " step(closure=None) begin with loss = closure() if closure else None, in a subclass if need be."
        )
    return (
        f"{kind} stepped without Lightning, so {name} never saw its gradients. In manual optimization, take the"
        " optimizer from self.optimizers() and call its step()."
    )


def _stepped(method: Method, group: MaskGroup, *, clipped: bool) -> None:
    run = method.run
    guard = run.guards[group]
    if skipped_step(group.optimizer):
        method.step_skipped(group)
    else:
        run.steps.stepped = True
        written = guard.written_gradients(clipped=clipped)
        if written and method.clears_gradients:
            holding.mend_gradients(method, group, written)
        method.after_step(group)
        if method.clears_gradients:
            holding.look_after_step(method, group)
    if group in run.steps.differentiated:
        run.steps.differentiated.discard(group)
        group.apply_()
    guard.note_weights()


@torch.no_grad()
def batch_ended(method: Method) -> None:
    """Count the step that was taken; find those that never were, and those whose optimizer has no hooks."""
    run = method.last_run
    if run is None or not run.active:
        return
    steps = run.steps
    clip_again(method)
    for group in list(steps.awaiting):
        if group not in steps.handles and run.guards[group].written_weights():
            _stepped(method, group, clipped=False)
        else:
            method.step_skipped(group)
            steps.differentiated.discard(group)
            run.guards[group].note_weights()
    for group in set(run.groups) - steps.seen - steps.had_gradients:
        if any(weight.parameter.grad is not None for weight in group):
            steps.had_gradients.add(group)  # looked for now, because validation clears them
    steps.awaiting.clear()
    steps.given_closures.clear()
    if steps.stepped:
        steps.stepped = False
        method.step += 1
        holding.look_now_and_then(method)


def warn_of_unseen(method: Method) -> None:
    """Warn of optimizers whose weights have gradients, and whose steps were never announced."""
    steps = method.run.steps
    for group in method.groups:
        if group in steps.had_gradients - steps.seen:
            method.warn_once(
                f"{type(group.optimizer).__name__} has not stepped through Lightning in a whole epoch, so its weights"
                " are not kept at zero. In manual optimization, take it from self.optimizers() and call its step()"
            )
