r"""Feather: a straight-through estimator with a threshold that hardly biases large weights.

Paper:  Glentis Georgoulakis, Retsinas & Maragos, "Feather: An Elegant Solution to Effective DNN Sparsification", BMVC
        2023, https://arxiv.org/abs/2310.02448
Code:   https://github.com/athglentis/feather
Differs from the paper and the authors' code:
    - No layer is replaced: the gradient is rewritten in closed form before the optimizer steps.
    - T is the largest magnitude that is pruned, so that the number of active weights is exact; the authors interpolate
      between that and the next larger one. Ties are broken by position.
    - After training, the module holds the thresholded weights; the authors keep the values of W that are above T.
    - Gradients that are inf or NaN change no mask. With several optimizers, the weights of each are ranked separately.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.budgets import budget_of, check_budget
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.checks import check_number
from lightning_sparse.methods.latent import LatentMethod
from lightning_sparse.methods.paper import Paper
from lightning_sparse.schedules import (
    Duration,
    Polynomial,
    Schedule,
    Timetable,
    UpdateTimes,
    as_number,
    as_schedule,
    check_fraction,
)

__all__ = ["Feather"]

_EXTREME = 0.95  # the sparsity above which the authors damp the gradients of pruned weights


@final
@method
class Feather(LatentMethod):
    r"""Straight-through pruning of the whole network's smallest weights; its threshold hardly shrinks the large ones.

    The weights of all layers are ranked together at every step. :math:`T` is the largest magnitude that must be pruned
    to reach ``sparsity``. The module computes with

    .. math:: \widetilde w = \operatorname{sign}(w) \bigl(|w|^p - T^p\bigr)^{1/p} \text{ where } |w| > T,
        \text{ else } 0 ,

    which is continuous at :math:`T`, unlike a hard threshold, and shrinks a large weight by far less than :math:`T`.
    The gradient passes straight through: :math:`\partial L / \partial w = \partial L / \partial \widetilde w`, times
    :math:`\theta` for pruned :math:`w`. Sparsity rises along a cubic over the first half of training, then stays.

    The authors train for 160 epochs on CIFAR-100 with batch size 128, SGD with momentum 0.9, a learning rate of 0.1
    with cosine decay, and a weight decay of 5e-4, except on biases and norms.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 97.9, 97.8, 97.1 and
    96.5 %; dense 98.0 %. It loses to no baseline, and is the best of all methods. ``python -m benchmarks.evidence
    --only lenet300 Feather`` trains it. On a small CNN it loses to a baseline at 99 % with BatchNorm. With BatchNorm at
    99 % it emptied a layer in two of three runs.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import Feather
        >>> feather = Feather(sparsity=0.75)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[feather], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> feather.registry
        MaskRegistry(1 weights, sparsity=0.7500)

    References:
        Glentis Georgoulakis, Retsinas & Maragos, `Feather: An Elegant Solution to Effective DNN Sparsification
        <https://arxiv.org/abs/2310.02448>`_, BMVC 2023.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Glentis Georgoulakis, Retsinas & Maragos",
        title="Feather: An Elegant Solution to Effective DNN Sparsification",
        venue="BMVC 2023",
        url="https://arxiv.org/abs/2310.02448",
    )
    needs_dense_gradients: ClassVar[bool] = True
    shrinks: ClassVar[bool] = True

    sparsity: float | Schedule = field(
        kw_only=False,
        metadata=doc(
            "Final sparsity, in [0, 1), of the masked weights together; or a schedule of it, from ``start`` to"
            " ``stop``."
        ),
    )
    theta: float | None = field(
        default=None,
        metadata=doc(
            "θ, the factor of pruned weights' gradients, in [0, 1]. By default 1, or 0.5 if the final sparsity is above"
            " 0.95."
        ),
    )
    power: float = field(
        default=3.0, metadata=doc("p, at least 1: 1 is a soft threshold, and large values approach a hard one.")
    )
    start: Duration = field(
        default=0.0,
        metadata=doc("When pruning begins; ``int`` = optimizer steps, ``float`` = fraction of training."),
    )
    stop: Duration = field(default=0.5, metadata=doc("When the final sparsity is reached."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("sparsity", as_schedule(self.sparsity), below_one=True)
        if not isinstance(self.sparsity, Schedule):
            self.sparsity = Polynomial(0.0, as_number(self.sparsity))
        if self.theta is None:
            self.theta = 0.5 if self.sparsity(1.0) > _EXTREME else 1.0
        self.theta, self.power = check_number("theta", self.theta), check_number("power", self.power)
        if not 0.0 <= self.theta <= 1.0:
            raise ValueError(f"theta is {self.theta}; give the factor of pruned weights' gradients, in [0, 1].")
        if self.power < 1.0:
            raise ValueError(f"power is {self.power}; give an exponent of at least 1, such as the paper's 3.")
        _ = self._times  # refuses what are no durations

    @property
    def _times(self) -> UpdateTimes:
        return UpdateTimes(every=1, start=self.start, stop=self.stop)

    @property
    def _own(self) -> _Own:
        return cast("_Own", self._kept.own)

    def threshold(self, weight: MaskedWeight) -> float:
        """T, as ``weight`` was thresholded last."""
        return self._own.thresholds[weight.name]

    @override
    def timetable(self, total_steps: float) -> Timetable:
        return self._times.resolve(total_steps)

    @override
    def prepare(self) -> None:
        super().prepare()
        self._kept.own = _Own()

    @override
    def before_masks(self, group: MaskGroup, step: int) -> None:
        assert isinstance(self.sparsity, Schedule)
        sparsity = self._due_at(step)
        check_budget(group, max(sparsity, self.sparsity(1.0)), min_active=0)
        pruned = group.smallest(
            group.flat(self.latent),
            group.numel - budget_of(group, sparsity),
            torch.ones_like(group.mask),
            key=torch.abs,
        )
        masks = group.split(~pruned)
        largest = [_largest(torch.where(m, 0.0, self.latent(w))) for w, m in zip(group, masks, strict=True)]
        threshold = float(torch.stack(group.each(lambda weight, its: weight.layout.largest(its), largest)).max())
        self._own.masks = {weight.name: mask for weight, mask in zip(group, masks, strict=True)}
        self._own.thresholds |= {weight.name: threshold for weight in group}

    def _due_at(self, step: int) -> float:
        assert isinstance(self.sparsity, Schedule)
        times = self.run.timetable
        assert times is not None
        return self.sparsity(times.progress(step))

    @override
    def new_mask(self, weight: MaskedWeight, latent: Tensor) -> Tensor:
        mask = self._own.masks.pop(weight.name, None)
        return latent.abs() > self.threshold(weight) if mask is None else mask

    @override
    def effective(self, weight: MaskedWeight, latent: Tensor) -> Tensor:
        threshold, p = self.threshold(weight), self.power
        if threshold == 0.0:
            return latent.masked_fill(~weight.mask, 0.0)
        wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
        cut = wide.abs().pow_(p).sub_(threshold**p).clamp_(min=0.0).pow_(1.0 / p).copysign_(wide).to(latent.dtype)
        weight.zero_pruned_(cut)
        return cut

    @override
    def written(self, weight: MaskedWeight, value: Tensor) -> Tensor:
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        grown = (wide.abs() ** self.power + self.threshold(weight) ** self.power) ** (1.0 / self.power)
        return (grown * wide.sign()).to(value.dtype)

    @override
    def rewrite_gradient(self, weight: MaskedWeight, latent: Tensor, scale: float) -> None:
        assert self.theta is not None
        if self.theta != 1.0:
            weight.grad.copy_(torch.where(weight.mask, weight.grad, weight.grad * self.theta))

    @override
    def target_sparsity(self, name: str | None = None) -> float:
        if name is not None or self.last_run is None or self.last_run.timetable is None:
            return super().target_sparsity(name)
        return self._due_at(self.step)

    @override
    def own_state(self) -> dict[str, Any]:
        return dict(self._own.thresholds)

    @override
    def load_own_state(self, state: Mapping[str, Any]) -> None:
        for weight in self.weights:
            threshold = state.get(weight.name)
            if not isinstance(threshold, float) or not 0.0 <= threshold < math.inf:
                raise MisconfigurationException(
                    f"The checkpoint does not hold the threshold of {weight.name}. Resume from an earlier one."
                )
            self._own.thresholds[weight.name] = threshold


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude; 0 where there is no value."""
    return values.abs_().amax() if values.numel() else values.new_zeros(())


@dataclass
class _Own:
    """What Feather keeps for one training: T of each weight, and the masks that are about to be taken."""

    thresholds: dict[str, float] = field(default_factory=dict[str, float])
    masks: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
