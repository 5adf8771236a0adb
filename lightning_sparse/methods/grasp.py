"""GraSP: gradient signal preservation.

Paper:  Wang, Zhang & Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020,
        https://arxiv.org/abs/2002.07376
Code:   https://github.com/alecwangcq/GraSP
Differs from the authors' code:
    - The loss is the module's own; there the logits are first divided by a temperature of 200.
    - The gradient and its product with the Hessian come from consecutive batches of the Trainer's loader; there from
      the same samples, ten of each class on CIFAR-10.
    - Weights are as the module initialized them; there linear layers are initialized again (Xavier).
    - The dense network sees the batches in training mode, so they count in the statistics of BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.derivatives import by_fsdp, differentiates_twice, inner_product
from lightning_sparse.masks.distributed import mean_
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.layout import laid_like, local_part
from lightning_sparse.masks.moments import loss_scale
from lightning_sparse.masks.pool import MaskPool
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.at_initialization import AtInitialization
from lightning_sparse.methods.card import method
from lightning_sparse.methods.paper import Paper

__all__ = ["GraSP"]


@final
@method
class GraSP(AtInitialization):
    r"""Gradient signal preservation: prunes once, at initialization, the weights that gradient flow needs least.

    Removing a weight changes the squared norm of the gradient, to first order, by a positive multiple of its score

    .. math:: S = -\,w \odot (H g), \qquad g = \nabla L, \quad H = \nabla^2 L .

    The weights with the highest :math:`S` in all layers together are pruned, until
    :math:`\lfloor (1 - s) N \rfloor` are left; then training begins. :math:`g` comes from the first ``batches``
    batches, and :math:`H g` from as many more; the optimizer takes no step on them. :math:`H g` is the gradient of
    :math:`\langle \nabla L,\, g \rangle` with :math:`g` held fixed, a second derivative of the loss.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 96.4, 95.6, 92.8 and
    86.9 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning at all four, by 1.1 to 4.8 points, and
    beats random masks (ERK). ``python -m benchmarks.evidence --only lenet300 GraSP`` trains it. On a small CNN it loses
    to a baseline at 98 and 99 % with BatchNorm, and at 90, 95, 98 and 99 % without.

    Raises:
        ValueError: An argument is out of its range.
        MisconfigurationException: The loss has no second derivative.

    Example:
        >>> import lightning as L
        >>> from lightning_sparse import GraSP
        >>> from lightning_sparse.zoo import Classifier, DigitsDataModule, LeNet300100
        >>> grasp = GraSP(sparsity=0.9)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[grasp], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Classifier(LeNet300100(in_features=64)), DigitsDataModule())
        >>> grasp.registry
        MaskRegistry(3 weights, sparsity=0.9000)

    References:
        Wang, Zhang & Grosse, `Picking Winning Tickets Before Training by Preserving Gradient Flow
        <https://arxiv.org/abs/2002.07376>`_, ICLR 2020.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Wang, Zhang & Grosse",
        title="Picking Winning Tickets Before Training by Preserving Gradient Flow",
        venue="ICLR 2020",
        url="https://arxiv.org/abs/2002.07376",
    )
    needs_dense_gradients: ClassVar[bool] = True

    @override
    def prepare(self) -> None:
        super().prepare()
        module = self.run.module()
        if module is not None and by_fsdp(module).intersection(weight.parameter for weight in self.weights):
            raise MisconfigurationException(
                "GraSP needs the second derivative of the loss, which FSDP2 cannot compute: it gathers weights outside"
                " autograd's graph, and takes their gradients out of it. Use tensor parallelism alone"
                " (parallelize_module), or SNIP or SynFlow, which need first derivatives."
            )
        with torch.enable_grad():
            if not all(differentiates_twice(weight.parameter) for weight in self.weights):
                raise MisconfigurationException(
                    f"GraSP needs the second derivative of the loss, and torch {torch.__version__} loses it in layers"
                    " under tensor parallelism. Use a newer torch (2.14 computes it), or SNIP or SynFlow, which need"
                    " first derivatives."
                )

    @property
    @override
    def steps_watched(self) -> int:
        return 2 * self.batches

    def _has_gradient(self, weight: MaskedWeight) -> bool:
        """Whether g is complete, and its product with the Hessian is looked for."""
        return self.watched.seen.get(weight.name, 0) >= self.batches

    @override
    def observe(self, weight: MaskedWeight) -> None:
        if not self._has_gradient(weight):
            self.memory(weight, "gradient").add_(self.gradient(weight))
        elif weight.name in self.watched.tensors:
            self.memory(weight, "product").add_(self.watched.tensors.pop(weight.name), alpha=1.0 / self._loss_scale)
        else:
            return  # another optimizer's weights have had no gradient yet
        super().observe(weight)

    @override
    def is_ready(self, group: MaskGroup) -> bool:
        looks = not self.is_pending(group) or all(weight.name in self.watched.tensors for weight in group)
        return looks and super().is_ready(group)

    @override
    def observed_besides(self, group: MaskGroup) -> Sequence[Tensor]:
        return [self.watched.tensors[weight.name] for weight in group if weight.name in self.watched.tensors]

    @override
    def waits(self, group: MaskGroup) -> bool:
        unused = [self.watched.tensors.pop(weight.name, None) for weight in group]
        if any(product is not None for product in unused) and self._loss_scale * self.watched.share > 1.0:
            # In float16, H g overflows at scales of the loss at which gradients do not, and the GradScaler sees only
            # these. So what H g is computed from is scaled down as a GradScaler would, to the loss itself at most.
            self.watched.share /= 2.0
        return super().waits(group)

    @property
    def _loss_scale(self) -> float:
        """The factor of the GradScaler in the loss of this step."""
        trainer = self.run.trainer()
        return 1.0 if trainer is None else loss_scale(trainer)

    @override
    def on_loss(self, group: MaskGroup, loss: Tensor) -> None:
        if not (self.is_pending(group) and all(self._has_gradient(weight) for weight in self.weights)):
            return
        weights = self.weights
        try:
            first = _gradients(loss, weights, create_graph=True)
            pairs = zip(weights, first, strict=True)
            slopes = [inner_product(self.memory(w, "gradient"), g, w.parameter) for w, g in pairs if g is not None]
            if not slopes:  # the loss of another optimizer
                return
            second = _gradients(sum(slopes[1:], slopes[0]) * self.watched.share, group, create_graph=False)
        except RuntimeError as error:
            raise MisconfigurationException(
                "GraSP needs the second derivative of the loss, and autograd cannot compute it here:"
                f" {str(error).splitlines()[0]} Compute attention without fused kernels"
                " (torch.nn.attention.sdpa_kernel(SDPBackend.MATH)) and do not compile the module, or use SNIP or"
                " SynFlow, which need no second derivative."
            ) from error
        for weight, its in zip(group, second, strict=True):
            before = self.watched.tensors.get(weight.name, torch.zeros_like(weight.value))
            here = before if its is None else before + local_part(laid_like(its, weight.parameter)) / self.watched.share
            self.watched.tensors[weight.name] = here

    @override
    def before_update(self, group: MaskGroup) -> None:
        # Processes that share a layer see the same batches.
        mean_([self.memory(weight, "product") for weight in group if weight.layout.is_whole])

    @override
    def drop_scores(self, weight: MaskedWeight) -> Tensor:
        return weight.value * self.memory(weight, "product")

    @override
    def dropped(self, pool: MaskedWeight | MaskPool, among: Tensor, n: int) -> Tensor:
        # The highest S = −w ⊙ (H g) go: the smallest w ⊙ (H g), with their signs.
        if isinstance(pool, MaskPool):
            return pool.smallest(pool.flat(self.drop_scores), n, among)
        return pool.smallest(self.drop_scores(pool), n, among)

    @override
    def pattern_scores(self, weight: MaskedWeight, keep: int) -> Tensor:
        signed = self.drop_scores(weight).double()
        return signed - signed.min()  # by magnitude as with their signs


def _gradients(of: Tensor, weights: Sequence[MaskedWeight], *, create_graph: bool) -> Sequence[Tensor | None]:
    """Gradients with respect to weights; None where one plays no part, or its optimizer is toggled off."""
    taught = [weight.parameter for weight in weights if weight.parameter.requires_grad]
    if not taught:
        return [None] * len(weights)
    its = torch.autograd.grad(of, taught, create_graph=create_graph, retain_graph=True, allow_unused=True)
    by_weight = dict(zip(taught, its, strict=True))
    return [by_weight.get(weight.parameter) for weight in weights]
