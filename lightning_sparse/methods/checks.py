"""What arguments may be."""

from __future__ import annotations

import math
from typing import Any, get_args

from lightning_sparse.schedules import Constant, as_number, check_fraction

__all__ = ["check_choice", "check_count", "check_number", "check_sparsity", "check_steps", "check_strength"]


def check_choice(name: str, value: object, allowed: object) -> None:
    """Refuse a ``value`` that is none of the choices of ``allowed``, a ``Literal``.

    Raises:
        ValueError: It is none of them.

    Example:
        >>> from lightning_sparse.methods.scored import Allocation
        >>> check_choice("allocation", "erdos", Allocation)
        Traceback (most recent call last):
            ...
        ValueError: allocation is 'erdos'; give one of 'global', 'uniform', 'er', 'erk'.
    """
    choices = get_args(allowed)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; give one of {', '.join(map(repr, choices))}.")


def check_number(name: str, value: Any) -> float:
    """A number as a ``float``.

    Raises:
        ValueError: It is none, or not finite.

    Example:
        >>> check_number("initial", "-5")
        Traceback (most recent call last):
            ...
        ValueError: initial is '-5'; give a finite number.
    """
    plain = as_number(value)
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not math.isfinite(plain):
        raise ValueError(f"{name} is {value!r}; give a finite number.")
    return float(plain)


def check_strength(name: str, value: Any) -> float:
    """A number of at least 0 as a ``float``.

    Raises:
        ValueError: It is none, negative or not finite.

    Example:
        >>> check_strength("decay", -1)
        Traceback (most recent call last):
            ...
        ValueError: decay is -1; give a number of at least 0.
    """
    number = check_number(name, value)
    if number < 0.0:
        raise ValueError(f"{name} is {value!r}; give a number of at least 0.")
    return number


def check_sparsity(name: str, value: Any) -> float:
    """A sparsity that stays as it is, as a ``float``.

    Raises:
        ValueError: It is no number in [0, 1).

    Example:
        >>> check_sparsity("backward_sparsity", 0.5)
        0.5
    """
    constant = Constant(check_number(name, value))
    check_fraction(name, constant, below_one=True)
    return float(constant.value)


def check_count(name: str, value: int) -> None:
    """Refuse a negative number of weights.

    Raises:
        ValueError: It is negative, or no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"{name} is {value!r}; give the number of weights that every layer keeps, an int of at least 0."
        )


def check_steps(name: str, value: int) -> None:
    """Refuse what is no number of steps.

    Raises:
        ValueError: It is below 1, or no whole number.

    Example:
        >>> check_steps("update_every", 0.5)
        Traceback (most recent call last):
            ...
        ValueError: update_every is 0.5; give a number of steps, an int of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; give a number of steps, an int of at least 1.")
