"""Who is measured: dense training, the methods of this package, and other ways to train sparse.

Every sparse contender masks the same weights, 90 % of each layer or of all together, and is measured between updates:
it makes its masks before the first step that counts, and then only keeps them. The rivals come with torch and
Lightning, or are reference loops, as in published code:

- ``torch.nn.utils.prune``: weight ⊙ mask in a hook before each forward; autograd goes through the product. It cannot
  prune the output layers of attention, because their hooks never run: these stay dense.
- ``ModelPruning``: Lightning's callback, which uses ``torch.nn.utils.prune``.
- ``parametrize``: weight ⊙ mask as a parametrization, with a float mask.
- ``torch.ao``: its WeightNormSparsifier, which is a parametrization too. Its ``step`` fails on convolutions, so it is
  given the masks.
- float masks: a reference loop. It multiplies gradients before each step, and weights after it, by masks of floats, as
  the code of RigL's ports to torch does.
- ``masked_fill_``: the same reference loop, with ``masked_fill_`` and ``bool`` masks.
- thresholds by ``parametrize``: DST without a callback; autograd goes through an explicit mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier
from torch.nn.utils import parametrize, prune
from typing_extensions import override

from lightning_sparse import (
    ACDC,
    DSR,
    DST,
    EAST,
    FGGP,
    GMP,
    MEST,
    SET,
    SNFS,
    SRSTE,
    STR,
    Feather,
    FixedMask,
    GraNet,
    RigL,
    SRigL,
    TopKAST,
)
from lightning_sparse.functional.thresholds import long_tailed_estimator
from lightning_sparse.masks import select_weights
from lightning_sparse.modules import DyReLUPhasing
from lightning_sparse.schedules import Constant

__all__ = ["METHODS", "RIVALS", "Contender", "masked_weights"]

SPARSITY = 0.9
ALPHA = 1e-6


def _nothing(_: nn.Module) -> None:
    """Leave the network as it is."""


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        callbacks: Makes the callbacks of the Trainer.
        prepare: Changes the network before training.
    """

    callbacks: Callable[[], Sequence[L.Callback]] = tuple
    prepare: Callable[[nn.Module], None] = _nothing


@dataclass(frozen=True)
class Masked:
    """A masked weight: the module that holds it, and its name there."""

    owner: nn.Module
    name: str

    @property
    def value(self) -> nn.Parameter:
        """The weight."""
        return getattr(self.owner, self.name)

    def mask(self) -> Tensor:
        """Return its mask by magnitude."""
        magnitudes = self.value.detach().abs()
        return magnitudes > magnitudes.flatten().kthvalue(int(SPARSITY * magnitudes.numel())).values


def masked_weights(network: nn.Module) -> Iterator[Masked]:
    """The weights that the methods of this package mask."""
    for candidate in select_weights(network).masked:
        path, _, name = candidate.name.rpartition(".")
        yield Masked(network.get_submodule(path), name)


def zero_smallest(network: nn.Module) -> None:
    """Prune by magnitude, once."""
    with torch.no_grad():
        for weight in masked_weights(network):
            weight.value.mul_(weight.mask())


def prune_by_torch(network: nn.Module) -> None:
    """Prune with ``torch.nn.utils.prune``."""
    for weight in _reached_by_hooks(network):
        prune.l1_unstructured(weight.owner, weight.name, SPARSITY)


def _reached_by_hooks(network: nn.Module) -> list[Masked]:
    """The weights of modules that are called. Attention uses its output layer's weight without calling that layer."""
    never_called = nn.modules.linear.NonDynamicallyQuantizableLinear
    return [weight for weight in masked_weights(network) if not isinstance(weight.owner, never_called)]


class PruneAtStart(ModelPruning):
    """Lightning's callback, which prunes here when training starts, not when an epoch ends."""

    def __init__(self) -> None:
        super().__init__("l1_unstructured", amount=SPARSITY, apply_pruning=False, use_lottery_ticket_hypothesis=False)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """List the weights, because the callback cannot find those of attention layers itself."""
        self._parameters_to_prune = [(weight.owner, weight.name) for weight in _reached_by_hooks(pl_module)]
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune."""
        self.apply_pruning(SPARSITY)


class Product(nn.Module):
    """The product of a weight and a float mask."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.float())

    @override
    def forward(self, weight: Tensor) -> Tensor:
        """Return W ⊙ M."""
        return weight * self.mask


def parametrize_masks(network: nn.Module) -> None:
    """Mask with ``torch.nn.utils.parametrize``."""
    for weight in list(masked_weights(network)):
        parametrize.register_parametrization(weight.owner, weight.name, Product(weight.mask()))


def prepare_by_torch_ao(network: nn.Module) -> None:
    """Mask with torch.ao's sparsifier."""
    weights = [(weight, weight.mask()) for weight in masked_weights(network)]
    names = {module: name for name, module in network.named_modules()}
    sparsifier = WeightNormSparsifier(SPARSITY, sparse_block_shape=(1, 1), zeros_per_block=1)
    config = [{"tensor_fqn": f"{names[weight.owner]}.{weight.name}".lstrip(".")} for weight, _ in weights]
    sparsifier.prepare(network, config)
    for weight, mask in weights:
        weight.owner.parametrizations[weight.name][0].mask = mask.float()  # type: ignore[index, union-attr]


class ReferenceLoop(L.Callback):
    """Masks by hand: gradients before the optimizer's step, and weights after it."""

    def __init__(self) -> None:
        self.weights: list[tuple[nn.Parameter, Tensor]] = []

    def zero_pruned_(self, tensor: Tensor, mask: Tensor) -> None:
        """Zero the pruned entries."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the masks."""
        self.weights = [(weight.value, weight.mask()) for weight in masked_weights(pl_module)]

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Mask the gradients."""
        for weight, mask in self.weights:
            self.zero_pruned_(weight.grad, mask)  # type: ignore[arg-type]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mask the weights."""
        for weight, mask in self.weights:
            self.zero_pruned_(weight, mask)


class FloatMasks(ReferenceLoop):
    """Masks of floats."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the masks as wide as the weights."""
        super().on_train_start(trainer, pl_module)
        self.weights = [(weight, mask.to(weight.dtype)) for weight, mask in self.weights]

    @override
    def zero_pruned_(self, tensor: Tensor, mask: Tensor) -> None:
        """Multiply."""
        tensor.mul_(mask)


class MaskedFill(ReferenceLoop):
    """Masks of ``bool``."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make masks that are True where weights are pruned."""
        super().on_train_start(trainer, pl_module)
        self.weights = [(weight, ~mask) for weight, mask in self.weights]

    @override
    def zero_pruned_(self, tensor: Tensor, mask: Tensor) -> None:
        """Fill."""
        tensor.masked_fill_(mask, 0.0)


class _Step(torch.autograd.Function):
    """The unit step with the long-tailed estimator as its derivative."""

    @staticmethod
    @override
    def forward(ctx: Any, margin: Tensor) -> Tensor:
        ctx.save_for_backward(margin)
        return (margin > 0).to(margin.dtype)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (margin,) = ctx.saved_tensors
        return grad * long_tailed_estimator(margin)


class Thresholded(nn.Module):
    """A weight whose entries below their row's threshold are masked."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(rows))

    @override
    def forward(self, weight: Tensor) -> Tensor:
        """Return W ⊙ M."""
        threshold = self.threshold.view(-1, *(1 for _ in weight.shape[1:]))
        return weight * _Step.apply(weight.abs() - threshold)  # type: ignore[no-untyped-call]


class Penalty(L.Callback):
    """The gradient of α Σ exp(−t), which is usually part of the loss."""

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add it."""
        for module in pl_module.modules():
            if isinstance(module, Thresholded):
                module.threshold.grad.sub_(ALPHA * torch.exp(-module.threshold.detach()))  # type: ignore[union-attr]


def parametrize_thresholds(network: nn.Module) -> None:
    """Implement DST with ``torch.nn.utils.parametrize``."""
    for weight in list(masked_weights(network)):
        parametrize.register_parametrization(weight.owner, weight.name, Thresholded(len(weight.value)))


def phasing() -> list[L.Callback]:
    """EAST while its Dynamic ReLUs last: longer than any training run of the benchmarks."""
    return [EAST(SPARSITY, **STILL, cycles=0, sharing=False, phasing=DyReLUPhasing(start=10**6, stop=10**6 + 1))]


STILL: dict[str, Any] = {"drop_fraction": Constant(0.3), "stop": 0}
METHODS: dict[str, Contender] = {
    "GMP": Contender(lambda: [GMP(SPARSITY, update_every=1, stop=0)]),
    "FGGP": Contender(lambda: [FGGP(SPARSITY, update_every=1, stop=0)]),
    "SET": Contender(lambda: [SET(SPARSITY, **STILL)]),
    "RigL": Contender(lambda: [RigL(SPARSITY, **STILL)]),
    "EAST": Contender(lambda: [EAST(SPARSITY, **STILL, cycles=0, sharing=False, phasing=False)]),
    "GraNet": Contender(lambda: [GraNet(Constant(SPARSITY), **STILL)]),
    "MEST": Contender(lambda: [MEST(SPARSITY, **STILL)]),
    "SNFS": Contender(lambda: [SNFS(SPARSITY, **STILL)]),
    "DSR": Contender(lambda: [DSR(SPARSITY, stop=0)]),
    "ACDC": Contender(lambda: [ACDC(SPARSITY, update_every=1, start=0, last_dense=0, stop=0)]),
    "SRigL": Contender(lambda: [SRigL(SPARSITY, **STILL)]),
    "FixedMask": Contender(lambda: [FixedMask()], zero_smallest),
    "DST": Contender(lambda: [DST(ALPHA)]),
    "SRSTE": Contender(lambda: [SRSTE("2:4")]),
    "STR": Contender(lambda: [STR(-5.0, decay=1e-4)]),
    "TopKAST": Contender(lambda: [TopKAST(SPARSITY)]),
    "Feather": Contender(lambda: [Feather(SPARSITY, stop=0)]),
    "EAST, Dynamic ReLUs": Contender(phasing),
}
"""The methods of this package, between updates; EAST after its phase of Dynamic ReLUs, and during it. The masks of DST,
SR-STE, STR, Top-KAST and Feather change at every step, which is measured with them; those of SR-STE hold 50 %."""

RIVALS: dict[str, Contender] = {
    "torch.nn.utils.prune": Contender(prepare=prune_by_torch),
    "ModelPruning": Contender(lambda: [PruneAtStart()]),
    "parametrize": Contender(prepare=parametrize_masks),
    "torch.ao": Contender(prepare=prepare_by_torch_ao),
    "float masks": Contender(lambda: [FloatMasks()]),
    "masked_fill_": Contender(lambda: [MaskedFill()]),
    "thresholds by parametrize": Contender(lambda: [Penalty()], parametrize_thresholds),
}
"""Other ways to train sparse; the last is the rival of DST."""
