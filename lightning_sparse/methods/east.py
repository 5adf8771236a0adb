"""EAST: extreme adaptive sparse training.

Paper:  Li et al., "Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning", TMLR 2025,
        https://arxiv.org/abs/2411.13545
Code:   https://github.com/TensorStrike/ES2
Differs from the authors' code, or is our choice where paper and code are unclear:
    - The paper does not describe its cycles. Their number, length and height are the defaults of the code, and so is
      the interval of updates within a cycle (there 100 steps of some 88 000, here a thousandth of training).
    - Masks are updated before the optimizer's step, with its gradients; there after the step.
    - Erdős–Rényi–Kernel budgets are solved exactly: what exceeds a full layer goes to the other layers. There it is
      lost, and the density of a layer is at least a hundredth of the target density.
    - A shared weight counts once for each module that uses it, in the budget and in the sparsity. In the authors' code,
      the current density counts each use, but the target does not.
    - The authors clip the norm of the dense gradient, which on ResNets is at first 10 to 1000 times that of the masked
      gradient. The Trainer's ``gradient_clip_val`` clips the masked gradient; ``clip_dense_norm`` does as the authors.
    - Before phasing begins (β = 1), the ReLU is a full Dynamic ReLU; in one of the authors' published files it is a
      plain ReLU then.
"""

from __future__ import annotations

import math
from dataclasses import field, replace
from typing import Any, ClassVar, TypeVar, final

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.moments import gradient_scale
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.growing import GrowingMethod
from lightning_sparse.methods.paper import Paper
from lightning_sparse.modules import DyReLUPhasing, WeightSharing
from lightning_sparse.schedules import Cosine, CycleShape, Cyclic, Duration, Schedule, UpdateTimes, as_number

__all__ = ["EAST"]

Part = TypeVar("Part", DyReLUPhasing, WeightSharing)


@final
@method
class EAST(GrowingMethod):
    r"""Extreme adaptive sparse training: RigL with longer exploration and three additions, for 99.9 % and more.

    - **DyReLU phasing**: activations begin as Dynamic ReLUs and end as ReLUs; see
      :class:`~lightning_sparse.modules.DyReLUPhasing`.
    - **Weight sharing**: in residual stages, later blocks reuse an earlier block's convolutions, so that the same
      number of active weights makes fewer convolutions denser; see :class:`~lightning_sparse.modules.WeightSharing`.
    - **Cyclic sparsity**: before the usual exchange begins, density rises to ``multiplier`` times its value and falls
      back, ``cycles`` times; see :class:`~lightning_sparse.schedules.Cyclic`. Weights are grown by the dense gradient
      and pruned by magnitude, to exact budgets for each layer. During the cycles, an update only follows the budgets.

    After the cycles, an update exchanges :math:`\lceil p_t n \rceil` of a layer's :math:`n` active weights, where
    :math:`p_t` is ``drop_fraction``.

    The parts are separate callbacks and a schedule, and work with the other methods too: for example
    ``[FGGP(0.99), DyReLUPhasing()]`` or ``RigL(Cyclic(0.99))``.

    The authors train for 250 epochs with batch size 128 and SGD (Nesterov momentum 0.9, learning rate 0.1, divided by
    10 after 1/2 and 3/4 of training, weight decay 1e-4). They clip the norm of the gradients to 1, including those of
    pruned weights (``clip_dense_norm=1.0``).

    To find the channels of each ReLU, phasing uses a first training batch. If the data set can be iterated over only
    once, that batch is missing from training; a module's ``example_input_array`` avoids this.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 97.0, 96.4, 95.0 and
    93.5 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning at 90, 95 and 98 %, by 0.3 to 0.6
    points, and beats it at 99 %. It was made for residual networks, 99.9 % and long training: after four epochs of a
    ResNet-20 it beats ``RigL`` at 99 %, and not at 99.9 %. ``python -m benchmarks.evidence --only lenet300 EAST``
    trains it on MNIST, ``python -m benchmarks.cifar`` on CIFAR-10. On a small CNN it loses to a baseline at 95, 98 and
    99 % with BatchNorm, and at 90, 95, 98 and 99 % without.

    Raises:
        ValueError: An argument is out of its range, or a part is neither a ``bool`` nor its callback.

    Example:
        >>> import lightning as L
        >>> from lightning_sparse import EAST
        >>> from lightning_sparse.zoo import Classifier, DigitsDataModule, LeNet300100
        >>> east = EAST(sparsity=0.99, sharing=False)
        >>> trainer = L.Trainer(max_steps=40, callbacks=[east], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Classifier(LeNet300100(in_features=64)), DigitsDataModule())
        >>> east.registry
        MaskRegistry(3 weights, sparsity=0.9900)

    References:
        Li et al., `Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning
        <https://arxiv.org/abs/2411.13545>`_, TMLR 2025.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Li et al.",
        title="Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning",
        venue="TMLR 2025",
        url="https://arxiv.org/abs/2411.13545",
    )
    needs_dense_gradients: ClassVar[bool] = True
    rounds_up: ClassVar[bool] = True

    sparsity: float | Schedule = field(
        kw_only=False,
        metadata=doc(
            "Sparsity, in [0, 1), of the masked weights together, where each use of a shared weight counts. It is exact"
            " between cycles and at the end. Your own schedule needs ``cycles=0``."
        ),
    )
    cycles: int = field(default=2, metadata=doc("Number of cycles; 0 for none."))
    cycle_length: float = field(
        default=0.2, metadata=doc("Length of the first cycle, as a fraction of the time to ``stop``.")
    )
    cycle_growth: float = field(default=1.0, metadata=doc("Ratio of a cycle's length to that of the cycle before."))
    multiplier: float = field(
        default=3.0, metadata=doc("Factor of the number of active weights in the middle of a cycle, at least 1.")
    )
    cycle_shape: CycleShape = field(default="cosine", metadata=doc('``"cosine"`` or ``"triangular"``.'))
    cycle_update_every: Duration = field(
        default=0.001,
        metadata=doc(
            "Time between updates during the cycles; ``int`` = optimizer steps, ``float`` = fraction of training, at"
            " least 10 steps."
        ),
    )
    phasing: bool | DyReLUPhasing | None = field(
        default=True, metadata=doc("Whether to use DyReLU phasing; or the callback, to set its arguments.")
    )
    sharing: bool | WeightSharing | None = field(
        default=True, metadata=doc("Whether to share weights; or the callback, to set its arguments.")
    )
    clip_dense_norm: float | None = field(
        default=None,
        metadata=doc(
            "Clip the norm of all gradients of an optimizer, including those of pruned weights, to this value, above 0."
            " Use it instead of the Trainer's ``gradient_clip_val``, which clips the masked gradients."
        ),
    )
    drop_fraction: float | Schedule = field(
        default=Cosine(0.5, 0.005),
        metadata=doc("Fraction of a layer's active weights that an update exchanges, or a schedule of it."),
    )
    update_every: Duration = field(
        default=0.045, metadata=doc("Time between updates after the cycles; in the code 4000 steps of some 88 000.")
    )
    stop: Duration = field(
        default=1.0,
        metadata=doc(
            "Time after which the masks no longer change; ``int`` = optimizer steps, ``float`` = fraction of training."
        ),
    )

    def __post_init__(self) -> None:
        self.sparsity = _in_cycles(self)
        super().__post_init__()
        self.clip_dense_norm = _checked_norm("clip_dense_norm", self.clip_dense_norm)
        self.phasing = _part("phasing", self.phasing, DyReLUPhasing, self.seed)
        self.sharing = _part("sharing", self.sharing, WeightSharing, self.seed)

    @property
    @override
    def times(self) -> UpdateTimes:
        exchanges = super().times
        if not isinstance(self.sparsity, Cyclic):
            return exchanges
        end = _end_of(self.sparsity, self.stop)
        cycles = replace(exchanges, every=self.cycle_update_every, stop=end)
        return replace(exchanges, start=end, before=cycles)

    @override
    def companions(self) -> list[pl.Callback]:
        return [part for part in (self.sharing, self.phasing) if isinstance(part, pl.Callback)]

    @override
    def exchanged(self, weight: MaskedWeight, active: int) -> int:
        times = self.run.timetable
        cycles = times is not None and times.is_before(self.step)
        return 0 if cycles else super().exchanged(weight, active)

    @override
    def before_masking(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        super().before_masking(trainer, group)
        if self.clip_dense_norm is not None:
            parameters = [parameter for its in group.optimizer.param_groups for parameter in its["params"]]
            limit = self.clip_dense_norm * gradient_scale(trainer, group.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, limit)

    @override
    def grow_scores(self, weight: MaskedWeight) -> Tensor:
        return weight.grad


def _in_cycles(east: EAST) -> float | Schedule:
    """The cyclic schedule of a number; what was given, where there are no cycles."""
    cycles, sparsity = as_number(east.cycles), as_number(east.sparsity)
    if isinstance(cycles, int) and cycles == 0:
        return east.sparsity
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        hint = " The cycles are its schedule; a schedule of your own needs cycles=0." if callable(sparsity) else ""
        raise ValueError(f"sparsity is {sparsity!r}; give a number, a fraction in [0, 1).{hint}")
    return Cyclic(sparsity, east.cycles, east.cycle_length, east.cycle_growth, east.multiplier, east.cycle_shape)


def _end_of(schedule: Cyclic, stop: Duration) -> Duration:
    """The first time at which the last cycle is over."""
    end = min(1.0, schedule.end) * stop  # a sum of fractions may be a little above 1, or a whole step
    return math.ceil(end - 1e-6) if isinstance(stop, int) else end


def _checked_norm(name: str, value: Any) -> float | None:
    limit: float | None = as_number(value)
    if limit is not None and (isinstance(limit, bool) or not (isinstance(limit, int | float) and limit > 0)):
        raise ValueError(f"{name} is {limit!r}; give a norm above 0, or None not to clip.")
    return limit


def _part(name: str, value: Any, kind: type[Part], seed: int) -> Part | None:
    """A part of EAST: that of the user, one of our own, or none."""
    if not isinstance(value, bool | kind):
        shown = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise ValueError(f"{name} is {shown}; give True, False, or the callback, such as {kind.__name__}().")
    return kind(seed=seed) if value is True else value or None
