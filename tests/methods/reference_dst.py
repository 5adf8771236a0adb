"""DST the long way, as its authors' layers do it: autograd through masked weights, thresholds in the user's optimizer.

Slow and explicit on purpose; nothing of :mod:`lightning_sparse` is used. What the callback does in closed form is
compared with this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.methods.spies import StepIndexedToy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

__all__ = ["MaskedNetwork", "ReferenceToy"]


class UnitStep(torch.autograd.Function):
    """1 above 0, else 0; backward, the long-tailed estimator."""

    @staticmethod
    def forward(ctx: Any, q: Tensor) -> Tensor:
        ctx.save_for_backward(q)
        return (q > 0.0).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (q,) = ctx.saved_tensors
        estimate = torch.zeros_like(q)
        estimate[(q.abs() > 0.4) & (q.abs() <= 1.0)] = 0.4
        near = q.abs() <= 0.4
        estimate[near] = 2.0 - 4.0 * q.abs()[near]
        return grads[0] * estimate


class MaskedNetwork(nn.Module):
    """A network whose weights pass through masks on their way into it.

    Args:
        network: Any module.
        names: Its weights that have thresholds.
        alpha: Strength of the regulariser.
        reset_sparsity: Sparsity of a weight from which its thresholds are set back to 0.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], alpha: float, reset_sparsity: float = 0.99) -> None:
        super().__init__()
        self.network = network
        self.names = list(names)
        self.alpha = alpha
        self.reset_sparsity = reset_sparsity
        self.resets = 0
        self.thresholds = nn.ParameterList(nn.Parameter(self._zeros(name)) for name in names)

    def _zeros(self, name: str) -> Tensor:
        """A threshold for each output of a weight, in its type."""
        return self.network.get_parameter(name).new_zeros(int(self._output_of(name).max()) + 1)

    def _output_of(self, name: str) -> Tensor:
        """The output neuron or filter that each slice ``weight[i, j]`` feeds, counted over all groups."""
        weight = self.network.get_parameter(name)
        owner = self.network.get_submodule(name.rpartition(".")[0])
        first, second = weight.shape[:2]
        if not isinstance(owner, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            return torch.arange(first)[:, None].expand(first, second)
        group = torch.arange(first) // (first // owner.groups)
        return group[:, None] * second + torch.arange(second)

    def _mask(self, name: str, thresholds: Tensor) -> Tensor:
        weight = self.network.get_parameter(name)
        own = thresholds[self._output_of(name)]
        return UnitStep.apply(weight.abs() - own.reshape(*own.shape, *[1] * (weight.dim() - 2)))  # type: ignore[no-any-return]

    def masks(self) -> dict[str, Tensor]:
        """The masks, with a path for gradients, after collapsed ones were undone."""
        masks = {}
        for name, thresholds in zip(self.names, self.thresholds, strict=True):
            masks[name] = self._mask(name, thresholds)
            if 1.0 - float(masks[name].detach().mean()) >= self.reset_sparsity:
                self.resets += 1
                thresholds.data.fill_(0.0)
                masks[name] = self._mask(name, thresholds)
        return masks

    def forward(self, *inputs: Tensor) -> Any:
        """The output of the network with W ⊙ M."""
        masked = {name: self.network.get_parameter(name) * mask for name, mask in self.masks().items()}
        return functional_call(self.network, masked, inputs)

    def penalty(self) -> Tensor:
        """What is added to the loss."""
        return self.alpha * torch.stack([torch.exp(-thresholds).sum() for thresholds in self.thresholds]).sum()


class ReferenceToy(StepIndexedToy):
    """The toy of the tests, built of masked layers; gradients of its network alone are clipped."""

    def __init__(self, alpha: float, reset_sparsity: float = 0.99, **arguments: Any) -> None:
        super().__init__(**arguments)
        names = [f"{layer}.weight" for layer, module in self.network.named_children() if isinstance(module, nn.Linear)]
        self.network: MaskedNetwork = MaskedNetwork(self.network, names, alpha, reset_sparsity)  # type: ignore[assignment]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The toy's loss, and the regulariser."""
        return super().training_step(batch, batch_idx) + self.network.penalty()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Leave the thresholds' gradients as they are."""
        if gradient_clip_val is not None and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.network.network.parameters(), gradient_clip_val)
        elif gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(self.network.network.parameters(), gradient_clip_val)
