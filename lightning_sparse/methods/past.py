"""What a training can go on from: a checkpoint, an earlier fit of its module, or masks that another method has left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final
from weakref import ref

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sparse.masks.checkpoint import masks_by_method
from lightning_sparse.masks.registry import MaskRegistry
from lightning_sparse.modules.weight_sharing import refuse_unshared
from lightning_sparse.trainer import callbacks_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Past"]


@final
class Past:
    """What one method knows of the training before the one that is about to begin.

    Lightning loads a checkpoint after ``setup``, where :meth:`visit` or :meth:`enter` is called, and before
    ``on_train_start``, where the method asks for its :meth:`state` or for the :meth:`masks_of_others`.
    """

    def __init__(self) -> None:
        self._state: Mapping[str, Any] | None = None
        self._masks_of_others: Mapping[str, Tensor] = {}
        self._trained: Callable[[], pl.LightningModule | None] = _nothing
        self._visited: Callable[[], pl.LightningModule | None] = _nothing
        self._given_before: Mapping[str, Tensor] = {}

    def visit(self, module: pl.LightningModule) -> None:
        """``module`` is to be validated, tested or asked for predictions."""
        self._visited = ref(module)
        self._forget_checkpoint()

    def enter(self, module: pl.LightningModule) -> None:
        """``module`` is to be trained."""
        # A state that is here already came with weights that validate or test has put into the module.
        if not (self._trained() is module is self._visited()) or self._given_since(module):
            self._forget_checkpoint()

    def remember(self, module: pl.LightningModule) -> None:
        """The training of ``module`` has begun."""
        self._trained = ref(module)

    def has_trained(self, module: pl.LightningModule) -> bool:
        """Whether the latest training that has begun was that of ``module``."""
        return self._trained() is module

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what a checkpoint holds of this method."""
        self._state = state or None

    def load_masks_of_others(self, method: pl.Callback, trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Take the masks of methods that were there when ``checkpoint`` was written, if ``method`` was not.

        Raises:
            MisconfigurationException: The module that is to be trained does not share weights as that one did.
        """
        if trainer.state.fn == "fit":
            refuse_unshared(trainer.lightning_module, checkpoint, trainer.ckpt_path)
        else:
            self._given_before = _given(trainer.lightning_module)
        here = {callback.state_key for callback in callbacks_of(trainer)}
        states: Mapping[str, Any] = checkpoint.get("callbacks", {})
        others = {key: state for key, state in states.items() if key not in here}
        # One of the same class with other include= or exclude= is no other method: that resume is refused.
        if method.state_key not in states and not any(key.startswith(f"{type(method).__name__}{{") for key in others):
            left = masks_by_method({"callbacks": others}, "the checkpoint")
            masks = {name: mask for its_masks in left.values() for name, mask in its_masks.items()}
            self._masks_of_others = masks or self._masks_of_others  # the learning-rate finder's file has none

    def state(
        self, method: pl.Callback, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> Mapping[str, Any] | None:
        """The state with which ``method`` goes on as ``pl_module`` is trained; None where it begins.

        Raises:
            MisconfigurationException: The checkpoint that is resumed holds no masks.
        """
        if self._state is not None:
            return self._state
        if self._masks_of_others:
            return None
        # At step 0 the path is that of the weights which the learning-rate finder has just put back.
        if trainer.ckpt_path is not None and trainer.global_step > 0:
            raise MisconfigurationException(
                f"The checkpoint {trainer.ckpt_path} holds no masks of {method.state_key}, so resuming would go on"
                " dense. Either it was written with save_weights_only=True or without this callback (or with other"
                " include= and exclude=). To begin with its weights, load them with load_from_checkpoint and call fit"
                " without ckpt_path."
            )
        # Masks that a module was given since replace those with which this very method has ended.
        goes_on = self.has_trained(pl_module) and not MaskRegistry.was_given(pl_module)
        state = method.state_dict() if goes_on else {}
        return state | {"began_at": 0} if state else None

    def masks_of_others(self, pl_module: pl.LightningModule) -> Mapping[str, Tensor]:
        """The masks that other methods have left, in the checkpoint that is resumed or in ``pl_module``."""
        return self._masks_of_others or MaskRegistry.left_in(pl_module)

    def _given_since(self, module: pl.LightningModule) -> bool:
        """Whether ``module`` was given masks after validate or test had put the weights of a checkpoint into it."""
        given, before = _given(module), self._given_before
        return bool(given) and not (
            given.keys() == before.keys() and all(torch.equal(mask, before[name]) for name, mask in given.items())
        )

    def _forget_checkpoint(self) -> None:
        self._state, self._masks_of_others, self._given_before = None, {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_trained": _nothing, "_visited": _nothing}  # a reference cannot go to another process


def _given(module: pl.LightningModule) -> dict[str, Tensor]:
    """The masks that ``module`` was given since its last training; empty where its weights no longer fit them."""
    if not MaskRegistry.was_given(module):
        return {}
    return {name: mask.cpu() for name, mask in MaskRegistry.left_in(module).items()}


def _nothing() -> None:
    return None
