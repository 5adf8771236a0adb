"""Strategies and optimizers that no method works with; they are refused before a weight changes."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sparse.masks.layout import is_sharded
from lightning_sparse.methods.interface import Method
from lightning_sparse.trainer import callbacks_of, is_a

__all__ = ["refuse_optimizers", "refuse_other_trainer", "refuse_strategy"]

_INSTEAD = "Use strategy='ddp', strategy=ModelParallelStrategy() (FSDP2 and tensor parallelism), or a single device"

# By name: with pytorch_lightning and lightning both installed, isinstance fails across the two.
_UNSUPPORTED_STRATEGIES = {
    "FSDPStrategy": "FSDP1 flattens the weights of several layers into one. Use FSDP2, which keeps them:"
    " strategy=ModelParallelStrategy(), with fully_shard in configure_model; or strategy='ddp'",
    "DeepSpeedStrategy": f"its engine owns the optimizer step. {_INSTEAD}",
    "XLAFSDPStrategy": f"it flattens the weights. {_INSTEAD}",
    "XLAStrategy": f"it compiles the step. {_INSTEAD}",
}
# Callbacks that copy the module, and so cannot work on weights that are sharded.
_COPYING = ("WeightAveraging", "StochasticWeightAveraging")


def refuse_strategy(method: str, trainer: pl.Trainer) -> None:
    """Refuse a strategy whose weights or steps a callback does not see whole.

    Raises:
        MisconfigurationException: The trainer's is one.
    """
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in _UNSUPPORTED_STRATEGIES:
            raise MisconfigurationException(
                f"{method} does not support {type(trainer.strategy).__name__}:"
                f" {_UNSUPPORTED_STRATEGIES[kind.__name__]}."
            )
        if kind.__name__ == "ModelParallelStrategy":
            _refuse_copies(method, trainer)


def _refuse_copies(method: str, trainer: pl.Trainer) -> None:
    """Refuse callbacks that average weights: Lightning makes their copies with deepcopy, which FSDP2 does not allow."""
    copying = [type(callback).__name__ for callback in callbacks_of(trainer) if is_a(callback, *_COPYING)]
    if copying:
        raise MisconfigurationException(
            f"{method} trains weights that are sharded, and {', '.join(copying)} copies the module, which FSDP2 does"
            " not allow. Leave it out, or average the checkpoints of several epochs afterwards."
        )


def refuse_optimizers(method: str, trainer: pl.Trainer) -> None:
    """Refuse an optimizer that evaluates the loss several times a step, or that cannot step what is sharded.

    Raises:
        MisconfigurationException: One of the trainer's is such.
    """
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                f"{method} cannot work with LBFGS: its line search evaluates the loss several times a step, at weights"
                " that no mask can hold. Use SGD, Adam or another torch optimizer."
            )
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        sharded = [is_sharded(parameter) for parameter in stepped]
        if any(sharded) and isinstance(optimizer, torch.optim.Adafactor):
            raise MisconfigurationException(
                "Adafactor computes means over a whole weight, but torch gives it the mean of one process's shard, or"
                " fails. Use SGD, Adam or AdamW if weights are sharded."
            )
        if any(sharded) and not all(sharded):
            at_once = [name for name in ("foreach", "fused") if any(its.get(name) for its in optimizer.param_groups)]
            if at_once:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} has {at_once[0]}=True, but torch cannot step sharded and whole weights"
                    f" at once. Give it {at_once[0]}=False, or shard every parameter with fully_shard."
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
