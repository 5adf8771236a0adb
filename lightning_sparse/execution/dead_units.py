"""Removes dead units before layers are made sparse: the only place of ``accelerate`` that knows of ``shrink``."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

from torch import nn

__all__ = ["can_shrink", "shrunk"]

MODULE = "lightning_sparse.execution.shrink"


def can_shrink() -> bool:
    """Say whether ``shrink`` is part of this installation."""
    return importlib.util.find_spec(MODULE) is not None


def shrunk(module: nn.Module, arguments: tuple[Any, ...]) -> nn.Module:
    """Return a frozen copy without dead units, or one as it was where none can be removed; nothing is told.

    Args:
        module: In evaluation mode.
        arguments: Of a call, by position.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = importlib.import_module(MODULE).shrink(module, arguments[0] if len(arguments) == 1 else arguments)
        return small.requires_grad_(False)
