"""Weights that are ranked together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparse.functional import selection
from lightning_sparse.functional.held import Held
from lightning_sparse.functional.masks import counts_true, on_cpu
from lightning_sparse.functional.selection import Key, Scores
from lightning_sparse.functional.spread import smallest_of_spread
from lightning_sparse.masks.candidate import Candidate
from lightning_sparse.masks.layout import local_part
from lightning_sparse.masks.sums import side_by_side_if, sum_over_processes
from lightning_sparse.masks.weight import MaskedWeight

__all__ = ["MaskPool"]

T = TypeVar("T")


class MaskPool(Sequence[MaskedWeight]):
    """Weights that are ranked together, and their masks. At first, all weights are active.

    Args:
        candidates: The weights, on one device.

    Attributes:
        mask: The masks of all weights in one flat ``bool`` tensor; each weight's mask is a view of it.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        sizes = [local_part(candidate.parameter).numel() for candidate in candidates]
        self.mask = torch.ones(sum(sizes), dtype=torch.bool, device=_device_of([c.parameter for c in candidates]))
        parts = self.mask.split(sizes)
        self._weights = [MaskedWeight(candidate, part) for candidate, part in zip(candidates, parts, strict=True)]

    def lay_masks(self) -> None:
        """Move all masks to new memory, on the weights' current device and in their current memory order."""
        sizes = [weight.mask.numel() for weight in self]
        device = _device_of([weight.parameter for weight in self])
        self.mask = torch.empty(sum(sizes), dtype=torch.bool, device=device)
        for weight, part in zip(self, self.mask.split(sizes), strict=True):
            weight.lay_mask(part)

    def __getitem__(self, index: int) -> MaskedWeight:  # type: ignore[override]
        return self._weights[index]

    def __iter__(self) -> Iterator[MaskedWeight]:
        return iter(self._weights)  # Sequence's own asks __getitem__ for each, several times in every step

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def numel(self) -> int:
        """Number of weights, pruned ones included."""
        return sum(weight.numel for weight in self)

    @property
    def unshared_numel(self) -> int:
        """Number of weights if each use of a shared weight had a copy of its own; budgets count these."""
        return sum(weight.unshared_numel for weight in self)

    @property
    def num_active(self) -> int:
        """Active weights, as counted at the last update."""
        return sum(weight.num_active for weight in self)

    @property
    def is_spread(self) -> bool:
        """Whether some of the weights are sharded."""
        return any(not weight.layout.is_whole for weight in self)

    def each(self, call: Callable[..., T], *values: Iterable[Any]) -> list[T]:
        """Return what ``call`` returns for each weight and its values.

        If weights are sharded, the calls run side by side, and their messages to the other processes travel together.
        Use this method wherever a call for one weight ranks or counts its entries.
        """
        return side_by_side_if(self.is_spread, [partial(call, *its) for its in zip(self, *values, strict=True)])

    # Ranking and counting entries.

    def smallest(self, scores: Scores, k: int, among: Tensor, key: Key | None = None) -> Tensor:
        """The flat mask of the ``k`` smallest scores of all weights together; see :meth:`MaskedWeight.smallest`.

        Args:
            scores: One tensor for each weight, in the order of :meth:`flat`.
            k: How many entries to choose, of all weights together.
            among: ``bool``, flat: the entries that may be chosen.
            key: What to compare instead of the scores.
        """
        if not self.is_spread:
            return selection.smallest(scores, k, among, key)
        sizes = [weight.mask.numel() for weight in self]
        parts = scores.split(sizes) if isinstance(scores, Tensor) else scores
        starts = accumulate((weight.numel for weight in self), initial=0)
        held = [
            Held(part, _places_of(weight, start), weight.layout.owned)
            for weight, part, start in zip(self, parts, starts, strict=False)
        ]
        return smallest_of_spread(held, k, among, self.numel, sum_over_processes, key)

    def count(self, flat_mask: Tensor) -> int:
        """Count the ``True`` entries of the whole, given a flat local mask in the order of :attr:`mask`.

        A collective if weights are sharded.
        """
        return (
            sum(self.counts(flat_mask.split([weight.mask.numel() for weight in self])))
            if self.is_spread
            else (counts_true([flat_mask])[0])
        )

    def counts(self, masks: Sequence[Tensor]) -> list[int]:
        """Count the ``True`` entries of each whole mask, given one local mask for each weight.

        A collective if weights are sharded. Takes one transfer from a device that is not the CPU.
        """
        if not self.is_spread:
            return counts_true(masks)
        # Only its owner counts an entry, even in weights that every process holds whole.
        own = zip(self, masks, strict=True)
        counts = torch.stack([_count(mask) * weight.layout.owned for weight, mask in own])
        return sum_over_processes(counts).tolist()  # type: ignore[no-any-return]

    # The order of entries.

    def flat(self, what: Callable[[MaskedWeight], Tensor]) -> list[Tensor]:
        """Flatten ``what(weight)``, shaped like the weight, of each weight, in the order of :attr:`mask`; no copies."""
        return [weight.flatten(what(weight)) for weight in self]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join one tensor for each weight, shaped like it, into one flat tensor in the order of :attr:`mask`."""
        return torch.cat([weight.flatten(tensor) for weight, tensor in zip(self, tensors, strict=True)])

    def split(self, flat: Tensor) -> list[Tensor]:
        """Split a flat tensor in the order of :attr:`mask` into one view for each weight, shaped like it."""
        parts = flat.split([weight.mask.numel() for weight in self])
        return [weight.unflatten(part) for weight, part in zip(self, parts, strict=True)]

    # Applying masks.

    def recount(self) -> None:
        """Count the active weights again; takes one transfer from a device that is not the CPU."""
        for weight, num_active in zip(self, self.counts([weight.mask for weight in self]), strict=True):
            weight.recount(num_active)

    def apply_(self) -> None:
        """Zero the pruned weights."""
        for weight in self:
            weight.apply_()


def _count(mask: Tensor) -> Tensor:
    """The number of ``True`` entries, as a tensor on the mask's device."""
    return torch.tensor(counts_true([mask])[0]) if on_cpu(mask) else mask.count_nonzero()


def _places_of(weight: MaskedWeight, start: int) -> Callable[[Tensor], Tensor]:
    """Map places in a weight's flat mask to places among all whole weights, where this one begins at ``start``."""
    if weight.mask.is_contiguous():
        return lambda at: weight.layout.place_of(at) + start

    def places(at: Tensor) -> Tensor:
        logical = torch.arange(weight.mask.numel(), device=at.device).view(weight.mask.shape)
        return weight.layout.place_of(weight.flatten(logical)[at]) + start

    return places


def _device_of(parameters: Sequence[nn.Parameter]) -> torch.device:
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        raise MisconfigurationException(
            f"The weights of one optimizer lie on {', '.join(sorted(map(str, devices)))}, and masks are ranked on"
            " one device. Use one optimizer, and one method with include=, for each device."
        )
    return devices.pop()
