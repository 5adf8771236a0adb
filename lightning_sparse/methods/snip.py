"""SNIP: single-shot network pruning.

Paper:  Lee, Ajanthan & Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019,
        https://arxiv.org/abs/1810.02340
Code:   https://github.com/namhoonlee/snip-public
Differs from the paper and the authors' code:
    - The loss is the module's own, and weights are as the module initialized them; the authors recommend a
      variance-scaling initialization.
    - Biases are not pruned; the authors' code ranks them too.
    - The dense network sees the batch in training mode, so it counts in the statistics of BatchNorm.
"""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.at_initialization import AtInitialization
from lightning_sparse.methods.card import method
from lightning_sparse.methods.paper import Paper

__all__ = ["SNIP"]


@final
@method
class SNIP(AtInitialization):
    r"""Single-shot pruning: prunes once, at initialization, the weights to which the loss is least sensitive.

    With the gradient of a first batch, or of ``batches`` of them, the weights with the smallest sensitivity

    .. math:: s_j = \Bigl|\frac{\partial L(c \odot w)}{\partial c_j}\Bigr|_{c = 1}
              = \Bigl| w_j\, \frac{\partial L}{\partial w_j} \Bigr|

    in all layers together are pruned until :math:`\lfloor (1 - s) N \rfloor` are left; then training begins. The
    optimizer takes no step on these batches.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 97.0, 96.0, 93.6 and
    89.6 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning at all four, by 0.5 to 2.1 points, and
    beats random masks (ERK). ``python -m benchmarks.evidence --only lenet300 SNIP`` trains it. On a small CNN it loses
    to a baseline at 98 and 99 % with BatchNorm, and at 90, 95, 98 and 99 % without.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import SNIP
        >>> snip = SNIP(sparsity=0.75)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[snip], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> snip.registry
        MaskRegistry(1 weights, sparsity=0.7500)

    References:
        Lee, Ajanthan & Torr, `SNIP: Single-shot Network Pruning based on Connection Sensitivity
        <https://arxiv.org/abs/1810.02340>`_, ICLR 2019.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Lee, Ajanthan & Torr",
        title="SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        venue="ICLR 2019",
        url="https://arxiv.org/abs/1810.02340",
    )
    needs_dense_gradients: ClassVar[bool] = True

    @override
    def observe(self, weight: MaskedWeight) -> None:
        super().observe(weight)
        self.memory(weight, "gradient").add_(self.gradient(weight))

    @override
    def drop_scores(self, weight: MaskedWeight) -> Tensor:
        return weight.value * self.memory(weight, "gradient")
