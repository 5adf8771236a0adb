"""Averaged copies of the weights (EMA, SWA): they are kept sparse too, whenever they are evaluated or saved.

Known averages are masked at every change of the masks; in between, an average of zeros stays zero. Other modules with
parameters of the same names and shapes may be the user's own averages, or a teacher that does not change. They are
masked once training writes to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_sparse.functional.hashing import content_hash
from lightning_sparse.functional.masks import zero_pruned_
from lightning_sparse.masks.layout import local_part
from lightning_sparse.masks.plan import canonical_name
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.trainer import callbacks_of

__all__ = ["Averages"]

_SAMPLE = 64  # entries of a copy at which a quick look looks
_OF_EVERY_MODULE = frozenset(vars(pl.LightningModule()))
_MOST = 100  # entries of a container in which copies are looked for
_HOLD_NOTHING = frozenset({type(None), bool, int, float, str})


@dataclass
class _Copy:
    """A module that holds copies of masked weights.

    Attributes:
        module: The module. Its parameters are looked up each time, because an average may replace them.
        names: Its own name of each copy, by that of the masked weight.
        before: A hash of each when it was first seen; None once it is known to be an average.
        sample: A few entries of each at that time.
    """

    module: nn.Module
    names: Mapping[str, str]
    before: Mapping[str, int] | None
    sample: Mapping[str, Tensor]

    @classmethod
    def of(cls, module: nn.Module, names: Mapping[str, str], known: bool) -> _Copy:
        """A copy that is seen for the first time, and whether it is known to be an average."""
        copy = cls(module, names, None, {})
        if not known:
            copy.before = {name: _hash(value) for name, value in copy.parameters().items()}
            copy.sample = {name: _some(value).clone() for name, value in copy.parameters().items()}
        return copy

    def parameters(self) -> dict[str, nn.Parameter]:
        """The copies that are there now, by the name of the masked weight."""
        found: dict[str, nn.Parameter] = {}
        for name, own in self.names.items():
            with suppress(AttributeError):  # it has been taken out since
                found[name] = self.module.get_parameter(own)
        return found

    def has_moved(self) -> bool:
        """Whether training writes to a copy that was not known to be an average: a quick look."""
        if self.before is None:
            return False
        if all(torch.equal(_some(value), self.sample[name]) for name, value in self.parameters().items()):
            return False
        self.before = None
        return True

    def is_average(self) -> bool:
        """Whether training writes to it."""
        before = self.before
        if before is not None and any(_hash(value) != before[name] for name, value in self.parameters().items()):
            self.before = None
        return self.before is None

    def apply_(self, weights: Sequence[MaskedWeight]) -> None:
        """Zero the pruned weights in it."""
        parameters = self.parameters()
        for weight in weights:
            value = parameters.get(weight.name)
            if value is not None and value.shape == weight.shape:
                zero_pruned_(local_part(value), weight.mask.to(value.device))


@final
class Averages:
    """The averaged copies of a module in training."""

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}
        self._beside: frozenset[int] = frozenset()

    def notice(self, trainer: pl.Trainer, module: nn.Module, weights: Sequence[MaskedWeight]) -> None:
        """Before a step, quickly: find new copies, and mask those that are seen to be averages.

        Were they found where one validates or saves alone, how often one does so would change them.
        """
        if _quickly_beside(trainer, module) != self._beside:
            self.look(trainer, module, weights)
        for copy in self._copies.values():
            if copy.has_moved():
                copy.apply_(weights)

    @torch.no_grad()
    def look(self, trainer: pl.Trainer, module: nn.Module, weights: Sequence[MaskedWeight]) -> None:
        """Find copies that have come since the last look, and forget those that are gone."""
        names = {weight.name: weight for weight in weights}
        prefixes = _prefixes(names)
        stepped = {
            id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        copies: dict[int, _Copy] = {}
        within: set[int] = set()  # what lies in a copy is no copy of its own
        for copy, known in _modules_beside(trainer, module):
            if id(copy) in within or any(id(parameter) in stepped for parameter in copy.parameters()):
                continue
            found = _matching(copy, prefixes, names)
            if found:
                within.update(map(id, copy.modules()))
                earlier = self._copies.get(id(copy))
                same = earlier is not None and earlier.names == found
                copies[id(copy)] = earlier if earlier is not None and same else _Copy.of(copy, found, known)
        self._copies, self._beside = copies, _quickly_beside(trainer, module)

    @torch.no_grad()
    def apply_(self, weights: Sequence[MaskedWeight]) -> None:
        """Zero the pruned weights in every copy that is an average."""
        for copy in self._copies.values():
            if copy.is_average():
                copy.apply_(weights)


def _modules_beside(trainer: pl.Trainer, module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Modules that may be copies, and whether they are known to be averages."""
    for callback in callbacks_of(trainer):
        # Lightning's averaging callbacks keep their copy under this name.
        known = getattr(callback, "_average_model", None)
        for copy in _modules_in(vars(callback).values()):
            for part in copy.modules() if copy is not module else ():
                yield _inside(part), part is known or isinstance(part, AveragedModel)
    for copy in _modules_in(_of_its_user(module)):
        for part in copy.modules() if copy is not module else ():
            yield _inside(part), isinstance(part, AveragedModel)
    for name, child in module.named_modules():
        if name:
            yield _inside(child), isinstance(child, AveragedModel)


def _quickly_beside(trainer: pl.Trainer, module: nn.Module) -> frozenset[int]:
    """What modules there are in callbacks and at the top of the module."""
    held = (id(copy) for callback in callbacks_of(trainer) for copy in _modules_in(vars(callback).values()))
    own = map(id, _modules_in(_of_its_user(module)))
    return frozenset(held) | frozenset(own) | frozenset(map(id, module.children()))


def _of_its_user(module: nn.Module) -> list[Any]:
    """What a module has besides that of every module: an average in a plain object, as timm's ModelEma, lies there."""
    return [value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]


def _modules_in(values: Iterable[Any], depth: int = 2) -> Iterator[nn.Module]:
    """The modules among attributes, in containers, and in plain objects that hold one, as timm's ModelEma does."""
    for value in values:
        if type(value) in _HOLD_NOTHING:
            continue
        if isinstance(value, nn.Module):
            yield value
        elif depth and isinstance(value, Mapping | list | tuple):
            # A callback may keep something of each step, and this is looked at in each: long containers hold no copies.
            entries = value.values() if isinstance(value, Mapping) else value
            yield from _modules_in(islice(entries, _MOST), depth - 1)
        elif depth and isinstance(getattr(value, "module", None), nn.Module):
            yield value.module


def _inside(copy: nn.Module) -> nn.Module:
    return copy.module if isinstance(copy, AveragedModel) else copy


def _prefixes(names: Mapping[str, MaskedWeight]) -> dict[str, list[str]]:
    """The masked weights in each part of the module, by the part's name with a dot; the widest part comes first."""
    parts: dict[str, list[str]] = {}
    for name in names:
        path = name.split(".")
        for depth in range(len(path)):
            parts.setdefault("".join(f"{part}." for part in path[:depth]), []).append(name)
    # One weight alone says too little: many layers have a weight of its shape.
    telling = {prefix: inside for prefix, inside in parts.items() if len(inside) > 1 or len(names) == 1}
    return dict(sorted(telling.items(), key=lambda item: -len(item[1])))


def _matching(
    copy: nn.Module, prefixes: Mapping[str, Sequence[str]], names: Mapping[str, MaskedWeight]
) -> dict[str, str]:
    """The names in ``copy`` of its copies of masked weights; empty where it is no copy of a part."""
    own = {canonical_name(name): (name, value) for name, value in copy.named_parameters()}
    for prefix, inside in prefixes.items() if own else ():
        pairs = {name: own.get(name.removeprefix(prefix)) for name in inside}
        if all(pair is not None and _is_copy(pair[1], names[name]) for name, pair in pairs.items()):
            return {name: pair[0] for name, pair in pairs.items() if pair is not None}
    return {}


def _is_copy(value: nn.Parameter, weight: MaskedWeight) -> bool:
    return value.shape == weight.shape and value is not weight.parameter


def _hash(value: Tensor) -> int:
    return int(content_hash(local_part(value)))


def _some(value: Tensor) -> Tensor:
    """A few entries, spread over a tensor."""
    value = local_part(value)
    flat = value.reshape(-1) if value.is_contiguous() else value.flatten()
    return flat[:: max(1, flat.numel() // _SAMPLE)]
