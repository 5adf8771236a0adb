"""A method's settings as text in its checkpoints, and what differs in them when training is resumed."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_sparse.methods.interface import Method, without_addresses
from lightning_sparse.schedules import Timetable

__all__ = ["changes_since", "settings_of"]

_IN_THE_KEY = {"include", "exclude"}  # of the state: other patterns never find it
_LONGEST = 200


def settings_of(method: Method) -> dict[str, Any]:
    """The arguments of ``method`` as text, and the number of steps of its training; ``None`` if it has no known end."""
    names = [
        item.name
        for item in dataclasses.fields(method)
        if item.name not in _IN_THE_KEY and not item.metadata.get("at_first")
    ]
    total = method.run.total_steps
    return {
        "settings": {name: _in_brief(getattr(method, name)) for name in names},
        "total_steps": int(total) if math.isfinite(total) else None,
    }


def changes_since(method: Method, state: Mapping[str, Any]) -> list[str]:
    """The settings that differ from those in ``state``, each with its old value.

    The number of steps is compared only if the method depends on it. Older states lack these fields; then nothing
    differs.
    """
    now = settings_of(method)
    before = state.get("settings", {})
    changes = [
        f"{name}={its} (was {before[name]})" for name, its in now["settings"].items() if its != before.get(name, its)
    ]
    total, was = now["total_steps"], state.get("total_steps", now["total_steps"])
    if total != was and (_times(method, total) != _times(method, was) or _steers(method)):
        changes.append(f"{_count(total)} steps of training (was {_count(was)})")
    return changes


def _times(method: Method, total: int | None) -> Timetable | str | None:
    """When ``method`` updates its masks in a training of so many steps, or why it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # begin has warned of the times that are used
            return method.timetable(math.inf if total is None else total)
    except ValueError as error:
        return str(error)


def _steers(method: Method) -> bool:
    """Whether ``method`` acts at every step and depends on how far training is, as DST with a sparsity does."""
    return method.run.timetable is None and _times(method, None) is not None


def _in_brief(value: Any) -> str:
    """A setting as text that is the same in every process; the name of its type if it has no such text."""
    if isinstance(value, Tensor | Mapping | pl.Callback) or type(value).__repr__ is object.__repr__:
        return type(value).__name__
    return without_addresses(repr(value))[:_LONGEST]


def _count(steps: int | None) -> str:
    return "endless" if steps is None else f"{steps:,}"
