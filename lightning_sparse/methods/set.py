"""SET: sparse evolutionary training.

Paper:  Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
        network science", Nature Communications 9, 2018, https://arxiv.org/abs/1707.04780
Code:   https://github.com/dcmocanu/sparse-evolutionary-artificial-neural-networks
Differs from the paper:
    - The weights with the smallest magnitude are pruned, as in every later comparison; the paper prunes a fraction of
      the smallest positive and of the largest negative ones.
    - The paper updates after every epoch with a constant fraction. Here an update comes every hundredth of training,
      and the fraction is annealed along a cosine; ``drop_fraction=Constant(0.3)`` keeps it constant.
    - The budget is allocated by Erdős–Rényi–Kernel, and every layer is masked; the paper leaves the last dense.
"""

from __future__ import annotations

from typing import ClassVar, final

from lightning_sparse.methods.card import method
from lightning_sparse.methods.growing import GrowingMethod
from lightning_sparse.methods.paper import Paper

__all__ = ["SET"]


@final
@method
class SET(GrowingMethod):
    r"""Sparse evolutionary training: prunes by magnitude, grows at random, at constant sparsity.

    At an update, each layer with :math:`n` active weights prunes the :math:`k = \lfloor \zeta_t\, n \rfloor` with the
    smallest :math:`|w|`, and grows :math:`k` random inactive weights, which start at zero. :math:`\zeta_t` is
    ``drop_fraction``, :math:`\zeta` in the paper.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 96.4, 95.2, 91.7 and
    87.2 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning at all four, by 1.1 to 4.5 points, and
    beats random masks (ERK). ``python -m benchmarks.evidence --only lenet300 SET`` trains it. On a small CNN it loses
    to a baseline at 90, 95, 98 and 99 % with BatchNorm, and at 90, 95, 98 and 99 % without.

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
