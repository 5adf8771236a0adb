"""SynFlow: iterative synaptic flow pruning.

Paper:  Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020,
        https://arxiv.org/abs/2006.05467
Code:   https://github.com/ganguli-lab/Synaptic-Flow
Differs from the authors' code:
    - The code's default is one iteration; here it is the paper's 100.
    - The shape of the input of ones comes from the module's ``example_input_array`` or from the first training batch;
      there from the data set. Inputs that are not floating-point numbers, such as tokens, are used as they are.
    - Biases are not pruned.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar, final

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.budgets import budget_of
from lightning_sparse.masks.distributed import all_agree
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.at_initialization import AtInitialization
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.probe import inputs_of, synaptic_flow
from lightning_sparse.schedules import Exponential

__all__ = ["SynFlow"]


@final
@method
class SynFlow(AtInitialization):
    r"""Synaptic flow: prunes once, at initialization and without data, the weights that add least to the outputs.

    With every parameter and buffer replaced by its magnitude, an input of ones and
    :math:`R = \sum_i f_{|\theta|}(1)_i`, at iteration :math:`k = 1 \dots n` the weights of all layers with the smallest

    .. math:: S = \frac{\partial R}{\partial |w|} \odot |w|

    are pruned, until :math:`\lfloor N (1 - s)^{k / n} \rfloor` are left. The scores that flow into a neuron add up to
    those that flow out of it, so no layer collapses before the others. :math:`n` is ``iterations``.

    This conservation holds for linear layers, convolutions, ReLUs and BatchNorm. If a layer subtracts a mean
    (LayerNorm), flows partly cancel, and the magnitudes of the scores are ranked.

    Scores are computed in evaluation mode without side effects: weights, buffers, statistics of BatchNorm and random
    generators stay as they are. Only the shape of the first batch is used; the optimizer takes no step on it.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 96.8, 96.0, 94.4 and
    91.4 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning at all four, by 0.4 to 1.0 points, and
    beats random masks (ERK). ``python -m benchmarks.evidence --only lenet300 SynFlow`` trains it. On a small CNN it
    loses to a baseline at 95 and 98 % without BatchNorm.

    Raises:
        ValueError: An argument is out of its range.
        MisconfigurationException: The module does not compute on its ``example_input_array`` or first batch, or scores
            are not finite.

    Example:
        >>> import lightning as L
        >>> from lightning_sparse import SynFlow
        >>> from lightning_sparse.zoo import Classifier, DigitsDataModule, LeNet300100
        >>> synflow = SynFlow(sparsity=0.99)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[synflow], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Classifier(LeNet300100(in_features=64)), DigitsDataModule())
        >>> synflow.registry
        MaskRegistry(3 weights, sparsity=0.9900)

    References:
        Tanaka et al., `Pruning neural networks without any data by iteratively conserving synaptic flow
        <https://arxiv.org/abs/2006.05467>`_, NeurIPS 2020.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Tanaka et al.",
        title="Pruning neural networks without any data by iteratively conserving synaptic flow",
        venue="NeurIPS 2020",
        url="https://arxiv.org/abs/2006.05467",
    )

    iterations: int = field(default=100, metadata=doc("n: how often scores are computed, at least 1."))
    batches: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations!r}; give an int of at least 1.")

    @override
    def on_batch(self, batch: Any) -> None:
        self.watched.batch = batch if any(self.is_pending(group) for group in self.groups) else None

    @override
    def before_update(self, group: MaskGroup) -> None:
        module, final = self.run.module(), self.sparsity_now
        if not self.is_pending(group) or module is None:
            return
        inputs = inputs_of(module, self.watched.batch)
        iterations = self.iterations if self.allocation == "global" else 1
        for iteration in range(1, iterations + 1):
            its = self.watched.tensors = synaptic_flow(module, inputs, self.weights)
            finite = all(bool(scores.isfinite().all()) for scores in its.values())
            if not all_agree(finite, group.mask.device):
                raise MisconfigurationException(
                    "SynFlow's scores are inf or NaN: the sum of what flows through the magnitudes of"
                    f" {type(module).__name__}'s weights is too large for {group[0].value.dtype}. Normalise the"
                    " network, initialize it with smaller weights, or train in double precision."
                )
            if iteration < iterations:
                left = budget_of(group, Exponential(0.0, final)(iteration / iterations))
                self.prune_together(group, group.num_active - max(left, budget_of(group, final)))

    @override
    def drop_scores(self, weight: MaskedWeight) -> Tensor:
        return self.watched.tensors[weight.name]
