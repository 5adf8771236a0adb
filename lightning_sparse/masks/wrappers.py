"""Wrappers around a module, whose names come before its own: in the module, in state dicts, in files of masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from lightning_sparse.masks.places import canonical_name

__all__ = ["as_named", "unwrapped"]

T = TypeVar("T")

# By the names of their classes, which belong to torch and Lightning: the attribute under which each holds the module.
_HELD_AS = {
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_forward_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
}
_LIBRARIES = ("torch", "lightning", "pytorch_lightning", "lightning_fabric")
_PREFIX = "module."


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, out of what ``torch.compile``, Fabric, DDP, DataParallel or AveragedModel have put around it.

    Raises:
        TypeError: It is not a module.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel
        >>> unwrapped(AveragedModel(nn.DataParallel(nn.Linear(2, 2))))
        Linear(in_features=2, out_features=2, bias=True)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"The module is a {type(module).__name__}; give a torch.nn.Module.")
    while held := _held_as(module):
        module = getattr(module, held)
    return module


def as_named(values: Mapping[str, T], names: Iterable[str] | None = None) -> dict[str, T]:
    """What a file says of each weight, under the names that the module has for them.

    ``module.`` is a wrapper's prefix where it is not the module's own: the names that are asked for decide, and where
    none are, that an :class:`~torch.optim.swa_utils.AveragedModel` counts its averages beside it.

    Args:
        values: By name, as in a file.
        names: Those of the module; None where it is not known.

    Example:
        >>> as_named({"module.fc.weight": 1}, names=["fc.weight"])
        {'fc.weight': 1}
        >>> as_named({"module.fc.weight": 1}, names=["module.fc.weight"])
        {'module.fc.weight': 1}
    """
    plain = {canonical_name(name): value for name, value in values.items()}
    if names is None:
        averaged = "n_averaged" in plain and all(name.startswith(_PREFIX) or name == "n_averaged" for name in plain)
        return _without_prefix(plain) if averaged else plain
    known = {*names}
    shorter = plain
    while known and not known & shorter.keys() and any(name.startswith(_PREFIX) for name in shorter):
        shorter = _without_prefix(shorter)
    return shorter if known & shorter.keys() else plain


def _held_as(module: nn.Module) -> str | None:
    for kind in type(module).__mro__:
        if kind.__name__ in _HELD_AS and kind.__module__.partition(".")[0] in _LIBRARIES:
            return _HELD_AS[kind.__name__]
    return None


def _without_prefix(values: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(_PREFIX): value for name, value in values.items()}
