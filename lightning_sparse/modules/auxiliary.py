"""What the callbacks that change a module have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

__all__ = ["check_in_optimizer", "copy_again"]


def check_in_optimizer(
    trainer: pl.Trainer, added: Mapping[str, Sequence[nn.Parameter]], callback: type[pl.Callback]
) -> None:
    """Refuse optimizers that do not hold what a callback has added to the module.

    Args:
        trainer: Holds the optimizers.
        added: The parameters, by the name of the place where they are.
        callback: Who has added them.

    Raises:
        MisconfigurationException: One is in no optimizer.
    """
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, parameters in added.items() if any(id(parameter) not in held for parameter in parameters)]
    if missing:
        raise MisconfigurationException(
            f"No optimizer steps the parameters that {callback.__name__} has added at {', '.join(missing)}. Let"
            " configure_optimizers give self.parameters(), as they are when it is called, to an optimizer."
        )


def copy_again(trainer: pl.Trainer, pl_module: pl.LightningModule, callback: pl.Callback) -> None:
    """Let callbacks that average weights copy the module again: those that come before ``callback``, who changed it.

    Args:
        trainer: Holds the callbacks.
        pl_module: The module as it is now.
        callback: Who has changed it in its ``setup``.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for earlier in callbacks[: callbacks.index(callback)]:
        if isinstance(earlier, StochasticWeightAveraging | WeightAveraging):
            earlier.setup(trainer, pl_module, "fit")
