"""RigL: the rigged lottery.

Paper:  Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, https://arxiv.org/abs/1911.11134
Code:   https://github.com/google-research/rigl
Differs from the paper and the authors' code:
    - Ties are broken by position; the authors' code adds noise of 1e-5 to the magnitudes.
    - If an update does not change the masks, the optimizer takes its step; Algorithm 1 skips it.
    - Erdős–Rényi–Kernel budgets are exact integers, within three weights per layer of those of the authors' solver.
    - The paper updates every 100 steps of 97 656 on CIFAR-10; here every hundredth of training.
    - With Adam, a grown weight's second moment begins at the mean of its neighbours'; the authors train with SGD.
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

    At an update at step :math:`t < T_{end}`, each layer with :math:`n` active weights prunes the
    :math:`k = \lfloor f(t)\, n \rfloor` with the smallest :math:`|\theta|`. Then it grows, among its inactive weights,
    the :math:`k` with the largest :math:`|\partial L / \partial \theta|`, which start at zero. Here

    .. math:: f(t) = \frac{\alpha}{2} \Bigl(1 + \cos \frac{\pi t}{T_{end}}\Bigr) .

    :math:`\alpha` is ``drop_fraction``, :math:`T_{end}` is ``stop``, and :math:`\Delta T` is ``update_every``. When the
    masks are updated, the optimizer takes no step (Algorithm 1); with ``update_replaces_step=False`` it does, as in
    ITOP.

    ITOP's settings (Liu et al. 2021) explore more: ``RigL(0.9, drop_fraction=Cosine(0.5, 0.005), update_every=4000,
    stop=1.0, update_replaces_step=False)``.

    Frequent updates hurt transformers: in trials with a small ViT, RigL was worse than SET. Networks without
    normalisation hardly train at 98 % and above; ``initial_scale="density"`` helps.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 96.4, 95.7, 93.2 and
    89.7 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning at all four, by 1.1 to 2.1 points, and
    beats random masks (ERK). ``python -m benchmarks.evidence --only lenet300 RigL`` trains it. On a small CNN it loses
    to a baseline at 90, 95, 98 and 99 % with BatchNorm, and at 90, 95, 98 and 99 % without.

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
            "Whether an update of the masks replaces the optimizer's step. The optimizer and the module's own"
            " ``on_before_optimizer_step`` then find no gradient (``None``), not even for weights without a mask."
        ),
    )

    @override
    def grow_scores(self, weight: MaskedWeight) -> Tensor:
        return weight.grad
