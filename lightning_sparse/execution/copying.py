"""Copies of modules, so that those of the user stay as they are."""

from __future__ import annotations

import copy

from torch import nn

__all__ = ["frozen_copy"]


def frozen_copy(module: nn.Module, *, evaluation: bool = True) -> nn.Module:
    """Return a copy in evaluation mode whose parameters take no gradient.

    Args:
        module: Any torch module.
        evaluation: If not, training mode and gradients stay as they are.

    Raises:
        ValueError: The module cannot be copied.

    Example:
        >>> from torch import nn
        >>> frozen_copy(nn.Linear(2, 2)).training
        False
    """
    try:
        own = copy.deepcopy(module)
    except Exception as error:  # whatever a module's own parts raise
        raise ValueError(
            f"{type(module).__name__} cannot be copied, and the original must stay unchanged: {error} If"
            " torch.nn.utils.prune masks it, make the zeros permanent with prune.remove."
        ) from error
    return own.eval().requires_grad_(False) if evaluation else own
