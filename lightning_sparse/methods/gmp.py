"""GMP: gradual magnitude pruning.

Paper:  Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", ICLR 2018
        workshop, https://arxiv.org/abs/1710.01878
Code:   https://github.com/google-research/google-research/tree/master/model_pruning
Differs from the paper:
    - An update happens before the optimizer's step, and ranks the weights as they are after the previous step.
    - The authors' code keeps a pruned weight's value, unused, behind the mask; here the value is lost.
    - The paper states no default times: here updates come at every hundredth of training, until four fifths of it.
"""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, final

from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.scored import Allocation, ScoredMethod
from lightning_sparse.schedules import Schedule

__all__ = ["GMP"]


@final
@method
class GMP(ScoredMethod):
    r"""Gradual magnitude pruning: prunes the smallest weights, along a cubic schedule.

    At update time :math:`t`, the active weights with the smallest :math:`|w|` are pruned until the sparsity is

    .. math:: s_t = s_f + (s_i - s_f)\Bigl(1 - \frac{t - t_0}{n \Delta t}\Bigr)^3 .

    :math:`s_f` is ``sparsity``, :math:`s_i` is 0, :math:`t_0` is ``start``, :math:`t_0 + n \Delta t` is ``stop`` and
    :math:`\Delta t` is ``update_every``.

    With the same sparsity in each layer, small layers lose too many weights at high sparsity; a warning then says
    which. A small CNN with BatchNorm on MNIST (20,000 images, 600 steps) reached an accuracy of 10 % at sparsity 0.99
    with ``"uniform"``, 90 % with ``"erk"`` and 93 % with ``"global"``. To prune whole filters or N:M, give a
    ``pattern``.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 97.4, 96.9, 95.4 and
    93.6 %; dense 98.0 %. With its default it ends where one-shot magnitude pruning with fine-tuning does up to 98 %,
    and beats it at 99 %. ``allocation="erk"`` reaches 97.8, 97.4, 96.5 and 95.0 % (``"GMP(erk)"``). ``python -m
    benchmarks.evidence --only lenet300 GMP`` trains it. On a small CNN it loses to a baseline at 90, 95, 98 and 99 %
    with BatchNorm, and at 90, 95, 98 and 99 % without.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import GMP
        >>> gmp = GMP(sparsity=0.9)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[gmp], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> gmp.registry
        MaskRegistry(1 weights, sparsity=0.9062)

    References:
        Zhu & Gupta, `To prune, or not to prune: exploring the efficacy of pruning for model compression
        <https://arxiv.org/abs/1710.01878>`_, ICLR 2018 workshop.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Zhu & Gupta",
        title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
        venue="ICLR 2018 workshop",
        url="https://arxiv.org/abs/1710.01878",
    )
    grows: ClassVar[bool] = False
    begins_dense: ClassVar[bool] = True

    sparsity: float | Schedule = field(
        kw_only=False,
        metadata=doc(
            "The final sparsity, in [0, 1), reached from 0 along the cubic; or a schedule of the sparsity. A schedule"
            " that begins above 0 begins with random masks, unless another method has left masks."
        ),
    )
    allocation: Allocation = field(
        default="uniform",
        metadata=doc(
            'Which weights are ranked together: all (``"global"``), or those of each layer, which then has a share of'
            ' the budget. The paper gives all layers the same sparsity: ``"uniform"``.'
        ),
    )
