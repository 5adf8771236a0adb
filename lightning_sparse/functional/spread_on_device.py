"""Selection among entries that are spread over processes, on devices whose results the CPU does not wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sparse.functional.held import BITS, BUCKETS, SINGLE, Held, Sum, counter_type, shifts, width_of
from lightning_sparse.functional.selection import Key

__all__ = ["without_looking"]

# Entries at a time.
_CHUNK = 1 << 24


def without_looking(parts: Sequence[Held], k: int, among: Tensor, numel: int, sum_: Sum, key: Key | None) -> Tensor:
    """By operations alone whose results the CPU does not wait for; fewer than ``k`` may be chosen."""
    chunks, width = _chunks(parts, among), width_of(parts)

    def find(of: Callable[[_Chunk], tuple[Tensor, Tensor]], width: int, rank: Tensor) -> tuple[Tensor, Tensor]:
        """The integer of some rank among those that are counted, and its rank among its equals."""
        prefix = torch.zeros((), dtype=torch.int64, device=among.device)
        for shift in shifts(width):
            is_first = shift + BITS >= width
            lowest = -BUCKETS // 2 if is_first and width > 8 * SINGLE else 0  # of an int64, which has a sign
            hist = torch.zeros(BUCKETS, dtype=torch.int64, device=among.device)
            for chunk in (chunk for chunk in chunks if chunk.held.owned):
                integers, counted = of(chunk)
                if not is_first:
                    counted = counted & ((integers >> (shift + BITS)) == prefix)
                hist += _histogram(torch.where(counted, ((integers >> shift) - lowest) & (BUCKETS - 1), -1))
            sums = sum_(hist.to(counter_type(numel))).to(torch.int64)
            cumulated = sums.cumsum(0)
            bucket = (cumulated < rank).sum().clamp_(max=BUCKETS - 1)
            rank = rank - (cumulated - sums).index_select(0, bucket.view(1)).squeeze(0)
            prefix = (prefix << BITS) + bucket + lowest
        return prefix, rank

    def of_keys(chunk: _Chunk) -> tuple[Tensor, Tensor]:
        integers, comparable = _ordered_tensor(chunk.scores, width, key)
        return integers, comparable & chunk.among

    threshold, left = find(of_keys, width, torch.full((), k, dtype=torch.int64, device=among.device))

    def of_places(chunk: _Chunk) -> tuple[Tensor, Tensor]:
        integers, eligible = of_keys(chunk)
        return chunk.places(), eligible & (integers == threshold)

    last, _ = find(of_places, (numel - 1).bit_length(), left)
    chosen = torch.empty_like(among)
    for chunk, out in zip(chunks, chosen.split([len(chunk.scores) for chunk in chunks]), strict=True):
        integers, eligible = of_keys(chunk)
        before = (integers < threshold) | ((integers == threshold) & (chunk.places() <= last))
        torch.logical_and(eligible, before, out=out)
    return chosen


@dataclass(frozen=True, eq=False)
class _Chunk:
    """So many entries of a part, from ``start`` on, that there is room for what is made of them."""

    held: Held
    start: int
    scores: Tensor
    among: Tensor

    def places(self) -> Tensor:
        """Their places in the whole."""
        return self.held.places(torch.arange(self.start, self.start + len(self.scores), device=self.scores.device))


def _chunks(parts: Sequence[Held], among: Tensor) -> list[_Chunk]:
    return [
        _Chunk(part, start, scores, eligible)
        for part, here in zip(parts, among.split([len(part.scores) for part in parts]), strict=True)
        for start, scores, eligible in zip(
            range(0, max(1, len(part.scores)), _CHUNK),
            part.scores.detach().split(_CHUNK),
            here.split(_CHUNK),
            strict=True,
        )
    ]


def _ordered_tensor(scores: Tensor, width: int, key: Key | None) -> tuple[Tensor, Tensor]:
    """``int64`` in the order of the keys, and which of these are comparable."""
    keys = (scores if key is None else key(scores)).to(torch.float32 if width == 8 * SINGLE else torch.float64)
    bits = (keys + 0.0).view(torch.int32 if width == 8 * SINGLE else torch.int64)  # −0 becomes 0
    ordered = bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))
    if width == 8 * SINGLE:
        ordered = ordered.to(torch.int64) + (1 << (width - 1))
    return ordered, ~keys.isnan()


def _histogram(digits: Tensor) -> Tensor:
    """How often each digit is there; those of −1 are not counted."""
    if digits.is_cuda:  # counts integers exactly, with bins of width one, and waits for nothing
        return torch.histc(digits, bins=BUCKETS, min=0, max=BUCKETS - 1)
    return torch.bincount(digits + 1, minlength=BUCKETS + 1)[1:]
