"""Which inputs sparse layers refuse: those that want a gradient, and tensors that are no plain piece of memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["refuse_gradients", "refuse_unreadable"]


def refuse_gradients(x: Tensor) -> None:
    """Raise where a gradient is asked for, which sparse kernels do not compute."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "The input requires a gradient, and sparse layers compute none. Call the module under torch.no_grad(), or"
            " train the original module."
        )


def refuse_unreadable(x: Tensor) -> None:
    """Raise in words where a kernel has failed on a tensor because it is not numbers in one piece of memory.

    Raises:
        ValueError: It is traced, nested, sparse, or stands for others, as in ``torch.func`` and ``torch.export``.

    Example:
        >>> refuse_unreadable(torch.eye(2))
        >>> refuse_unreadable(torch.eye(2).to_sparse())
        Traceback (most recent call last):
        ValueError: A sparse layer was given a tensor of the layout torch.sparse_coo, and reads plain tensors alone...
    """
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        what = "a tensor that torch.jit.trace follows"
    elif x.is_nested:
        what = "a nested tensor"
    elif x.layout is not torch.strided:
        what = f"a tensor of the layout {x.layout}"
    elif _is_symbol(x):
        what = f"a {type(x).__name__} without memory, as in torch.func, torch.export, fake and sharded tensors"
    else:
        return
    raise ValueError(
        f"A sparse layer was given {what}, and reads plain tensors alone. Call it with one; trace, export or transform"
        " the original module."
    )


def _is_symbol(x: Tensor) -> bool:
    """Whether a tensor has a shape and no memory."""
    try:
        return x.data_ptr() == 0 and x.numel() > 0
    except RuntimeError:
        return True
