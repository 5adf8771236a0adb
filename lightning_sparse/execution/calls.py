"""Checks that an accelerated module is called with arguments that fit its graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_sparse.execution.layers import InputSpec
from lightning_sparse.execution.tracing import is_constant

__all__ = ["as_traced"]


def as_traced(
    module: nn.Module, expected: Sequence[InputSpec | Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """Return the arguments of a call by position, as many as the example had.

    Args:
        module: What was accelerated.
        expected: What its example had, by position.
        args: What is given by position.
        kwargs: What is given by name.

    Raises:
        ValueError: The call is another than the example's: another argument is given than at its default, or a constant
            is another. A graph has but one way.
        TypeError: The module takes no such arguments.

    Example:
        >>> import torch
        >>> as_traced(nn.Linear(2, 1), [InputSpec((1, 2), torch.float32)], [], {"input": torch.zeros(3, 2)})
        [tensor([[0., 0.],
                [0., 0.],
                [0., 0.]])]
    """
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{type(module).__name__}.forward{signature} was called otherwise: {error}.") from error
    bound.apply_defaults()
    values = list(bound.arguments.items())
    for (name, value), example in zip(values, expected, strict=False):
        if isinstance(example, InputSpec):
            _refuse(module, name, value, "a tensor", isinstance(value, Tensor))
        elif is_constant(example):
            _refuse(module, name, value, repr(example), is_constant(value) and value == example)
    for name, value in values[len(expected) :]:
        default = signature.parameters[name].default
        _refuse(module, name, value, f"its default, {default!r}", value is default or _are_equal(value, default))
    return [value for _, value in values[: len(expected)]]


def _are_equal(value: Any, default: Any) -> bool:
    return type(value) is type(default) and isinstance(value, (bool, int, float, str)) and value == default


def _refuse(module: nn.Module, name: str, value: Any, expected: str, fits: bool) -> None:
    if not fits:
        given = repr(value) if is_constant(value) or isinstance(value, (int, float)) else f"a {type(value).__name__}"
        raise ValueError(
            f"{type(module).__name__} was accelerated for calls in which {name} is {expected}; it was given {given}."
            " Accelerate it with an example of such a call, or call the module itself."
        )
