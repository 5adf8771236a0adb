"""What no method can work with, refused before a weight is touched."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sparse.methods.interface import Method

__all__ = ["refuse_optimizers", "refuse_other_trainer", "refuse_strategy"]

# By name: with pytorch_lightning and lightning both installed, isinstance fails across the two.
_UNSUPPORTED_STRATEGIES = {
    "FSDPStrategy": "it shards the weights",
    "ModelParallelStrategy": "it shards the weights",
    "DeepSpeedStrategy": "its engine owns the optimizer step",
    "XLAFSDPStrategy": "it shards the weights",
    "XLAStrategy": "it compiles the step",
}


def refuse_strategy(method: str, trainer: pl.Trainer) -> None:
    """Refuse a strategy whose weights or steps a callback does not see whole.

    Raises:
        MisconfigurationException: The trainer's is one.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _UNSUPPORTED_STRATEGIES:
            raise MisconfigurationException(
                f"{method} does not support {type(trainer.strategy).__name__}:"
                f" {_UNSUPPORTED_STRATEGIES[kind.__name__]}. Use strategy='ddp' or a single device."
            )


def refuse_optimizers(method: str, trainer: pl.Trainer) -> None:
    """Refuse an optimizer that evaluates the loss several times a step.

    Raises:
        MisconfigurationException: One of the trainer's does.
    """
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                f"{method} cannot work with LBFGS: its line search evaluates the loss several times a step, at weights"
                " that no mask can hold. Use SGD, Adam or another torch optimizer."
            )


def refuse_other_trainer(method: Method, trainer: pl.Trainer) -> None:
    """Refuse a callback that trains in another Trainer already, as in a fit within a fit.

    Raises:
        MisconfigurationException: It does.
    """
    run = method.last_run
    if run is not None and run.active and run.trainer() is not trainer:
        raise MisconfigurationException(
            f"This {type(method).__name__} is in the middle of a training by another Trainer, whose masks it would"
            " lose. Give each Trainer a callback of its own."
        )
