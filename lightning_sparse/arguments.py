"""What arguments may be, of whatever type they come: refused when they are given, and not when they are used."""

from __future__ import annotations

from typing import Any

from lightning_sparse.schedules import as_number

__all__ = ["check_flag", "check_globs", "check_whole"]


def check_flag(name: str, value: object) -> bool:
    """The flag as Python's own ``bool``; numpy's is accepted too.

    Raises:
        ValueError: It is none.
    """
    plain = as_number(value)
    if not isinstance(plain, bool):
        raise ValueError(f"{name} is {value!r}; give True or False.")
    return plain


def check_globs(name: str, value: object) -> tuple[str, ...] | None:
    """A list of globs, or None for no choice.

    Raises:
        ValueError: It is no list of strings.

    Example:
        >>> check_globs("include", "relu1")
        Traceback (most recent call last):
            ...
        ValueError: include is 'relu1'; give a list of strings, such as ['relu1'], or None.
    """
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(glob, str) for glob in value):
        example = f", such as [{value!r}]," if isinstance(value, str) else ""
        raise ValueError(f"{name} is {value!r}; give a list of strings{example} or None.")
    return tuple(value)


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least ``least``, as Python's own ``int``; numpy's is accepted too.

    Raises:
        ValueError: It is none.

    Example:
        >>> check_whole("own", 2.5)
        Traceback (most recent call last):
            ...
        ValueError: own is 2.5; give an int of at least 1.
    """
    plain = as_number(value)
    if isinstance(plain, bool) or not isinstance(plain, int) or plain < least:
        raise ValueError(f"{name} is {value!r}; give an int of at least {least}.")
    return plain
