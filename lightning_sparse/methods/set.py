"""SET: sparse evolutionary training.

Paper:  Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
        network science", Nature Communications 9, 2018, https://arxiv.org/abs/1707.04780
Code:   https://github.com/dcmocanu/sparse-evolutionary-artificial-neural-networks
Differs from the paper:
    - The smallest weights by magnitude go, as in every later comparison; the paper takes a fraction of the smallest
      positive and of the largest negative ones.
    - The paper updates after every epoch with a constant fraction; here every hundredth of training, the fraction
      annealed along a cosine. ``drop_fraction=Constant(0.3)`` keeps it constant.
    - Erdős–Rényi–Kernel shares the budget, and every layer is masked; the paper leaves the last dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.randomness import random_scores
from lightning_sparse.masks.registry import MaskedWeight
from lightning_sparse.methods.budgets import LayerAllocation
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.prune_and_grow import PruneAndGrow
from lightning_sparse.schedules import Duration, Schedule

__all__ = ["SET"]


@final
class SET(PruneAndGrow):
    r"""Sparse evolutionary training: prune by magnitude, grow at random, at constant sparsity.

    At an update, in each layer of :math:`n` active weights the :math:`k = \lfloor \zeta_t\, n \rfloor` smallest
    :math:`|w|` are pruned and as many inactive weights, drawn at random, are grown at zero. :math:`\zeta_t` is
    ``drop_fraction``, :math:`\zeta` in the paper.

    Args:
        sparsity: Sparsity, in [0, 1), of the masked weights together, from the first step on; or a schedule of it,
            such as :class:`~lightning_sparse.schedules.Cyclic`, over the time to ``stop``.
        allocation: How the budget is shared among layers.
        drop_fraction: Fraction of a layer's active weights that an update exchanges, in [0, 1], annealed to 0 along a
            cosine; or a schedule of it.
        update_every: Time between updates; ``int`` = optimizer steps, ``float`` = fraction of training, 10 steps at
            least.
        stop: Time after which the masks stay.
        regrow: Whether a weight that the update has just pruned may be grown by it; its value is then kept.
        min_active: Weights that every layer holds at least.
        include: Patterns of what is masked; see :func:`~lightning_sparse.masks.select_weights`.
        exclude: Patterns of what stays dense.
        seed: Seed of the initial masks and of growth.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import SET
        >>> sparse = SET(sparsity=0.75)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[sparse], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> sparse.registry
        MaskRegistry(1 weights, sparsity=0.7500)

    References:
        Mocanu et al., `Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
        network science <https://arxiv.org/abs/1707.04780>`_, Nature Communications 2018.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Mocanu et al.",
        title="Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network "
        "science",
        venue="Nature Communications 2018",
        url="https://arxiv.org/abs/1707.04780",
    )

    def __init__(
        self,
        sparsity: float | Schedule,
        *,
        allocation: LayerAllocation = "erk",
        drop_fraction: float | Schedule = 0.3,
        update_every: Duration = 0.01,
        stop: Duration = 0.75,
        regrow: bool = True,
        min_active: int = 1,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            sparsity,
            allocation=allocation,
            drop_fraction=drop_fraction,
            update_every=update_every,
            stop=stop,
            regrow=regrow,
            update_replaces_step=False,
            min_active=min_active,
            include=include,
            exclude=exclude,
            seed=seed,
        )

    @override
    def grow_scores(self, weight: MaskedWeight) -> Tensor:
        return random_scores(weight, self.seed, step=self.step)
