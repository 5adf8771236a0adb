"""Dynamic ReLU as a module, and a ReLU that begins as one.

References:
    Chen et al., `Dynamic ReLU <https://arxiv.org/abs/2003.10027>`_, ECCV 2020.
    Li et al., `Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning
    <https://arxiv.org/abs/2411.13545>`_, TMLR 2025; code https://github.com/TensorStrike/ES2
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_sparse.arguments import check_whole
from lightning_sparse.functional.dyrelu import dyrelu, dyrelu_coefficients
from lightning_sparse.functional.stored import obstacle
from lightning_sparse.masks.places import printable

__all__ = ["DyReLU", "HyperLinear", "PhasedReLU", "phased_relus"]


@final
class HyperLinear(nn.Linear):
    """A linear layer that computes coefficients of another layer; it is temporary and never masked.

    Example:
        >>> HyperLinear(4, 2)
        HyperLinear(in_features=4, out_features=2, bias=True)
    """

    is_auxiliary: ClassVar[bool] = True


@final
class DyReLU(nn.Module):
    r"""Dynamic ReLU with separate coefficients for every image and channel (DyReLU-B, K = 2).

    .. math:: \theta(x) = 2\,\sigma\bigl(W_2\,\mathrm{ReLU}(W_1\,\mathrm{GAP}(x))\bigr) - 1, \qquad
        y_c = \max_{k \in \{1, 2\}} (a_{k,c}(x)\, x_c + b_{k,c}(x))

    with :func:`~lightning_sparse.functional.dyrelu.dyrelu_coefficients`. It has :math:`5 C^2 / r + C (4 + 1/r)`
    parameters for :math:`C` channels and reduction :math:`r`.

    Args:
        channels: Channels of the input, its dimension 1.
        reduction: The hidden layer has ``channels / reduction`` units; 4 in EAST's code, 8 in DyReLU's paper.

    Raises:
        ValueError: One of them is not an integer of at least 1.

    Example:
        >>> import torch
        >>> from lightning_sparse.modules import DyReLU
        >>> DyReLU(channels=8)(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])

    References:
        Chen et al., `Dynamic ReLU <https://arxiv.org/abs/2003.10027>`_, ECCV 2020.
    """

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        channels, reduction = check_whole("channels", channels), check_whole("reduction", reduction)
        hidden = _hidden(channels, reduction)
        self.channels = channels
        self.squeeze = HyperLinear(channels, hidden)
        self.excite = HyperLinear(hidden, 4 * channels)

    @override
    def forward(self, inputs: Tensor, beta: Tensor | float = 1.0) -> Tensor:
        """Apply it to inputs of shape ``(N, C, ...)``; ``beta`` as in ``dyrelu_coefficients``."""
        pooled = inputs.mean(dim=list(range(2, inputs.dim()))) if inputs.dim() > 2 else inputs
        theta = 2.0 * torch.sigmoid(self.excite(F.relu(self.squeeze(pooled)))) - 1.0
        slopes, intercepts = dyrelu_coefficients(theta.view(-1, 4, self.channels), beta)
        return dyrelu(inputs, slopes.to(inputs.dtype), intercepts.to(inputs.dtype))


class _Phase:
    """Whether a site is a plain ReLU by now; one for a site and all its copies, those of averaged weights included."""

    def __init__(self) -> None:
        self.out = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Phase:
        return self


@final
class PhasedReLU(nn.Module):
    r"""A ReLU that is a Dynamic ReLU first: :class:`DyReLU` at :math:`\beta = 1`, ReLU at 0, linear in between.

    Once it is phased out, it computes only ``relu``, and ``state_dict`` no longer has its parameters. Loading a state
    without them phases it out; loading a state with them brings the Dynamic ReLU back. So a ``state_dict`` always says
    what the network computes, and a checkpoint written after the phase-out loads into the original network.

    Args:
        relu: The ReLU that it replaces, which may be used in several places.
        channels: The numbers of channels of its inputs; it has a :class:`DyReLU` for each. Without any, it is phased
            out until a state is loaded that has some.
        reduction: The ``reduction`` of the :class:`DyReLU`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sparse.modules import PhasedReLU
        >>> site = PhasedReLU(nn.ReLU(), channels=[8])
        >>> site.phase_out()
        >>> site(torch.tensor([[-1.0] * 8])).sum(), list(site.state_dict())
        (tensor(0.), [])
    """

    beta: Tensor

    def __init__(self, relu: nn.ReLU, channels: Iterable[int], reduction: int = 4) -> None:
        super().__init__()
        self.reduction = reduction
        self.dyrelu = nn.ModuleDict({str(size): DyReLU(size, reduction) for size in sorted(set(channels))})
        # A tensor, so that a compiled forward is not compiled anew at every step.
        self.register_buffer("beta", torch.ones(()))
        self._phase = _Phase()
        self._relu = (relu,)  # in a tuple, so that it is no child
        if not self.dyrelu:
            self.phase_out()
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_pre_hook(_phase_as_saved)

    @property
    def relu(self) -> nn.ReLU:
        """The ReLU that it stands for."""
        return self._relu[0]

    @property
    def is_phased_out(self) -> bool:
        """Whether it is a plain ReLU."""
        return self._phase.out

    def phase_out(self) -> None:
        """Be a plain ReLU from now on."""
        self._phase.out = True
        self.beta.zero_()

    def phase_in(self) -> None:
        """Be a Dynamic ReLU again, with the parameters that it has."""
        self._phase.out = False
        self.beta.fill_(1.0)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Apply it to inputs of shape ``(N, C, ...)``."""
        if self._phase.out:
            return F.relu(inputs, self._relu[0].inplace)
        channels = str(inputs.shape[1]) if inputs.dim() > 1 else ""
        if channels not in self.dyrelu:
            raise ValueError(
                f"An input of shape {tuple(inputs.shape)} came to a ReLU that was prepared for"
                f" {' and '.join(self.dyrelu)} channels in dimension 1. Leave this ReLU out with exclude=, or give the"
                " module an example_input_array of the shape that training has."
            )
        return self.dyrelu[channels](inputs, self.beta)

    @override
    def extra_repr(self) -> str:
        return "phased out" if self._phase.out else ""


def phased_relus(module: nn.Module) -> dict[str, PhasedReLU]:
    """Every :class:`PhasedReLU` in a module by its name.

    Example:
        >>> from torch import nn
        >>> list(phased_relus(nn.Sequential(nn.Linear(2, 2), PhasedReLU(nn.ReLU(), [2]))))
        ['1']
    """
    return {name: child for name, child in module.named_modules() if isinstance(child, PhasedReLU)}


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    assert isinstance(module, PhasedReLU)
    if module.is_phased_out:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]


def _is_saved(state: dict[str, Any], prefix: str, size: str, reduction: int) -> bool:
    """Whether a state holds all of a Dynamic ReLU, before any memory is taken for it: a name alone is no reason."""
    if not (size.isascii() and size.isdecimal() and len(size) < 10 and int(size) > 0):
        return False
    channels, hidden = int(size), _hidden(int(size), reduction)
    shapes = {"squeeze.weight": (hidden, channels), "excite.weight": (4 * channels, hidden)}
    weights = [(state.get(f"{prefix}{name}"), shape) for name, shape in shapes.items()]
    return all(isinstance(each, Tensor) and each.shape == shape and not obstacle(each) for each, shape in weights)


def _hidden(channels: int, reduction: int) -> int:
    return max(1, channels // reduction)


def _phase_as_saved(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    assert isinstance(module, PhasedReLU)
    del metadata, strict, missing, unexpected
    if any(key.startswith(prefix) for key in state):
        module._phase.out = False  # pyright: ignore[reportPrivateUsage]
        start = f"{prefix}dyrelu."
        sizes = {key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)}
        for size in sorted(sizes - module.dyrelu.keys()):
            if _is_saved(state, f"{start}{size}.", size, module.reduction):
                module.dyrelu[size] = DyReLU(int(size), module.reduction).to(module.beta.device)
            else:
                errors.append(
                    f"{printable(start + size)} is no Dynamic ReLU of reduction {module.reduction}: its weights are"
                    " missing or have other sizes. Load it with the reduction that it was saved with."
                )
        return
    module.phase_out()
    # What is not there is not missing: it stays as it is, and is not used.
    state.update({f"{prefix}{name}": value for name, value in module.named_parameters()})
    state.update({f"{prefix}{name}": value for name, value in module.named_buffers()})
