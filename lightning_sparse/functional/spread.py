r"""Selection among entries that are spread over processes: counts travel, scores do not.

A float's bits, read as an integer, lie in the order of the floats. The k-th smallest key is found eight bits at a time:
each process counts its keys by those bits, the counts are summed over all processes, and the bucket that holds the k-th
is opened. Entries with that very key are taken in the order of their places in the whole, which are found in the same
way. Every process decides by the same sums, so all choose alike.

On a CPU the same rounds over a sample bracket the k-th key first, so that one pass over the entries compares floats and
only the few inside the bracket become integers. On other devices no result is waited for.

The sum over processes is given: nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.functional import masks
from lightning_sparse.functional.held import BITS, BUCKETS, SINGLE, Held, Sum, counter_type, shifts, width_of
from lightning_sparse.functional.masks import count_true
from lightning_sparse.functional.selection import Key, in_pieces, keys_of
from lightning_sparse.functional.spread_on_device import without_looking

__all__ = ["smallest_of_spread"]

_Array: TypeAlias = np.ndarray[Any, Any]

# From how many entries of the whole on a sample comes first, and how many are looked at.
_LARGE = 1 << 15
_SAMPLE = 1 << 15
# Where at most one of so many is eligible here, the eligible are gathered.
_FEW = 16
# How many digits of the keys in the sample are looked at, by the width of the keys: a float64 has a longer exponent.
_LEVELS = {32: 2, 64: 3}


def smallest_of_spread(
    parts: Sequence[Held], k: int, among: Tensor, numel: int, sum_: Sum, key: Key | None = None
) -> Tensor:
    """The mask of the ``k`` smallest scores of the whole, of what this process holds.

    It is this process' part of what :func:`~lightning_sparse.functional.smallest` chooses of the whole. Every process
    calls it with the same ``k`` and ``numel``, one that holds nothing too.

    Args:
        parts: What is held here, ranked together.
        k: How many of the whole to choose, at least 0.
        among: ``bool``, flat, over all parts: the entries that may be chosen.
        numel: Number of entries of the whole.
        sum_: Adds up counts, ``int32`` or ``int64`` of one dimension, on the device of ``among``.
        key: What is compared instead of the scores, entry by entry.

    Returns:
        ``bool``, flat, over all parts.

    Raises:
        ValueError: Fewer than ``k`` entries of the whole are eligible, or ``k`` is negative. Not on a GPU, as there.

    Example:
        >>> scores = torch.tensor([3.0, 1.0, 2.0, 1.0])
        >>> held = Held(scores, places=lambda places: places)
        >>> smallest_of_spread([held], 2, torch.ones(4, dtype=torch.bool), 4, sum_=lambda counts: counts)
        tensor([False,  True, False,  True])
    """
    if k < 0:
        raise ValueError(f"Cannot choose {k} entries; k must be at least 0.")
    if k == 0:
        return torch.zeros_like(among)
    if not masks.on_cpu(among):
        return without_looking(parts, k, among, numel, sum_, key)
    if count_true(among) * _FEW > len(among):
        return _OnCPU(parts, among, numel, sum_, key).smallest(k)
    where = torch.from_numpy(np.flatnonzero(among.numpy()))  # torch takes four times as long
    few = [_gathered(part, here) for part, here in _divided(parts, where)]
    chosen = torch.zeros_like(among)
    chosen[where] = _OnCPU(few, among[where], numel, sum_, key).smallest(k)
    return chosen


def _gathered(part: Held, here: Tensor) -> Held:
    """Some entries of a part."""
    return Held(part.scores.detach()[here], lambda at: part.places(here[at]), part.owned)


def _divided(parts: Sequence[Held], at: Tensor) -> list[tuple[Held, Tensor]]:
    """Rising places here, as those in each part."""
    starts = torch.tensor([0, *accumulate(len(part.scores) for part in parts)])
    bounds = torch.searchsorted(at, starts).tolist()
    pairs = zip(parts, starts.tolist(), pairwise(bounds), strict=False)
    return [(part, at[first:last] - start) for part, start, (first, last) in pairs]


class _OnCPU:
    """One selection on a CPU."""

    def __init__(self, parts: Sequence[Held], among: Tensor, numel: int, sum_: Sum, key: Key | None) -> None:
        self.parts, self.numel, self.key, self.sum_ = parts, numel, key, sum_
        self.among = among.numpy()
        self.starts: list[int] = np.cumsum([0, *(len(part.scores) for part in parts)])[:-1].tolist()
        self.counted = self._counted()
        self.counter = counter_type(numel)
        self.width = width_of(parts)
        self.floating = np.float32 if self.width == 8 * SINGLE else np.float64

    def smallest(self, k: int) -> Tensor:
        """The mask of the ``k`` smallest, at least 1."""
        chosen = self._by_bracket(k) if self.numel > _LARGE else None
        return torch.from_numpy(self._by_rounds(k) if chosen is None else chosen)

    def _by_rounds(self, k: int) -> _Array:
        """Among all that are eligible, where they are few or the sample has misled."""
        at, inside = list[_Array](), list[_Array]()
        for start, keys in self._pieces():
            where = np.flatnonzero(self.among[start : start + len(keys)] & ~np.isnan(keys))
            at.append(where + start)
            inside.append(keys[where])
        few = self._few(at, inside)
        found = self._kth(few, self.width, k)
        if found is None:
            both = np.array([np.count_nonzero(self.counted), np.count_nonzero(few.counted)])
            eligible, comparable = self._sum(both).tolist()
            raise ValueError(
                f"Cannot choose {k} entries: only {comparable} are eligible"
                f" ({eligible - comparable} more have the score NaN, which cannot be ranked)."
            )
        return self._marked(np.zeros(len(self.among), dtype=bool), few, *found)

    def _by_bracket(self, k: int) -> _Array | None:
        """Between two keys; None where the k-th is not there."""
        bracket = self._bracket(k)
        if bracket is None:
            return None
        low, high = bracket
        chosen, below = np.zeros(len(self.among), dtype=bool), 0
        at, inside = list[_Array](), list[_Array]()
        for start, keys in self._pieces():
            here = slice(start, start + len(keys))
            within = (keys <= high) & self.among[here]
            if low > -math.inf:
                lower = np.less(keys, low, out=chosen[here])
                lower &= self.among[here]
                below += int(np.count_nonzero(lower & self.counted[here]))
                within ^= lower
            where = np.flatnonzero(within)
            at.append(where + start)
            inside.append(keys[where])
        few = self._few(at, inside)
        first, last = _ordered(np.array([low, high], dtype=self.floating))
        few.integers -= first
        found = self._kth(few, int(last - first).bit_length(), k, below)
        return None if found is None else self._marked(chosen, few, *found)

    def _bracket(self, k: int) -> tuple[float, float] | None:
        """Keys between which the k-th most probably is: five standard deviations around, as a sample tells."""
        integers = _ordered(self._sample())
        digits = _digits(integers, self.width - BITS)
        hist, eligible = self._sum_with(np.bincount(digits, minlength=BUCKETS), int(np.count_nonzero(self.counted)))
        seen = int(hist.sum())
        if not seen or k > eligible:
            return None
        middle = k / eligible * seen
        margin = 5.0 * math.sqrt(middle * (1.0 - k / eligible)) + 5.0
        ranks = math.floor(middle - margin) + 1, math.ceil(middle + margin) + 1
        ends = [_Open(min(max(1, rank), seen), integers) for rank in ranks]
        for end in ends:
            end.open(hist, digits)
        lower = shifts(self.width)[1 : _LEVELS[self.width]]
        for shift in lower:
            digits_of = [_digits(end.pool, shift) for end in ends]
            sums = self._sum(np.concatenate([np.bincount(each, minlength=BUCKETS) for each in digits_of]))
            for end, its, hist in zip(ends, digits_of, (sums[:BUCKETS], sums[BUCKETS:]), strict=True):
                end.open(hist, its)
        low = self._as_float(ends[0].prefix << lower[-1])
        high = self._as_float(((ends[1].prefix + 1) << lower[-1]) - 1)
        return (
            -math.inf if ranks[0] < 1 or math.isnan(low) else low,
            math.inf if ranks[1] > seen or math.isnan(high) else high,
        )

    def _kth(self, few: _Few, width: int, k: int, below: int = 0) -> tuple[int, int, int] | None:
        """The k-th integer, how many with that key are still wanted, and how many there are; None for no such rank.

        Args:
            few: What is here of those among which it is.
            width: Bits of the integers.
            k: Its rank in the whole, from 1.
            below: How many are here that come before all of these.
        """
        opened, counted = _Open(k, few.integers), few.counted
        ties = 0
        for number, shift in enumerate(shifts(width)):
            digits = _digits(opened.pool, shift)
            its = np.bincount(digits[counted], minlength=BUCKETS)
            hist, before = self._sum_with(its, below if number == 0 else 0)
            opened.rank -= before
            if number == 0 and not 1 <= opened.rank <= hist.sum():
                return None
            ties = opened.open(hist, digits)
            counted = counted[opened.kept]
        return opened.prefix, opened.rank, ties

    def _marked(self, chosen: _Array, few: _Few, threshold: int, wanted: int, ties: int) -> _Array:
        """Choose what is below the threshold, and of the ties as many as are wanted, in the order of their places."""
        chosen[few.at[few.integers < threshold]] = True
        tied = few.integers == threshold
        at, counted = few.at[tied], few.counted[tied]
        if wanted < ties:
            places = self._places(at)
            opened = _Open(wanted, places)
            for shift in shifts((self.numel - 1).bit_length()):
                digits = _digits(opened.pool, shift)
                opened.open(self._sum(np.bincount(digits[counted], minlength=BUCKETS)), digits)
                counted = counted[opened.kept]
            at = at[places <= opened.prefix]
        chosen[at] = True
        return chosen

    def _sum(self, counts: _Array) -> _Array:
        return self.sum_(torch.from_numpy(counts).to(self.counter)).numpy()

    def _sum_with(self, counts: _Array, another: int) -> tuple[_Array, int]:
        """Two sums by one transfer."""
        sums = self._sum(np.append(counts, another))
        return sums[:-1], int(sums[-1])

    def _counted(self) -> _Array:
        """The eligible entries that are counted here."""
        if all(part.owned for part in self.parts):
            return self.among
        counted = self.among.copy()
        for part, start in zip(self.parts, self.starts, strict=True):
            if not part.owned:
                counted[start : start + len(part.scores)] = False
        return counted

    def _few(self, at: Sequence[_Array], keys: Sequence[_Array]) -> _Few:
        places = np.concatenate([np.empty(0, np.int64), *at])
        integers = _ordered(np.concatenate([np.empty(0, self.floating), *keys]))
        return _Few(integers, places, self.counted[places])

    def _pieces(self) -> Iterator[tuple[int, _Array]]:
        start = 0
        for piece in in_pieces([part.scores.detach() for part in self.parts]):
            yield start, self._keys(piece)
            start += len(piece)

    def _keys(self, scores: Tensor) -> _Array:
        return keys_of(scores, self.key).astype(self.floating, copy=False)

    def _sample(self) -> _Array:
        size = min(_SAMPLE, max(_SAMPLE // 8, self.numel >> 7))
        mine = math.ceil(size * len(self.among) / self.numel)
        if mine == 0:
            return np.empty(0, self.floating)
        drawn = np.sort(torch.randint(len(self.among), (mine,), generator=torch.Generator().manual_seed(0)).numpy())
        drawn = torch.from_numpy(drawn[self.counted[drawn]])
        scores = torch.cat([part.scores.detach()[here] for part, here in _divided(self.parts, drawn)])
        keys = self._keys(scores)
        return keys[~np.isnan(keys)]

    def _places(self, at: _Array) -> _Array:
        """Places in the whole of entries at rising places here."""
        found = [part.places(here) for part, here in _divided(self.parts, torch.from_numpy(at))]
        return torch.cat(found).numpy().astype(np.uint64)

    def _as_float(self, integer: int) -> float:
        """The inverse of :func:`_ordered`; NaN beyond infinity."""
        top, unsigned = 1 << (self.width - 1), np.uint32 if self.width == 8 * SINGLE else np.uint64
        bits = integer ^ (top if integer & top else (1 << self.width) - 1)
        return float(np.array([bits], dtype=unsigned).view(self.floating)[0])


@dataclass
class _Few:
    """Entries that are compared as integers: these, their places here, and whether they are counted here."""

    integers: _Array
    at: _Array
    counted: _Array


class _Open:
    """The bucket that holds the entry of some rank, opened digit by digit."""

    def __init__(self, rank: int, pool: _Array) -> None:
        self.rank, self.pool, self.prefix = rank, pool, 0
        self.kept = np.empty(0, dtype=bool)

    def open(self, hist: _Array, digits: _Array) -> int:
        """Open the bucket of the rank, given the counts of all processes; return how many it holds."""
        sums = hist.cumsum()
        bucket = int(sums.searchsorted(self.rank))
        self.rank -= int(sums[bucket] - hist[bucket])
        self.prefix = self.prefix << BITS | bucket
        self.kept = digits == bucket
        self.pool = self.pool[self.kept]
        return int(hist[bucket])


def _digits(integers: _Array, shift: int) -> _Array:
    return ((integers >> np.uint64(shift)) & np.uint64(BUCKETS - 1)).astype(np.int64)


def _ordered(keys: _Array) -> _Array:
    """Unsigned integers in the order of the keys; no key may be NaN."""
    values = keys + keys.dtype.type(0.0)  # −0 becomes 0
    unsigned, signed = (np.uint32, np.int32) if values.itemsize == SINGLE else (np.uint64, np.int64)
    width = 8 * values.itemsize
    # All bits of a negative float flip; only the first bit of any other float flips.
    flips = (values.view(signed) >> (width - 1)).view(unsigned) | unsigned(1 << (width - 1))
    return (values.view(unsigned) ^ flips).astype(np.uint64)
