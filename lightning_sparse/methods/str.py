r"""STR: soft threshold reparameterization, with one learned threshold for each layer.

Paper:  Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020,
        https://arxiv.org/abs/2002.03231
Code:   https://github.com/RAIVNLab/STR
Differs from the paper and the authors' code:
    - No layer is replaced: gradients are rewritten in closed form, equal to autograd's through the soft threshold.
    - s takes no step on a gradient that is inf or NaN, and its gradient is not clipped.
    - The authors replace convolutions, and treat the classifier as a 1 × 1 convolution; here linear and recurrent
      weights have an s too.
    - After training, the module holds the thresholded weights, not W and s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.checks import check_number, check_strength
from lightning_sparse.methods.latent import LatentMethod
from lightning_sparse.methods.paper import Paper

__all__ = ["STR"]


@final
@method
class STR(LatentMethod):
    r"""Soft threshold reparameterization: each layer learns a threshold, and all its weights shrink by it.

    The module computes with

    .. math:: \widetilde W = \operatorname{sign}(W) \operatorname{ReLU}\bigl(|W| - g(s)\bigr), \qquad
        g(s) = \frac{1}{1 + e^{-s}}

    with one learned :math:`s` for each layer. A second optimizer, of the same class and settings as the weights', steps
    :math:`s`. Weights and :math:`s` get their true gradients from the loss; pruned weights get none. There is no target
    sparsity. Weight decay moves :math:`s` from its negative first value, ``initial``, towards 0, which raises the
    threshold from 0 towards 1/2; the loss works against this. More weight decay, or a first value nearer to 0, gives a
    sparser network.

    The authors' ResNet-50 on ImageNet at 90.23 %: :math:`s_{init}` = -3200, weight decay 2.25e-5 on weights and
    :math:`s`, SGD with momentum 0.875, learning rate 0.256 with cosine decay, 100 epochs.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 96.6, 96.0, 94.9 and
    94.2 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning at 90, 95 and 98 %, by 0.4 to 1.1
    points, and beats it at 99 %. ``python -m benchmarks.evidence --only lenet300 STR`` trains it. On a small CNN it
    loses to a baseline at 90, 95, 98 and 99 % without BatchNorm. With BatchNorm at 99 % it is the best of all methods.
    Without, a decay that left 1 % of the weights with one seed pruned all of them with three others.

    Raises:
        ValueError: An argument is not a finite number, or decay is negative.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import STR
        >>> method = STR(initial=-3.0, decay=1e-2)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[method], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> -3.0 < float(method.parameters["layer.weight"].detach()) < 0.0
        True

    References:
        Kusupati et al., `Soft Threshold Weight Reparameterization for Learnable Sparsity
        <https://arxiv.org/abs/2002.03231>`_, ICML 2020.

    Warning:
        Without weight decay on :math:`s`, sparsity hardly grows. Adam (not AdamW) divides weight decay by the size of
        past gradients, so an ``initial`` of -3200 hardly moves.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Kusupati et al.",
        title="Soft Threshold Weight Reparameterization for Learnable Sparsity",
        venue="ICML 2020",
        url="https://arxiv.org/abs/2002.03231",
    )
    shrinks: ClassVar[bool] = True

    initial: float = field(
        kw_only=False,
        metadata=doc(
            "First value of s in every layer; -10 prunes weights below 5e-5, and -5 those below 7e-3.", at_first=True
        ),
    )
    decay: float | None = field(
        default=None, metadata=doc("Weight decay on s; by default that of the weights, as in the paper.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.initial = check_number("initial", self.initial)
        self.decay = None if self.decay is None else check_strength("decay", self.decay)

    def threshold(self, weight: MaskedWeight) -> Tensor:
        """g(s), by which the magnitudes of ``weight`` are reduced; shape ``()``."""
        return self.parameters[weight.name].detach().sigmoid().to(weight.value.dtype)

    @override
    def learned(self, weight: MaskedWeight) -> Tensor:
        dtype = torch.promote_types(weight.value.dtype, torch.float32)
        return torch.tensor(self.initial, dtype=dtype, device=weight.value.device)

    @override
    def twin_settings(self) -> Mapping[str, Any]:
        return {} if self.decay is None else {"weight_decay": self.decay}

    @override
    def new_mask(self, weight: MaskedWeight, latent: Tensor) -> Tensor:
        return latent.abs() > self.threshold(weight)

    @override
    def effective(self, weight: MaskedWeight, latent: Tensor) -> Tensor:
        shrunk = latent.abs().sub_(self.threshold(weight)).clamp_(min=0.0).copysign_(latent)
        weight.zero_pruned_(shrunk)
        return shrunk

    @override
    def written(self, weight: MaskedWeight, value: Tensor) -> Tensor:
        return value + value.sign() * self.threshold(weight)

    @override
    def rewrite_gradient(self, weight: MaskedWeight, latent: Tensor, scale: float) -> None:
        grad, s = weight.grad, self.parameters[weight.name]
        weight.zero_pruned_(grad)  # ReLU's derivative
        slope = s.detach().sigmoid() * (1 - s.detach().sigmoid())
        s.grad = -weight.layout.sum((grad * latent.sign()).sum(dtype=s.dtype)) * slope / scale

    @override
    def before_masks(self, group: MaskGroup, step: int) -> None:
        if self.decay is None and not any(user.get("weight_decay") for user in group.optimizer.param_groups):
            self.warn_once(
                f"{type(group.optimizer).__name__} has no weight decay, which raises the thresholds, so hardly any"
                " weight will be pruned. Give it weight_decay, or give STR decay="
            )

    @override
    def extra_metrics(self) -> dict[str, float]:
        thresholds = [float(value.detach().sigmoid()) for value in self.parameters.values()]
        return {"str/threshold": sum(thresholds) / len(thresholds)} if thresholds else {}
