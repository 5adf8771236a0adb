"""Selection: exactly k entries by their scores. Nothing is sorted: a partition finds the k-th score in linear time.

Equal scores are taken in the order of their places, so that every device and rank chooses the same ones. NaN cannot be
ranked and is never chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.functional import masks
from lightning_sparse.functional.masks import count_true

__all__ = ["Key", "Scores", "kth_smallest", "largest", "smallest"]

# From how many entries on a selection on the CPU makes nothing of their size, and how many it looks at first.
_LARGE = 1 << 15
_SAMPLE = 1 << 15
# Entries compared at a time, which stay in the cache.
_CHUNK = 1 << 17
# Where at most one of so many is eligible, the eligible are gathered.
_FEW = 16

_FLOAT = 4  # bytes

Key = Callable[[Tensor], Tensor]
"""What is compared: a function of each entry alone."""

_Parts = Callable[[], Iterator[tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]]]
"""Makes a pass over the pieces: where each begins, its keys, and which of its entries are eligible."""

Scores = Tensor | Sequence[Tensor]
"""One tensor, or several flat ones that are ranked together; nothing of the size of all of them is made."""


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of ``values``, in linear time.

    Args:
        values: Any shape, floating point. NaN counts as larger than everything.
        k: Rank, from 1 to ``values.numel()``.

    Returns:
        A tensor of shape ``()`` on the device of ``values``.

    Raises:
        ValueError: ``k`` is out of range.

    Example:
        >>> kth_smallest(torch.tensor([3.0, 1.0, 2.0]), 2)
        tensor(2.)
    """
    if not 1 <= k <= values.numel():
        raise ValueError(f"k is {k}, but {values.numel()} values have ranks 1 to {values.numel()}.")
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()  # exact; a half has no fast comparison on the CPU
    if masks.on_cpu(values):
        # numpy's introselect takes a sixth of the time of torch.kthvalue on 25 M values.
        partitioned = values.detach().flatten().clone().numpy()
        partitioned.partition(k - 1)
        return torch.from_numpy(partitioned[k - 1 : k]).squeeze(0)
    return values.flatten().kthvalue(k).values


def smallest(scores: Scores, k: int, among: Tensor, key: Key | None = None) -> Tensor:
    """The mask of the ``k`` smallest scores among the eligible entries; exactly ``k`` are ``True``.

    Equal scores are taken in the order of ``scores.flatten()``, so that every device and rank chooses the same ones.

    Args:
        scores: Floating point, any shape; or several flat tensors, which are ranked together as if concatenated.
        k: Number of entries to choose, at least 0.
        among: ``bool``, the shape of ``scores``, or flat if there are several tensors: the entries that may be chosen.
        key: An element-wise function of the scores whose values are compared, such as :func:`torch.abs`. On a CPU it
            is called on parts of large tensors, which takes less time and memory than a tensor of all keys.

    Returns:
        ``bool``, the shape of ``among``.

    Raises:
        ValueError: Fewer than ``k`` entries are eligible, or ``k`` is negative. On a GPU the first is not checked,
            because the CPU would have to wait for the GPU at every layer; the mask then has fewer than ``k`` entries.

    Example:
        >>> scores = torch.tensor([4.0, 1.0, 2.0, -1.0])
        >>> smallest(scores, 2, among=torch.tensor([True, False, True, True]), key=torch.abs)
        tensor([False, False,  True,  True])
        >>> smallest([scores[:1], scores[1:]], 1, among=torch.ones(4, dtype=torch.bool))
        tensor([False, False, False,  True])
    """
    if k == 0:
        return torch.zeros_like(among)
    if k < 0:
        raise ValueError(f"Cannot choose {k} entries; k must be at least 0.")
    parts = [scores] if isinstance(scores, Tensor) else scores
    on_cpu = masks.on_cpu(among)
    if on_cpu and among.numel() > _LARGE and all(tensor.is_contiguous() for tensor in (among, *parts)):
        chosen = _smallest_in_pieces(in_pieces([part.detach().view(-1) for part in parts]), k, among.view(-1), key)
        if chosen is not None:
            return chosen.view_as(among)
    together = scores if isinstance(scores, Tensor) else torch.cat(list(scores))
    keys = together if key is None else key(together)
    if not on_cpu:
        return _smallest_without_looking(keys, k, among)
    chosen = _smallest_without_looking(keys, min(k, keys.numel()), among) if keys.numel() else among
    if count_true(chosen) < k:
        comparable = count_true(among & ~keys.isnan())
        raise ValueError(
            f"Cannot choose {k} entries: only {comparable} are eligible"
            f" ({count_true(among) - comparable} more have the score NaN, which cannot be ranked)."
        )
    return chosen


def _smallest_without_looking(keys: Tensor, k: int, among: Tensor) -> Tensor:
    """:func:`smallest` by operations alone whose results the CPU does not wait for; fewer than ``k`` may be chosen."""
    # Order is expressed with infinity: max + epsilon equals max from 256 upward in float32.
    candidates = keys.masked_fill(~among, torch.inf)
    threshold = kth_smallest(candidates, k)
    below = candidates < threshold
    ties = (candidates == threshold).logical_and_(among)
    missing = k - below.sum()
    first = ties.flatten().cumsum(0, dtype=torch.int32).view_as(ties) <= missing
    return below.logical_or_(ties.logical_and_(first))


def largest(scores: Scores, k: int, among: Tensor, key: Key | None = None) -> Tensor:
    """The mask of the ``k`` largest scores among the eligible entries; see :func:`smallest`.

    Example:
        >>> largest(torch.tensor([4.0, 1.0, 2.0, 1.0]), 2, among=torch.ones(4, dtype=torch.bool))
        tensor([ True, False,  True, False])
    """
    return smallest(scores, k, among, key=negated(key))


def negated(key: Key | None) -> Key:
    """The key by which the largest come first; ``key`` gives a tensor of its own, which is negated in place."""
    return torch.neg if key is None else lambda part: key(part).neg_()


def in_pieces(parts: Sequence[Tensor]) -> list[Tensor]:
    """Flat tensors as others of at most a chunk, which stay in the cache; small neighbours are joined."""
    pieces, small = list[Tensor](), list[Tensor]()

    def join() -> None:
        if small:
            pieces.append(torch.cat(small))
            small.clear()

    for part in parts:
        is_small = len(part) <= _CHUNK // 2
        if not is_small or sum(map(len, small)) + len(part) > _CHUNK:
            join()
        if is_small:
            small.append(part)
        else:
            pieces += part.split(_CHUNK)
    join()
    return pieces


def _smallest_in_pieces(pieces: Sequence[Tensor], k: int, among: Tensor, key: Key | None) -> Tensor | None:
    """:func:`smallest` without a tensor of the size of the keys; None where the sample misleads, or k is out of range.

    A sample brackets the k-th key. One pass marks the keys below the bracket and gathers those inside, of which a
    partition finds the smallest.
    """
    sizes = [len(piece) for piece in pieces]

    def parts() -> Iterator[tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        for start, piece, eligible in zip(_starts(pieces), pieces, among.split(sizes), strict=True):
            yield start, keys_of(piece, key), eligible.numpy()

    num_eligible = count_true(among)
    if k > num_eligible:
        return None
    if num_eligible * _FEW <= len(among):
        return _smallest_of_few(pieces, k, among, key)
    few = k * _FEW <= num_eligible
    low, high = _bracket(pieces, k / num_eligible, among, key, one_of=512 if few else 128)
    return _smallest_between(parts, -math.inf if few else low, high, k, among)  # of few it gathers all that are below


def _smallest_between(parts: _Parts, low: float, high: float, k: int, among: Tensor) -> Tensor | None:
    """The same in one pass, which marks what is below the bracket and gathers what is inside."""
    chosen = torch.zeros_like(among)
    places, candidates = list[np.ndarray[Any, Any]](), list[np.ndarray[Any, Any]]()
    for start, keys, eligible in parts():
        inside = keys <= high
        if low > -math.inf:
            below = chosen.numpy()[start : start + len(keys)]
            np.less(keys, low, out=below)
            inside ^= below
            below &= eligible
        inside &= eligible
        where = np.flatnonzero(inside)
        places.append(where + start)
        candidates.append(keys[where])
    missing, between = k - count_true(chosen), np.concatenate(candidates)
    return _mark_smallest_(chosen, np.concatenate(places), between, missing) if 1 <= missing <= len(between) else None


def _smallest_of_few(pieces: Sequence[Tensor], k: int, among: Tensor, key: Key | None) -> Tensor | None:
    """The same where few are eligible: these are gathered."""
    where = np.flatnonzero(among.numpy())
    return _mark_smallest_(torch.zeros_like(among), where, keys_of(_take(pieces, where), key), k)


def _mark_smallest_(chosen: Tensor, where: np.ndarray[Any, Any], keys: np.ndarray[Any, Any], k: int) -> Tensor | None:
    """Mark the ``k`` smallest keys, which stand at rising places; None where one of them is not finite."""
    threshold = np.partition(keys, k - 1)[k - 1]
    if not np.isfinite(threshold):
        return None
    below, ties = np.flatnonzero(keys < threshold), np.flatnonzero(keys == threshold)
    chosen.numpy()[where[np.concatenate([below, ties[: k - len(below)]])]] = True
    return chosen


def _starts(pieces: Sequence[Tensor]) -> list[int]:
    """Where each piece begins."""
    return list(accumulate((len(piece) for piece in pieces[:-1]), initial=0))


def _take(pieces: Sequence[Tensor], where: np.ndarray[Any, Any]) -> Tensor:
    """The entries at rising places, counted through all pieces."""
    starts = _starts(pieces)
    bounds = np.searchsorted(where, [*starts, starts[-1] + len(pieces[-1])])
    return torch.cat(
        [
            piece[torch.from_numpy(where[first:last] - start)]
            for piece, start, (first, last) in zip(pieces, starts, pairwise(bounds), strict=True)
        ]
    )


def keys_of(part: Tensor, key: Key | None) -> np.ndarray[Any, Any]:
    """The keys of a part on a CPU, as numbers that numpy knows."""
    keys = part if key is None else key(part)
    return (keys.float() if keys.element_size() < _FLOAT else keys).numpy()  # exact; numpy knows no bfloat16


def _bracket(
    pieces: Sequence[Tensor], fraction: float, among: Tensor, key: Key | None, one_of: int
) -> tuple[float, float]:
    """Keys between which the one at ``fraction`` of the eligible most probably is: five standard deviations around.

    One of ``one_of`` entries is looked at, of large tensors fewer. At the ends few are enough.
    """
    size = min(_SAMPLE, max(_SAMPLE // 8, len(among) // one_of))
    where = torch.randint(len(among), (size,), generator=torch.Generator().manual_seed(0))
    sample = np.sort(keys_of(_take(pieces, np.sort(where[among[where]].numpy())), key))
    sample = sample[~np.isnan(sample)]
    middle = fraction * len(sample)
    margin = 5.0 * math.sqrt(middle * (1.0 - fraction)) + 5.0
    low, high = math.floor(middle - margin), math.ceil(middle + margin)
    return sample[low] if low >= 0 else -math.inf, sample[high] if high < len(sample) else math.inf
