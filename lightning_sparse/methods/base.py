"""What every method shares: the hooks, the clock, the masks' place in a training, checkpoints.

The training loop, with the points at which a method acts::

    fit
     ├ setup                        what cannot work is refused; no weight is touched
     ├ on_train_start               weights are selected; masks are restored or made, broadcast, applied
     │  ├ forward · backward · all-reduce · unscale
     │  ├ on_before_optimizer_step  → before_step   gradients are final and not yet clipped
     │  ├ clip · optimizer.step
     │  ├ optimizer's post-hook     → after_step    the weights have moved
     │  ├ on_train_batch_end        → step_skipped, for a step that the GradScaler did not take; the clock moves
     │  ├ on_validation_start       pruned weights are zero
     │  └ on_train_epoch_end        sparsity is logged; the ranks are checked to agree
     └ on_fit_end, on_exception     hooks are removed; the module is left sparse

The clock counts optimizer steps that were really taken. With several optimizers (manual optimization) it counts the
batches in which one of them stepped.

One method may go on where another has ended: given its checkpoint as ``ckpt_path``, or its module, it takes over the
masks (``inherited``), and its own training, of which durations may be fractions, begins there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sparse.masks.averaging import mask_averaged_weights
from lightning_sparse.masks.distributed import broadcast_, check_ranks_agree
from lightning_sparse.masks.optimizer_state import all_finite, skipped_step
from lightning_sparse.masks.plan import Candidate, as_patterns, select_weights
from lightning_sparse.masks.registry import MaskedWeight, MaskGroup, MaskRegistry
from lightning_sparse.masks.succession import forget_pruned, waking_zeros
from lightning_sparse.methods.best_checkpoint import denser_checkpoints
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.past import Past
from lightning_sparse.methods.requirements import refuse_optimizers, refuse_strategy
from lightning_sparse.trainer import callbacks_of, steps_of_training, steps_taken

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle


__all__ = ["SparseMethod", "total_target_sparsity"]

# Steps in a row without a finite gradient, after which training has diverged.
_PATIENCE = 100


class SparseMethod(pl.Callback, ABC):
    """A method of sparse training, as a callback.

    A subclass says what happens around a step (:meth:`before_step`, :meth:`after_step`, :meth:`step_skipped`), how
    masks begin (:meth:`initialize_masks`) and what sparsity it aims at; the hooks are not to be overridden.

    Args:
        include: Patterns of what is masked; see :func:`~lightning_sparse.masks.select_weights`.
        exclude: Patterns of what stays dense.
        seed: Seed of everything that the method draws at random.

    Attributes:
        paper: Where the method is defined.
        needs_dense_gradients: Whether an update reads the gradients of pruned weights, which cost a dense backward.
        step: Optimizer steps taken so far.
    """

    paper: ClassVar[Paper]
    needs_dense_gradients: ClassVar[bool] = False

    def __init__(self, *, include: Sequence[str] | None, exclude: Sequence[str] | None, seed: int) -> None:
        self.include, self.exclude = as_patterns("include", include), as_patterns("exclude", exclude)
        self.seed = seed
        # Lightning asks for it at every hook.
        self._state_key = self._generate_state_key(include=self.include, exclude=self.exclude)
        self.step = 0
        self._registry = MaskRegistry()
        self._groups: list[MaskGroup] = []
        self._handles: list[RemovableHandle] = []
        self._awaiting_step: set[int] = set()
        self._stepped_in_batch = False
        self._seen: set[int] = set()
        self._had_gradients: set[int] = set()
        self._past = Past()
        self._inherited: Mapping[str, Tensor] = {}
        self._began_at = 0
        self._dense: list[Candidate] = []
        self._frozen: list[Candidate] = []
        self._thawed: list[str] = []
        self._warned: set[str] = set()

    # What a method implements.

    @abstractmethod
    def resolve_times(self, total_steps: float) -> None:
        """Turn durations into steps, for a training of ``total_steps`` (``inf`` where unknown)."""

    @abstractmethod
    def initialize_masks(self, group: MaskGroup) -> None:
        """Write the masks with which training begins into ``group.mask``, which is all active.

        Where ``self.inherited`` has masks, training goes on from them as far as the method can.
        """

    @abstractmethod
    def before_step(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        """Act on the final gradients of ``group``, before its optimizer steps. No gradient is recorded."""

    @abstractmethod
    def after_step(self, group: MaskGroup) -> None:
        """Act on the weights of ``group`` that its optimizer has just moved."""

    @abstractmethod
    def step_skipped(self, group: MaskGroup) -> None:
        """The step that :meth:`before_step` prepared was not taken."""

    @abstractmethod
    def target_sparsity(self, name: str | None = None) -> float:
        """The sparsity that the method aims at now, over its weights together or in the weight ``name``."""

    @abstractmethod
    def extra_metrics(self) -> dict[str, float]:
        """What is logged at the end of an epoch besides sparsity, equal on every rank."""

    @abstractmethod
    def method_state(self) -> dict[str, Any]:
        """What the method must remember besides its masks: tensors and primitives alone."""

    @abstractmethod
    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`method_state` gave; empty where training begins."""

    @abstractmethod
    def training_ended(self) -> None:
        """Training has run to its end; say what the user should know of it."""

    def mask_of_thawed(self, name: str) -> Tensor | None:
        """The mask of a weight that was frozen when masks were made and is trained now; None leaves it dense."""
        return None

    @property
    def masks_what_thaws(self) -> bool:
        """Whether the method has masks for frozen weights, so that it may begin with nothing that is trained."""
        return type(self).mask_of_thawed is not SparseMethod.mask_of_thawed

    def companions(self) -> Sequence[pl.Callback]:
        """Callbacks that the method brings with it; they work in the Trainer, right behind it."""
        return ()

    # What a user reads.

    @property
    def registry(self) -> MaskRegistry:
        """The masks of the module in training, by parameter name, other methods' included; empty before training."""
        return self._registry

    @property
    def groups(self) -> Sequence[MaskGroup]:
        """The weights of this method, one group for each optimizer that steps some of them."""
        return self._groups

    @property
    def weights(self) -> list[MaskedWeight]:
        """The weights of this method."""
        return [weight for group in self._groups for weight in group]

    @property
    def dense(self) -> Sequence[Candidate]:
        """The parameters of the module that this method leaves dense, each with its reason."""
        return self._dense

    @property
    def inherited(self) -> Mapping[str, Tensor]:
        """The masks that this training began with because another method had left them, by parameter name."""
        return self._inherited

    @property
    @override
    def state_key(self) -> str:
        return self._state_key

    # The hooks.

    @final
    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks = callbacks_of(trainer)
        for companion in reversed(self.companions()):
            if companion not in callbacks:  # Lightning comes to it next in this very loop
                callbacks.insert(callbacks.index(self) + 1, companion)
        if stage != "fit":
            self._past.visit(pl_module)
            return
        self._past.enter(pl_module)
        if not self._past.has_trained(pl_module):
            self._groups = []
        refuse_strategy(type(self).__name__, trainer)
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            self.resolve_times(math.inf)

    @final
    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_optimizers(type(self).__name__, trainer)

    @final
    @override
    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = dict(self.__dict__)
        state = self._past.state(self, trainer, pl_module)
        patterns = {"include": self.include, "exclude": self.exclude}
        plan = select_weights(pl_module, **patterns, frozen=self.masks_what_thaws)
        were_frozen: Sequence[str] = ()
        if state is not None:
            plan = plan.without(dict.fromkeys(state.get("dense", ()), "dense in the run that is resumed"))
            were_frozen = state.get("frozen", ())
        self._dense = [candidate for candidate in plan if candidate.reason]
        self._frozen = [c for c in self._dense if c.reason == "frozen" or c.name in were_frozen]
        self._thawed = []
        self._registry = MaskRegistry.of(pl_module)
        self._groups = self._registry.claim(self.state_key, plan.masked, trainer.optimizers)
        try:
            self._inherited = self._masks_of_others(trainer, pl_module) if state is None else {}
            self._began_at = steps_taken(trainer, pl_module) if state is None else state.get("began_at", 0)
            self._begin(state)
            self.resolve_times(steps_of_training(trainer, pl_module) - self._began_at)
        except Exception:
            self._registry.release(self.state_key)
            for name, value in before.items():  # a refused resume takes nothing of what was there
                setattr(self, name, value)
            raise
        self._past.remember(pl_module)
        for group in self._groups:
            broadcast_(group.mask)
            self._put_to_work(trainer, group, begins=state is None)
        for remark in plan.remarks:
            self._warn_once(remark.removesuffix("."))
        rank_zero_info(f"{type(self).__name__}: {plan.summary} Sparsity {self._registry.sparsity:.4f}.")

    def _put_to_work(self, trainer: pl.Trainer, group: MaskGroup, *, begins: bool) -> None:
        """Let the masks of ``group`` hold from now on."""
        group.recount()
        group.apply_()
        if begins:
            forget_pruned(group, self._inherited)
        mask_averaged_weights(trainer, group)
        self._name_empty_layers(group)
        self._handles.append(group.optimizer.register_step_post_hook(self._post_hook(group)))

    def _masks_of_others(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Mapping[str, Tensor]:
        """The masks that another method has left of the weights of this one."""
        left = self._past.masks_of_others(pl_module)
        for weight in self.weights:
            if weight.name in left and left[weight.name].shape != weight.shape:
                raise MisconfigurationException(
                    f"The checkpoint's mask of {weight.name} has shape {tuple(left[weight.name].shape)}, but the weight"
                    f" has {tuple(weight.shape)}. Resume with the module that wrote the checkpoint."
                )
        # What is frozen is not trained; it is named when it thaws.
        unmasked = left.keys() - self._registry.keys() - {candidate.name for candidate in self._frozen}
        if unmasked and [other for other in callbacks_of(trainer) if isinstance(other, SparseMethod)][-1] is self:
            self._warn_once(
                f"{', '.join(sorted(unmasked))} had masks until now, but no method of this Trainer takes them over, so"
                " their zeros are trained again. Widen include= or exclude=, or add FixedMask(include=...) for them"
            )
        return {weight.name: left[weight.name] for weight in self.weights if weight.name in left}

    def _begin(self, state: Mapping[str, Any] | None) -> None:
        self._awaiting_step, self._seen, self._had_gradients, self._warned = set(), set(), set(), set()
        self._stepped_in_batch = False
        if state is None:
            self.step = 0
            self.load_method_state({})
            for group in self._groups:
                self.initialize_masks(group)
            self._warn_of_waking()
            return
        missing = {"step", "masks", "method"} - state.keys()
        if missing:
            raise MisconfigurationException(
                f"The checkpoint's state of {self.state_key} is cut short: it lacks {', '.join(sorted(missing))}."
                " Resume from an earlier checkpoint."
            )
        for group in self._groups:
            group.load_(state["masks"])
        self.step = state["step"]
        for group, lasted in zip(self._groups, state.get("not_finite_for", ()), strict=False):
            group.not_finite_for = lasted
        self.load_method_state(state["method"])

    def _warn_of_waking(self) -> None:
        names = waking_zeros(self._groups, self._inherited)
        if names:
            self._warn_once(
                f"{', '.join(names)} hold zeros as after a sparse training, and no masks came with them: the zeros are"
                " trained again. To go on from their masks, call lightning_sparse.apply_masks(model, masks) before fit,"
                " with the model that fit is given, resume with ckpt_path, or train with FixedMask"
            )

    @final
    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._frozen:
            self._take_in_thawed(trainer, optimizer)
        for index, group in enumerate(self._groups):
            if group.optimizer is optimizer:
                self._awaiting_step.add(index)
                self._seen.add(index)
                self.before_step(trainer, group)
        if optimizer in self._registry.idle_optimizers and self is _methods_in_training(trainer)[-1]:
            self._registry.idle_optimizers.discard(optimizer)
            optimizer.zero_grad()  # torch's optimizers leave alone what has no gradient

    def _take_in_thawed(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Mask what was frozen until now and is about to be stepped, where the method has masks for it."""
        # Not what has a gradient here: on another process it may have none.
        trainable = [candidate for candidate in self._frozen if candidate.parameter.requires_grad]
        if not trainable:
            return
        stepped = {id(parameter) for param_group in optimizer.param_groups for parameter in param_group["params"]}
        thawed = [candidate for candidate in trainable if id(candidate.parameter) in stepped]
        masks = {c.name: mask for c in thawed if (mask := self.mask_of_thawed(c.name)) is not None}
        masked = [candidate for candidate in thawed if candidate.name in masks]
        for group in self._registry.claim_more(self.state_key, masked, [optimizer]):
            for weight in group:
                weight.mask.copy_(masks[weight.name])
            group.updated_at = self.step
            broadcast_(group.mask)
            self._groups.append(group)
            self._put_to_work(trainer, group, begins=True)
            for weight in group:
                weight.budget = weight.num_active
        # Decided once: zeros that a dense layer comes by later are no mask.
        gone = {candidate.name for candidate in thawed}
        self._thawed += [name for name in gone if name not in masks]
        self._frozen = [candidate for candidate in self._frozen if candidate.name not in gone]
        self._dense = [candidate for candidate in self._dense if candidate.name not in masks]

    def _post_hook(self, group: MaskGroup) -> Callable[..., None]:
        index = self._groups.index(group)

        @torch.no_grad()
        def after_optimizer_step(optimizer: Optimizer, *_: Any) -> None:
            if index not in self._seen:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} stepped without Lightning, so {type(self).__name__} never saw its"
                    " gradients. In manual optimization, take the optimizer from self.optimizers() and call its step()."
                )
            if index not in self._awaiting_step:  # an optimizer whose step calls super().step() comes here twice
                return
            self._awaiting_step.discard(index)
            if skipped_step(optimizer):
                self.step_skipped(group)
            else:
                self._stepped_in_batch = True
                self.after_step(group)

        return after_optimizer_step

    @final
    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for index in self._awaiting_step:
            self.step_skipped(self._groups[index])
        for index in set(range(len(self._groups))) - self._seen - self._had_gradients:
            if any(weight.parameter.grad is not None for weight in self._groups[index]):
                self._had_gradients.add(index)  # looked for now, because validation clears them
        self._awaiting_step.clear()
        self.step += self._stepped_in_batch
        self._stepped_in_batch = False

    @final
    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply_masks(trainer)

    @final
    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply_masks(trainer)
        for index, group in enumerate(self._groups):
            check_ranks_agree(group)
            if index in self._had_gradients - self._seen:
                self._warn_once(
                    f"{type(group.optimizer).__name__} has not stepped through Lightning in a whole epoch, so masks do"
                    " not hold. In manual optimization, take it from self.optimizers() and call its step()"
                )
        left_dense = [name for name in self._thawed if name not in self._registry]
        if left_dense:
            self._warn_once(
                f"trained now, but frozen when masks were made, so left dense: {', '.join(left_dense)}. To mask them,"
                " let them be trainable when fit begins"
            )
        # The values are equal on every rank; sync_dist tells Lightning so. Two methods log the same: those of both.
        values = {"sparsity": self._registry.sparsity, "sparsity/target": total_target_sparsity(trainer)}
        values |= self.extra_metrics()
        pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)

    @final
    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply_masks(trainer)
        self.training_ended()
        if trainer.is_global_zero:
            for sentence in denser_checkpoints(self, trainer):
                self._warn_once(sentence)

    @final
    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._leave(trainer, pl_module)

    @final
    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave(trainer, pl_module)

    def _apply_masks(self, trainer: pl.Trainer) -> None:
        for group in self._groups if self._handles else ():  # between on_train_start and the end of fit
            group.apply_()
            mask_averaged_weights(trainer, group)

    def _leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module sparse, and nothing else behind."""
        self._apply_masks(trainer)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        MaskRegistry.forget(pl_module)

    # Checkpoints.

    @final
    @override
    @torch.no_grad()
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._apply_masks(trainer)  # in place: the averaged weights that are about to be written are the same tensors

    @final
    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._groups and not self._frozen:
            return {}  # the learning-rate finder asks before training begins
        masks: dict[str, Any] = {}
        for group in self._groups:
            masks |= group.packed()
        return {
            "step": self.step + self._stepped_in_batch,
            "began_at": self._began_at,
            "masks": masks,
            "dense": [candidate.name for candidate in self._dense],
            "frozen": [candidate.name for candidate in self._frozen],
            "not_finite_for": [group.not_finite_for for group in self._groups],
            "method": self.method_state(),
        }

    @final
    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._past.load_masks_of_others(self, trainer, checkpoint)

    @final
    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._past.load_state(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": []}  # which cannot go to another process

    # Shared by the families.

    @final
    def be_patient(self, group: MaskGroup) -> None:
        """To be called where gradients of ``group`` are not finite; raises once that has lasted for 100 steps in a row.

        Raises:
            RuntimeError: It has.
        """
        group.not_finite_for += 1
        if group.not_finite_for >= _PATIENCE:
            names = [weight.name for weight in group if not all_finite([weight.grad])]
            raise RuntimeError(
                f"The gradients of {', '.join(names)} were inf or NaN at {_PATIENCE} steps in a row, and masks never"
                " change on such gradients. Training has diverged: lower the learning rate, clip gradients"
                " (gradient_clip_val), or look for the loss that is not finite with Trainer(detect_anomaly=True)."
            )

    @final
    def masks_changed(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        """To be called when the masks of ``group`` were written: makes them true everywhere, and names dead layers."""
        group.recount()
        group.apply_()
        mask_averaged_weights(trainer, group)
        self._registry.num_updates += 1
        self._name_empty_layers(group)

    def _name_empty_layers(self, group: MaskGroup) -> None:
        for weight in group:
            if weight.num_active == 0:
                self._warn_once(
                    f"{weight.name} has no active weight left; nothing flows through it. Leave it out with exclude= to"
                    " train it, or set min_active where a method chooses the masks"
                )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(f"{type(self).__name__} at step {self.step}: {message}.")


def total_target_sparsity(trainer: pl.Trainer) -> float:
    """The sparsity that the methods of ``trainer`` aim at now, over all their weights together."""
    methods = _methods_in_training(trainer)
    sizes = [sum(group.unshared_numel for group in method.groups) for method in methods]
    zeros = [size * method.target_sparsity() for size, method in zip(sizes, methods, strict=True)]
    return sum(zeros) / sum(sizes) if sizes else 0.0


def _methods_in_training(trainer: pl.Trainer) -> list[SparseMethod]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, SparseMethod) and callback.groups]
