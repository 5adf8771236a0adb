"""RigL: the rigged lottery.

Paper:  Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, https://arxiv.org/abs/1911.11134
Code:   https://github.com/google-research/rigl
Differs from the paper and the authors' code:
    - Ties are broken by position; the authors' code adds noise of 1e-5 to the magnitudes.
    - Where an update leaves masks as they were, the optimizer takes its step; Algorithm 1 leaves it out.
    - Erdős–Rényi–Kernel budgets are exact integers: within three weights a layer of those of the authors' solver.
    - The paper updates every 100 steps of 97 656 on CIFAR-10; here every hundredth of training.
    - Under Adam a grown weight's second moment begins with its neighbours'; the authors train with SGD.
"""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, final

from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.growing import GrowingMethod
from lightning_sparse.methods.paper import Paper

__all__ = ["RigL"]


@final
@method
class RigL(GrowingMethod):
    r"""The rigged lottery: prunes by magnitude, grows where the dense gradient is largest, at constant sparsity.

    At an update at step :math:`t < T_{end}`, in each layer of :math:`n` active weights the
    :math:`k = \lfloor f(t)\, n \rfloor` smallest :math:`|\theta|` are pruned, and of the weights that are then
    inactive the :math:`k` with the largest :math:`|\partial L / \partial \theta|` are grown at zero, where

    .. math:: f(t) = \frac{\alpha}{2} \Bigl(1 + \cos \frac{\pi t}{T_{end}}\Bigr) .

    :math:`\alpha` is ``drop_fraction``, :math:`T_{end}` is ``stop``, and :math:`\Delta T` is ``update_every``. Where
    masks are updated, the optimizer takes no step (Algorithm 1); ``update_replaces_step=False`` takes it, as ITOP does.

    ITOP's settings (Liu et al. 2021), which explore more: ``RigL(0.9, drop_fraction=Cosine(0.5, 0.005),
    update_every=4000, stop=1.0, update_replaces_step=False)``.

    Frequent updates hurt transformers: in trials with a small ViT, RigL stayed behind SET. Networks without
    normalisation hardly train from 98 % on; ``initial_scale="density"`` helps.

    Measured with LeNet-300-100 on MNIST at 90, 95 and 99 % (4 epochs, one seed): it loses to one-shot magnitude
    pruning with fine-tuning at all three, by 0.9 to 4.0 points; random masks (ERK) it beats.
    ``python -m benchmarks.evidence --only lenet300 RigL`` trains it.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import RigL
        >>> rigl = RigL(sparsity=0.75)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[rigl], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> rigl.registry
        MaskRegistry(1 weights, sparsity=0.7500)

    References:
        Evci et al., `Rigging the Lottery: Making All Tickets Winners <https://arxiv.org/abs/1911.11134>`_, ICML 2020.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Evci et al.",
        title="Rigging the Lottery: Making All Tickets Winners",
        venue="ICML 2020",
        url="https://arxiv.org/abs/1911.11134",
    )
    needs_dense_gradients: ClassVar[bool] = True

    update_replaces_step: bool = field(
        default=True,
        metadata=doc(
            "Whether an update of the masks takes the place of the optimizer's step. The optimizer and the module's"
            " own ``on_before_optimizer_step`` then find no gradient (``None``), not even of weights without a mask."
        ),
    )

    @override
    def grow_scores(self, weight: MaskedWeight) -> Tensor:
        return weight.grad
