"""What arguments may be."""

from __future__ import annotations

from typing import get_args

__all__ = ["check_choice", "check_count"]


def check_choice(name: str, value: object, allowed: object) -> None:
    """Refuse a ``value`` that is none of the choices of ``allowed``, a ``Literal``.

    Raises:
        ValueError: It is none of them.

    Example:
        >>> from lightning_sparse.methods.scored import Allocation
        >>> check_choice("allocation", "erdos", Allocation)
        Traceback (most recent call last):
            ...
        ValueError: allocation is 'erdos'; it is one of 'global', 'uniform', 'er', 'erk'.
    """
    choices = get_args(allowed)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(map(repr, choices))}.")


def check_count(name: str, value: int) -> None:
    """Refuse a negative number of weights.

    Raises:
        ValueError: It is negative, or no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"{name} is {value!r}; give the number of weights that every layer keeps, an int of at least 0."
        )
