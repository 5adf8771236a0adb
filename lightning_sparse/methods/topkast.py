r"""Top-KAST: always sparse, forward and backward.

Paper:  Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, https://arxiv.org/abs/2106.03517
Code:   none by the authors is public.
Differs from the paper:
    - The gradient is computed dense, and restricted to B before the optimizer steps, so the backward saves no time.
    - Momentum and weight decay change nothing outside B either, with any optimizer; the paper trains without
      momentum. A weight that leaves B loses its moments; one that enters B gets the mean second moment of B.
    - We could not read which norm the exploration penalty uses; here it is half the squared Euclidean norm, so that its
      gradient is a weight decay, larger by 1/D in B without A.
    - Gradients that are inf or NaN change neither A nor B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.masks import pack, unpack, zero_pruned_
from lightning_sparse.masks.budgets import LayerAllocation, check_budget, layer_budgets, told_of_starved
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.moments import clear_moments, warm_moments
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.checks import check_choice, check_count, check_sparsity, check_steps, check_strength
from lightning_sparse.methods.latent import LatentMethod
from lightning_sparse.methods.paper import Paper

__all__ = ["TopKAST"]


@final
@method
class TopKAST(LatentMethod):
    r"""Top-K always sparse training: computes with the largest weights, and trains these and some candidates.

    In each layer with :math:`N` weights, A is the set of the :math:`D N`, and B of the :math:`(D + M) N` weights with
    the largest :math:`|\theta|`. The module computes with A; the optimizer updates B, with the gradient of

    .. math:: J = L(\theta_A) + \frac{\lambda}{2} \sum_{i \in A} \theta_i^2
        + \frac{\lambda}{2 D} \sum_{i \in B \setminus A} \theta_i^2

    where the gradient of the first term, with respect to :math:`\theta_A`, is used for all of B. Weights of B outside A
    decay faster; those that do not grow into A fall out of B, and others take their places. :math:`1 - D` is
    ``sparsity``, :math:`1 - D - M` is ``backward_sparsity``, :math:`\lambda` is ``decay``.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 96.8, 95.7, 91.2 and
    63.4 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning at all four. At 99 % it loses to all:
    the last layer uses ten weights for ten classes. ``allocation="erk"`` reaches 97.2, 96.1, 93.9 and 92.0 %
    (``"TopKAST(erk)"``). ``python -m benchmarks.evidence --only lenet300 TopKAST`` trains it. On a small CNN it loses
    to a baseline at 90, 95, 98 and 99 % with BatchNorm, and at 90, 95, 98 and 99 % without.

    Raises:
        ValueError: An argument is out of its range, or backward_sparsity is above sparsity.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import TopKAST
        >>> method = TopKAST(0.75, backward_sparsity=0.5)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[method], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> method.registry
        MaskRegistry(1 weights, sparsity=0.7500)
        >>> int(method.trained["layer.weight"].sum())
        32

    References:
        Jayakumar et al., `Top-KAST: Top-K Always Sparse Training <https://arxiv.org/abs/2106.03517>`_, NeurIPS 2020.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Jayakumar et al.",
        title="Top-KAST: Top-K Always Sparse Training",
        venue="NeurIPS 2020",
        url="https://arxiv.org/abs/2106.03517",
    )
    needs_dense_gradients: ClassVar[bool] = True

    sparsity: float = field(kw_only=False, metadata=doc("Fraction of zeros in the forward pass, in [0, 1)."))
    backward_sparsity: float | None = field(
        default=None,
        metadata=doc(
            "Fraction of the weights that are not trained, at most ``sparsity``. By default, twice as many weights are"
            " trained as are used. The paper uses 0.5 with a ``sparsity`` of 0.8, and 0.8 with 0.9."
        ),
    )
    decay: float = field(default=1e-4, metadata=doc("Strength of the exploration penalty, at least 0."))
    allocation: LayerAllocation = field(
        default="uniform",
        metadata=doc('How layers share the budgets of A and of B: ``"uniform"``, ``"er"`` or ``"erk"``.'),
    )
    update_every: int = field(default=1, metadata=doc("Steps between two updates of A and B, at least 1."))
    min_active: int = field(default=0, metadata=doc("The least number of weights that each layer uses."))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sparsity = check_sparsity("sparsity", self.sparsity)
        if self.backward_sparsity is None:
            self.backward_sparsity = max(0.0, 1.0 - 2.0 * (1.0 - self.sparsity))
        self.backward_sparsity = check_sparsity("backward_sparsity", self.backward_sparsity)
        if self.backward_sparsity > self.sparsity:
            raise ValueError(
                f"backward_sparsity is {self.backward_sparsity} and sparsity is {self.sparsity}, but every weight that"
                " is used is trained too. Give a backward_sparsity of at most sparsity."
            )
        self.decay = check_strength("decay", self.decay)
        check_choice("allocation", self.allocation, LayerAllocation)
        check_count("min_active", self.min_active)
        check_steps("update_every", self.update_every)

    @property
    def trained(self) -> Mapping[str, Tensor]:
        """Which weights the optimizer moves (B), by name, ``bool`` and of the weight's shape; empty before training."""
        return {} if self.last_run is None else self._own.trained

    @property
    def _own(self) -> _Own:
        return cast("_Own", self._kept.own)

    @override
    def prepare(self) -> None:
        super().prepare()
        self._kept.own = _Own()

    @override
    def before_masks(self, group: MaskGroup, step: int) -> None:
        own = self._own
        own.due = (step - self.run.origin) % self.update_every == 0 or any(w.name not in own.trained for w in group)
        if not own.due:
            return
        assert self.backward_sparsity is not None
        check_budget(group, self.sparsity, self.min_active)
        used = layer_budgets(group, self.sparsity, self.allocation, self.min_active, grow=True)
        trained = layer_budgets(group, self.backward_sparsity, self.allocation, self.min_active, grow=True)
        if self.allocation == "uniform" and (told := told_of_starved(group, used, at_random=True)):
            self.warn_once(told)

        def choose(weight: MaskedWeight, a: int, b: int) -> None:
            own.used[weight.name] = a
            trained, before = (
                self._largest(weight, max(a, b), torch.ones_like(weight.mask)),
                own.trained.get(weight.name),
            )
            if before is not None:  # cleared moments would give what enters B steps of three learning rates under Adam
                entering, staying, nothing = trained & ~before, trained & before, torch.zeros_like(weight.value)
                warm_moments(group.optimizer, weight.parameter, entering, staying, nothing, weight.layout)
            own.trained[weight.name] = trained

        group.each(choose, used, trained)

    @override
    def new_mask(self, weight: MaskedWeight, latent: Tensor) -> Tensor:
        own = self._own
        return self._largest(weight, own.used[weight.name], own.trained[weight.name]) if own.due else weight.mask

    def _largest(self, weight: MaskedWeight, k: int, among: Tensor) -> Tensor:
        return weight.largest(self.latent(weight), k, among, key=torch.abs)

    @override
    def rewrite_gradient(self, weight: MaskedWeight, latent: Tensor, scale: float) -> None:
        strength, density = self.decay * scale, max(1, weight.num_active) / weight.numel
        # lambda in A, where the module still holds W, and lambda / D in the rest of B
        weight.grad.add_(latent, alpha=strength / density).add_(weight.value, alpha=strength - strength / density)
        zero_pruned_(weight.grad, self.trained[weight.name])

    @override
    def take_step(self, group: MaskGroup) -> None:
        for weight in group:
            trained, latent = self.trained[weight.name], self.latent(weight)
            torch.where(trained, weight.value, latent, out=latent)
            weight.value.copy_(latent)  # the optimizer's momentum or decay moves the others too, and A may take them
            clear_moments(group.optimizer, weight.parameter, ~trained)

    @override
    def own_state(self) -> dict[str, Any]:
        return {w.name: pack(w.layout.saved(self.trained[w.name])) for w in self.weights}

    @override
    def load_own_state(self, state: Mapping[str, Any]) -> None:
        for weight in self.weights:
            try:
                whole = unpack(state[weight.name], weight.shape)
            except (KeyError, ValueError) as error:
                raise MisconfigurationException(
                    f"The checkpoint does not say which weights of {weight.name} were trained. Resume from an earlier"
                    " one."
                ) from error
            self._own.trained[weight.name] = weight.layout.take(whole).to(weight.mask.device)


@dataclass
class _Own:
    """What Top-KAST keeps for one training.

    Attributes:
        used: The size of A, by name.
        trained: B, by name.
        due: Whether A must be chosen again.
    """

    used: dict[str, int] = field(default_factory=dict[str, int])
    trained: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    due: bool = False
