"""Checks of the fields of a saved state: a check returns what is wrong with a value, or an empty string.

States come from files, which may be damaged, cut short or written by hand. So a check never trusts a type, and never
allocates as much memory as a tensor claims to need. It returns the end of a sentence that begins with the field's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse.functional.masks import check_packed
from lightning_sparse.functional.stored import obstacle
from lightning_sparse.masks.places import printable

__all__ = [
    "LARGEST_STEP",
    "Check",
    "any_of",
    "anything",
    "bits",
    "check_fields",
    "list_of",
    "mapping_of",
    "names",
    "nan",
    "nothing",
    "number",
    "packed_mask",
    "record",
    "refuse",
    "shape_of",
    "tensor",
    "text",
    "whole",
    "wrong_names",
]

Check = Callable[[Any], str]
"""Returns what is wrong with a value, as the end of a sentence; an empty string if nothing is."""

LARGEST_STEP = 10**10
"""No training takes more steps: at a thousand steps a second, so many take four months."""


def check_fields(state: Any, fields: Mapping[str, Check], whose: str, *, closed: bool = True) -> None:
    """Refuse a state that lacks a field, has an unknown field, or has a field with a wrong value.

    Args:
        state: What a checkpoint holds.
        fields: The check of each field.
        whose: The subject of the message.
        closed: Whether to refuse other fields.

    Raises:
        MisconfigurationException: The state is refused. The message names the field, its value and the allowed ones.

    Example:
        >>> check_fields({"step": -7}, {"step": whole()}, "The checkpoint's state of GMP")
        Traceback (most recent call last):
            ...
        lightning.fabric.utilities.exceptions.MisconfigurationException: The checkpoint's state of GMP is damaged:
        step is -7, not a whole number from 0 to 10,000,000,000. Resume from an earlier checkpoint.
    """
    if isinstance(state, Mapping) and (missing := sorted(fields.keys() - state.keys())):
        refuse(f"{whose} is cut short: it lacks {', '.join(missing)}")
    if fault := record(fields, closed=closed)(state):
        refuse(f"{whose} is damaged: {fault.removeprefix(': ')}")


def refuse(fault: str) -> None:
    """Refuse to resume from a checkpoint.

    Raises:
        MisconfigurationException: Always.
    """
    raise MisconfigurationException(f"{fault}. Resume from an earlier checkpoint.")


def whole(low: int = 0, high: int = LARGEST_STEP) -> Check:
    """A whole number in a range, both ends included.

    Example:
        >>> whole(0, 9)(True)
        'is True, not a whole number from 0 to 9'
    """

    def check(value: Any) -> str:
        right = type(value) is int and low <= value <= high
        return "" if right else f"is {_shown(value)}, not a whole number from {low:,} to {high:,}"

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number in a range, both ends included.

    Example:
        >>> number(0.0, 1.0)(float("nan"))
        'is nan, not a number from 0 to 1'
    """

    def check(value: Any) -> str:
        right = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
        return "" if right else f"is {_shown(value)}, not a number from {low:g} to {high:g}"

    return check


def names(value: Any) -> str:
    """A list of different names.

    Example:
        >>> names(["fc.weight", 3])
        'is a list with 3 in it, not a list of names'
    """
    if not isinstance(value, list | tuple):
        return f"is {_shown(value)}, not a list of names"
    wrong = [each for each in value if not isinstance(each, str)]
    if wrong:
        return f"is a list with {_shown(wrong[0])} in it, not a list of names"
    return "" if len({*value}) == len(value) else "names something twice"


def text(value: Any) -> str:
    """A text.

    Example:
        >>> text(3)
        'is 3, not a text'
    """
    return "" if isinstance(value, str) else f"is {_shown(value)}, not a text"


def nothing(value: Any) -> str:
    """None, and nothing else.

    Example:
        >>> nothing(None)
        ''
    """
    return "" if value is None else f"is {_shown(value)}, not None"


def anything(value: Any) -> str:
    """Any value."""
    del value
    return ""


def nan(value: Any) -> str:
    """NaN, which stands for a missing number.

    Example:
        >>> nan(float("nan"))
        ''
    """
    return "" if isinstance(value, float) and math.isnan(value) else f"is {_shown(value)}, not NaN"


def any_of(*checks: Check) -> Check:
    """What at least one of several checks allows. If none does, the fault is that of the last check.

    Example:
        >>> any_of(nothing, whole(0, 9))(None)
        ''
    """

    def check(value: Any) -> str:
        faults = [each(value) for each in checks]
        return faults[-1] if all(faults) else ""

    return check


def list_of(item: Check) -> Check:
    """A list whose entries all pass a check.

    Example:
        >>> list_of(whole(0, 9))([3, 10])
        'at 1 is 10, not a whole number from 0 to 9'
    """

    def check(value: Any) -> str:
        if not isinstance(value, list | tuple):
            return f"is {_shown(value)}, not a list"
        return next((f"at {place} {fault}" for place, each in enumerate(value) if (fault := item(each))), "")

    return check


def mapping_of(item: Check) -> Check:
    """A mapping from names to values that all pass a check.

    Example:
        >>> mapping_of(whole(0, 9))({"fc.weight": -1})
        'of fc.weight is -1, not a whole number from 0 to 9'
    """

    def check(value: Any) -> str:
        if not isinstance(value, Mapping):
            return f"is {_shown(value)}, not a mapping"
        for name, each in value.items():
            if not isinstance(name, str):
                return f"has the name {_shown(name)}, which is not a name"
            if fault := item(each):
                return f"of {printable(name)}{fault if fault.startswith(':') else f' {fault}'}"
        return ""

    return check


def record(fields: Mapping[str, Check], *, closed: bool = True) -> Check:
    """A mapping with these fields, and no others if ``closed``.

    Example:
        >>> record({"step": whole(0, 9)})({"step": 3, "stop": 4})
        ': stop is an unknown field'
    """

    def check(value: Any) -> str:
        if not isinstance(value, Mapping):
            return f"is {_shown(value)}, not a mapping"
        if missing := sorted(fields.keys() - value.keys()):
            return f": it lacks {', '.join(missing)}"
        if closed and (extra := [key for key in value if key not in fields]):
            return f": {_shown(extra[0]).strip(chr(39))} is an unknown field"
        found = ((name, fields[name](value[name])) for name in fields)
        return next((f": {name}{fault if fault[0] == ':' else f' {fault}'}" for name, fault in found if fault), "")

    return check


def tensor(*, dims: int | None = None, floating: bool = True) -> Check:
    """A tensor whose entries are all stored and, in floating point, finite.

    Example:
        >>> tensor()(torch.tensor([0.0, float("inf")]))
        'has entries that are inf or NaN: it is damaged, or training had diverged'
    """

    def check(value: Any) -> str:
        if not isinstance(value, Tensor):
            return f"is {_shown(value)}, not a tensor"
        if fault := obstacle(value):
            return fault.partition(";")[0]
        if dims is not None and value.dim() != dims:
            return f"has {value.dim()} dimensions, not {dims}"
        if floating and not value.is_floating_point():
            return f"is of {value.dtype}, not of floating point"
        finite = not value.is_floating_point() or bool(torch.isfinite(value).all())
        return "" if finite else "has entries that are inf or NaN: it is damaged, or training had diverged"

    return check


def bits(value: Any) -> str:
    """The bits of a packed mask of any shape."""
    if fault := tensor(dims=1, floating=False)(value):
        return fault
    return "" if value.dtype == torch.uint8 else f"is of {value.dtype}, not of torch.uint8"


def shape_of(value: Any) -> str:
    """The shape of a tensor."""
    return list_of(whole(0, 1 << 48))(value)


def packed_mask(others: Mapping[str, Check]) -> Check:
    """A packed mask with its shape, and the fields ``others``."""
    fields = {"shape": shape_of, "bits": bits, **others}

    def check(value: Any) -> str:
        if fault := record(fields)(value):
            return fault
        try:
            check_packed(value["bits"], value["shape"])
        except ValueError as error:
            return f"cannot be read: {str(error).rstrip('.')}"
        return ""

    return check


def wrong_names(found: Collection[str], expected: Collection[str]) -> str:
    """How the names of a state differ from the expected ones; empty if they are the same.

    Example:
        >>> wrong_names({"fc.weight"}, {"head.weight"})
        'lacks head.weight'
    """
    for verb, rest in (("lacks", {*expected} - {*found}), ("has", {*found} - {*expected})):
        if rest:
            return f"{verb} {', '.join(map(printable, sorted(rest)))}"
    return ""


def _shown(value: Any) -> str:
    """A value in a message: short, and without control characters."""
    if value is None or isinstance(value, str | int | float):
        return printable(repr(value)[:60])
    return f"a {type(value).__name__}"
