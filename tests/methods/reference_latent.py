"""SR-STE, STR, Top-KAST and Feather the long way: autograd through reparametrized weights, in the user's optimizer.

Slow and explicit on purpose; nothing of :mod:`lightning_sparse` is used. What the callbacks do in closed form is
compared with this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.methods.spies import StepIndexedToy

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["FeatherNetwork", "ReferenceToy", "Reparametrized", "SRSTENetwork", "STRNetwork", "TopKASTNetwork"]


class _Replaced(torch.autograd.Function):
    """Gives the second tensor in the place of the first; the gradient is that times the third, plus the fourth."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, instead: Tensor, factor: Tensor, added: Tensor) -> Tensor:
        ctx.save_for_backward(factor, added)
        return instead

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        factor, added = ctx.saved_tensors
        return grads[0] * factor + added, None, None, None


def _largest(values: Tensor, k: int) -> Tensor:
    """Where the ``k`` largest magnitudes are."""
    order = values.detach().abs().flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[order[:k]] = True
    return chosen.reshape(values.shape)


class Reparametrized(nn.Module):
    """A network whose weights pass through a function on their way into it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.names = [f"{name}.weight" for name, layer in network.named_children() if isinstance(layer, nn.Linear)]
        self.thresholds = nn.ParameterList()
        self.step = 0

    def weight(self, name: str) -> Tensor:
        """The dense weight."""
        return self.network.get_parameter(name)

    def mask(self, name: str) -> Tensor:
        """Which weights are active now."""
        raise NotImplementedError

    def effective(self, name: str) -> Tensor:
        """What the network computes with, with a path for gradients."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Any:
        """The output of the network."""
        return functional_call(self.network, {name: self.effective(name) for name in self.names}, inputs)

    def penalty(self) -> Tensor:
        """What is added to the loss."""
        return torch.zeros(())

    def before_step(self) -> None:
        """The optimizer is about to step."""

    def after_step(self, optimizer: Optimizer) -> None:
        """The optimizer has stepped."""
        self.step += 1


class SRSTENetwork(Reparametrized):
    """Two of four along the inputs; lambda is added in backward."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self.decay = decay

    def mask(self, name: str) -> Tensor:
        blocks = self.weight(name).detach().reshape(-1, 4)
        return torch.stack([_largest(block, 2) for block in blocks]).reshape(self.weight(name).shape)

    def effective(self, name: str) -> Tensor:
        weight, mask = self.weight(name), self.mask(name)
        added = self.decay * (~mask) * weight.detach()
        return _Replaced.apply(weight, weight.detach() * mask, torch.ones_like(weight), added)  # type: ignore[no-any-return]


class STRNetwork(Reparametrized):
    """A soft threshold, with a parameter for each layer."""

    def __init__(self, network: nn.Module, initial: float) -> None:
        super().__init__(network)
        self.thresholds.extend(nn.Parameter(torch.tensor(initial, dtype=torch.float64)) for _ in self.names)

    def effective(self, name: str) -> Tensor:
        weight, s = self.weight(name), self.thresholds[self.names.index(name)]
        return torch.sign(weight) * torch.relu(weight.abs() - torch.sigmoid(s))

    def mask(self, name: str) -> Tensor:
        return self.effective(name).detach() != 0


class TopKASTNetwork(Reparametrized):
    """A quarter is used and half is trained, in each layer."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self.decay = decay
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}

    def mask(self, name: str) -> Tensor:
        return _largest(self.weight(name), self.weight(name).numel() // 4)

    def trained(self, name: str) -> Tensor:
        return _largest(self.weight(name), self.weight(name).numel() // 2)

    def effective(self, name: str) -> Tensor:
        weight, b = self.weight(name), self.trained(name)
        return _Replaced.apply(weight, weight.detach() * self.mask(name), b * 1.0, torch.zeros_like(weight))  # type: ignore[no-any-return]

    def penalty(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name in self.names:
            weight, a, b = self.weight(name), self.mask(name), self.trained(name)
            total = total + weight[a].square().sum() / 2 + weight[b & ~a].square().sum() / 2 / 0.25
        return self.decay * total

    def before_step(self) -> None:
        self.kept = {name: (self.weight(name).detach().clone(), self.trained(name)) for name in self.names}

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        super().after_step(optimizer)
        for name, (before, b) in self.kept.items():
            weight = self.weight(name)
            weight[~b] = before[~b]
            for moment in optimizer.state[weight].values():
                if isinstance(moment, Tensor) and moment.shape == weight.shape:
                    moment[~b] = 0.0
            entered, second = self.trained(name) & ~b, optimizer.state[weight].get("exp_avg_sq")
            if second is not None:
                second[entered] = second[self.trained(name) & b].mean()


class FeatherNetwork(Reparametrized):
    """The largest weights of all layers together; a cubic from step 1 to step ``stop``."""

    def __init__(self, network: nn.Module, sparsity: float, theta: float, stop: int) -> None:
        super().__init__(network)
        self.sparsity, self.theta, self.stop = sparsity, theta, stop

    def due(self) -> float:
        progress = min(1.0, max(0.0, (self.step - 1) / (self.stop - 1)))
        return self.sparsity * (1 - (1 - progress) ** 3)

    def kept(self) -> tuple[Tensor, float]:
        weights = torch.cat([self.weight(name).detach().flatten() for name in self.names])
        kept = _largest(weights, int((1 - self.due()) * weights.numel() + 1e-9))
        return kept, 0.0 if kept.all() else float(weights[~kept].abs().max())

    def mask(self, name: str) -> Tensor:
        parts = self.kept()[0].split([self.weight(each).numel() for each in self.names])
        return parts[self.names.index(name)].reshape(self.weight(name).shape)

    def effective(self, name: str) -> Tensor:
        weight, mask, threshold = self.weight(name), self.mask(name), self.kept()[1]
        cut = (weight.detach().abs() ** 3 - threshold**3).clamp(min=0) ** (1 / 3) * weight.detach().sign() * mask
        return _Replaced.apply(weight, cut, torch.where(mask, 1.0, self.theta), torch.zeros_like(weight))  # type: ignore[no-any-return]


class ReferenceToy(StepIndexedToy):
    """The toy of the tests, reparametrized; gradients of its network alone are clipped."""

    def __init__(self, kind: type[Reparametrized], settings: dict[str, Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self.network: Reparametrized = kind(self.network, **settings)  # type: ignore[assignment]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The toy's loss, and the penalty."""
        return super().training_step(batch, batch_idx) + self.network.penalty()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, with what the method does around it."""
        self.network.before_step()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.network.after_step(optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Leave what is learned beside the weights as it is."""
        if gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(self.network.network.parameters(), gradient_clip_val)
