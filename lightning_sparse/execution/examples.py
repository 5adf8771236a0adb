"""Examples: what a module is called with, and what is said where it does not take that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

from torch import Tensor, nn

__all__ = ["Call", "arguments_of", "unfit"]


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


@final
@dataclass(frozen=True)
class Call:
    """The arguments of a call, by place and by name.

    Example:
        >>> import torch
        >>> Call.of([torch.zeros(2, 3), 4]).shapes
        [(2, 3)]
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, example: Any) -> Call:
        """Read an example; see :func:`arguments_of`.

        Raises:
            ValueError: It has no tensor, a nested one, or no numbers.
        """
        call = cls(*arguments_of(example))
        if not call.kwargs and not any(isinstance(value, Tensor) for value in call.args):
            raise ValueError(
                f"example_input is {type(example).__name__}; give a tensor, a tuple of arguments, or a mapping of"
                " keyword arguments, as the module is called."
            )
        if any(x.is_nested for x in call.tensors):
            raise ValueError("example_input is nested; give a plain tensor, as torch.nested.to_padded_tensor makes.")
        if call.numel == 0:
            raise ValueError(f"example_input is empty, of shapes {call.shapes}; nothing can be timed on it.")
        return replace(call, args=tuple(x.detach() if isinstance(x, Tensor) else x for x in call.args))

    def __call__(self, module: nn.Module) -> Any:
        """Call the module."""
        return module(*self.args, **self.kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """The arguments that are tensors."""
        return [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]

    @property
    def numel(self) -> int | None:
        """How many numbers the tensors have; ``None`` if there is no tensor."""
        return sum(x.numel() for x in self.tensors) if self.tensors else None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the tensors."""
        return [tuple(x.shape) for x in self.tensors]


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
