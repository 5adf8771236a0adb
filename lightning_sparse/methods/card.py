"""Methods as dataclasses whose arguments are documented where they are defined, and shown in every method's card."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from typing_extensions import dataclass_transform

__all__ = ["doc", "method"]

Class = TypeVar("Class")

_SECTION = re.compile(r"^(Raises|Example|Examples|References|Warning|Note|Attributes):$", re.MULTILINE)
_WIDTH = 112


def doc(text: str, *, at_first: bool = False) -> Mapping[str, Any]:
    """The description of an argument, as ``metadata=`` of its :func:`dataclasses.field`.

    Args:
        text: The description.
        at_first: Whether the argument matters only when training begins, so that it may differ on resuming.
    """
    return {"doc": text, "at_first": at_first}


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(field,))
def method(cls: type[Class]) -> type[Class]:
    """Make a class a dataclass of keyword arguments, and write them into its docstring.

    A field's description is its ``metadata=doc("…")``. A subclass inherits fields with their descriptions and may give
    one another default. The section ``Args:`` comes before the sections that follow it in a Google-style docstring.

    Example:
        >>> from dataclasses import field
        >>> @method
        ... class Example:
        ...     '''What it does.'''
        ...     rate: float = field(default=0.5, metadata=doc("Share that is exchanged, in [0, 1]."))
        >>> print(Example.__doc__)
        What it does.
        <BLANKLINE>
        Args:
            rate: Share that is exchanged, in [0, 1].
    """
    made = dataclass(kw_only=True, eq=False, repr=False)(cls)
    arguments = [f"    {item.name}: {item.metadata['doc']}" for item in fields(made) if "doc" in item.metadata]  # type: ignore[arg-type]
    text = inspect.cleandoc(cls.__doc__ or "")
    section = _SECTION.search(text)
    before, after = (text[: section.start()], text[section.start() :]) if section else (text, "")
    made.__doc__ = "\n\n".join(part.rstrip() for part in (before, "\n".join(["Args:", *arguments]), after) if part)
    return made
