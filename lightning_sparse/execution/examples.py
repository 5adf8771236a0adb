"""Examples: what a module is called with, and what is said where it does not take that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

__all__ = ["arguments_of", "unfit"]


def arguments_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by place and by name.

    Args:
        example: One argument, a tuple or list of arguments, or a mapping of them by name, as Lightning reads a module's
            ``example_input_array``. A list that is itself an argument stands in a tuple: ``([first, second],)``.

    Example:
        >>> arguments_of({"x": 1})
        ((), {'x': 1})
        >>> arguments_of([1, 2])
        ((1, 2), {})
    """
    if isinstance(example, Mapping):
        return (), dict(cast("Mapping[str, Any]", example))
    return (tuple(cast("Sequence[Any]", example)) if isinstance(example, tuple | list) else (example,)), {}


def unfit(module: nn.Module, example: Any, error: Exception) -> ValueError:
    """What to raise where a module has failed on an example.

    Args:
        module: What was called.
        example: What it was called with; see :func:`arguments_of`.
        error: What the call has raised.

    Example:
        >>> import torch
        >>> raise unfit(nn.Linear(2, 1), torch.ones(4, 3), RuntimeError("shapes cannot be multiplied"))
        Traceback (most recent call last):
        ValueError: Linear does not take the example, of shapes (4, 3): shapes cannot be multiplied. Give one tensor,...
    """
    args, kwargs = arguments_of(example)
    shapes = ", ".join(str(tuple(x.shape)) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)) or "none"
    return ValueError(
        f"{type(module).__name__} does not take the example, of shapes {shapes}: {str(error).rstrip('. ')}. Give one"
        " tensor, a tuple of arguments, or a dictionary of them by name, as the module is called."
    )
