"""What callbacks ask of a Trainer, and what those that change a module have in common."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NoReturn

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import throughput_monitor
from torch import nn

__all__ = [
    "TrainerCallback",
    "batches_stepped",
    "callbacks_of",
    "check_in_optimizer",
    "clips_gradients",
    "copy_again",
    "count_dense_peak",
    "is_a",
    "refuse_twins",
    "set_callbacks",
    "steps_between_records",
    "steps_of_training",
    "steps_taken",
    "writers_of",
]


class TrainerCallback(pl.Callback):
    """A callback of a Trainer. ``Fabric(callbacks=...)`` takes anything and would call none of its hooks: refused."""

    def on_after_setup(self, fabric: object, module: object) -> None:
        """Fabric has set up a module.

        Raises:
            MisconfigurationException: Always.
        """
        self._refuse_fabric()

    def on_after_optimizer_step(self, strategy: object, optimizer: object) -> None:
        """An optimizer of Fabric has stepped.

        Raises:
            MisconfigurationException: Always.
        """
        self._refuse_fabric()

    def _refuse_fabric(self) -> NoReturn:
        raise MisconfigurationException(
            f"{type(self).__name__} is a callback of Lightning's Trainer, and Fabric calls none of its hooks: nothing"
            " would be masked. Train with L.Trainer(callbacks=[...]); to prune a module without one, call"
            " lightning_sparse.prune."
        )


# A training that is shorter than this many times log_every_n_steps is recorded more often, up to this many times.
_LEAST_RECORDS = 200


def batches_stepped(trainer: pl.Trainer) -> int:
    """The batches in which an optimizer stepped, however many did: where Lightning's own monitors log."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # pyright: ignore[reportPrivateUsage]


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks of ``trainer``, in the order in which it calls them: the list itself, which no stub declares."""
    return trainer.callbacks  # type: ignore[attr-defined]


def set_callbacks(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> None:
    """Give ``trainer`` other callbacks; a loop over those of before goes on."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]


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


def clips_gradients(trainer: pl.Trainer) -> bool:
    """Whether gradients are clipped between ``on_before_optimizer_step`` and the step."""
    module, hook = trainer.lightning_module, "configure_gradient_clipping"
    # By the class that defines it: functools.wraps gives a user's function the __module__ of Lightning's.
    owner = next(kind for kind in type(module).__mro__ if hook in vars(kind))
    is_lightnings = hook not in vars(module) and owner.__module__.startswith(("lightning.", "pytorch_lightning."))
    return bool(trainer.gradient_clip_val) and is_lightnings


def is_a(value: object, *names: str) -> bool:
    """Whether a class of one of these names is among those of ``value``.

    By name, because classes of ``lightning.pytorch`` and ``pytorch_lightning`` are different ones.

    Example:
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> is_a(ModelCheckpoint(), "Checkpoint"), is_a(ModelCheckpoint(), "EarlyStopping")
        (True, False)
    """
    return any(kind.__name__ in names for kind in type(value).__mro__)


def copy_again(trainer: pl.Trainer, pl_module: pl.LightningModule, callback: pl.Callback) -> None:
    """Let callbacks that average weights copy the module again: those that come before ``callback``, who changed it.

    Args:
        trainer: Holds the callbacks.
        pl_module: The module as it is now.
        callback: Who has changed it in its ``setup``.
    """
    callbacks = callbacks_of(trainer)
    for earlier in callbacks[: callbacks.index(callback)]:
        if is_a(earlier, "StochasticWeightAveraging", "WeightAveraging"):
            earlier.setup(trainer, pl_module, "fit")


def count_dense_peak(trainer: pl.Trainer) -> None:
    """Let a ``ThroughputMonitor`` compare with the dense peak of the GPU, unless it was told what to compare with.

    Releases of Lightning whose ``Throughput`` takes ``using_sparse_model`` warn where it is not set. Masked weights are
    multiplied by dense kernels, so the answer is False; a release without the argument is left alone.

    Args:
        trainer: Its ``ThroughputMonitor`` must not have been set up yet, or this comes too late and changes nothing.
    """
    throughput = throughput_monitor.Throughput  # pyright: ignore[reportPrivateImportUsage]
    if "using_sparse_model" in inspect.signature(throughput).parameters:
        for callback in callbacks_of(trainer):
            if isinstance(callback, throughput_monitor.ThroughputMonitor):
                callback.kwargs.setdefault("using_sparse_model", False)


def refuse_twins(trainer: pl.Trainer, callback: pl.Callback, settings: Sequence[str]) -> None:
    """Refuse another callback of the same class that would act on the same places in another way.

    Args:
        trainer: Holds the callbacks.
        callback: One of them.
        settings: The names of its attributes that say how it acts.

    Raises:
        MisconfigurationException: There is one.
    """
    twins = [other for other in callbacks_of(trainer) if type(other) is type(callback)]
    differing = [name for name in settings if any(getattr(twin, name) != getattr(callback, name) for twin in twins)]
    if differing:
        raise MisconfigurationException(
            f"This Trainer has {len(twins)} {type(callback).__name__} that differ in {', '.join(differing)}. Leave one"
            " out; EAST brings one of its own, and takes yours instead: EAST(..., phasing=DyReLUPhasing(...),"
            " sharing=WeightSharing(...))."
        )


def steps_between_records(trainer: pl.Trainer) -> float:
    """How many steps lie at least between two updates that are recorded."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if every == 0:  # Lightning's way of saying never
        return math.inf
    total = steps_of_training(trainer, trainer.lightning_module)
    return max(1.0, min(every, total / _LEAST_RECORDS))


def steps_of_training(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
    """The steps that training will have, in the count of a method: ``inf`` where it has no known end.

    ``trainer.max_steps`` counts the steps of every optimizer, a method the batches in which one of them steps; that
    each does so in every batch is what can be assumed.
    """
    total = trainer.estimated_stepping_batches
    if total < 0:  # Lightning's answer for a data loader without length
        return math.inf
    if trainer.max_epochs != -1 and math.isfinite(trainer.num_training_batches):
        by_epochs = _steps_of_epochs(trainer, max(trainer.max_epochs or 1, 1) - _has_epoch_without_steps(trainer))
        total = by_epochs if trainer.max_steps == -1 else min(by_epochs, trainer.max_steps)
    if trainer.max_steps != -1 and not pl_module.automatic_optimization:
        return min(total, trainer.max_steps // max(1, len(trainer.optimizers)))
    return total


def _steps_of_epochs(trainer: pl.Trainer, epochs: int) -> int:
    """The steps of so many epochs, whose batches may be accumulated in other numbers later: Lightning does not look."""
    accumulated: dict[int, int] = {0: trainer.accumulate_grad_batches}
    for callback in callbacks_of(trainer):
        if is_a(callback, "GradientAccumulationScheduler"):
            accumulated = callback.scheduling  # type: ignore[attr-defined]
    firsts = sorted(first for first in accumulated if first < epochs)
    return sum(
        math.ceil(trainer.num_training_batches / accumulated[first]) * (after - first)
        for first, after in pairwise([*firsts, epochs])
    )


def _has_epoch_without_steps(trainer: pl.Trainer) -> bool:
    """Whether stochastic weight averaging has added an epoch to ``max_epochs``, in which BatchNorm alone learns."""
    return trainer.max_epochs not in (None, -1) and any(
        is_a(callback, "StochasticWeightAveraging") and getattr(callback, "_model_contains_batch_norm", False)
        for callback in callbacks_of(trainer)
    )


def steps_taken(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """The steps that ``trainer`` has taken, in the count of a method, under the assumption of above."""
    return trainer.global_step // (1 if pl_module.automatic_optimization else max(1, len(trainer.optimizers)))


def writers_of(trainer: pl.Trainer, name: str) -> Iterator[Callable[..., object]]:
    """The method ``name`` of each logger's experiment that has one, such as ``"add_figure"``."""
    for logger in trainer.loggers:
        writer = getattr(getattr(logger, "experiment", None), name, None)
        if callable(writer):
            yield writer
