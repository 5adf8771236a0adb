"""Statistics of masks and their changes: counts of weights and neurons, and ratios of these counts.

A mask is a ``bool`` tensor, ``True`` = active. Every function takes the masks of a whole network, one tensor per layer,
and reads them with one transfer from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse.functional.masks import row_counts

__all__ = [
    "count_active",
    "count_bits",
    "count_changed",
    "count_dead",
    "count_shared",
    "dead_neurons",
    "exploration_rate",
    "mask_change",
    "sparsity",
]


def sparsity(masks: Sequence[Tensor]) -> float:
    """The fraction of zeros among the weights of all masks together, in [0, 1].

    Args:
        masks: ``bool``, of any shapes.

    Raises:
        ValueError: There is no mask, or one is not ``bool``.

    Example:
        >>> sparsity([torch.tensor([True, False]), torch.tensor([[False, False]])])
        0.75
    """
    active, total = count_active(masks)
    return 1.0 - active / total


def mask_change(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    """The share of mask entries that differ between two times, in [0, 1].

    If one weight is pruned and another is grown, two entries differ.

    Args:
        old: ``bool``, of any shapes.
        new: ``bool``, of the shapes of ``old``.

    Raises:
        ValueError: There is no mask, one is not ``bool``, or the shapes differ.

    Example:
        >>> mask_change([torch.tensor([True, True, False, False])], [torch.tensor([True, False, True, False])])
        0.5
    """
    changed, total = count_changed(old, new)
    return changed / total


def exploration_rate(ever_active: Sequence[Tensor]) -> float:
    r"""In-time over-parameterisation :math:`R_s`: the share of weights that have ever been active, in [0, 1].

    Args:
        ever_active: ``bool``, of any shapes: the union of a mask's values over training.

    Raises:
        ValueError: There is no mask, or one is not ``bool``.

    References:
        Liu et al., "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse
        Training", ICML 2021, https://arxiv.org/abs/2102.02887

    Example:
        >>> before, after = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
        >>> exploration_rate([before | after])
        0.75
    """
    active, total = count_active(ever_active)
    return active / total


def dead_neurons(rows: Sequence[Tensor]) -> float:
    """The share of neurons and filters without an active input, in [0, 1]; :func:`count_dead` gives their number.

    Args:
        rows: ``bool``, each of shape ``(outputs, fan-in)``: a mask as
            :meth:`MaskedWeight.rows <lightning_sparse.masks.MaskedWeight.rows>` gives it.

    Raises:
        ValueError: There is no mask, or one is not ``bool`` or not two-dimensional.

    Example:
        >>> dead_neurons([torch.tensor([[True, False], [False, False]])])
        0.5
    """
    dead, total = count_dead(rows)
    return dead / total


def count_active(masks: Sequence[Tensor]) -> tuple[int, int]:
    """How many weights are active, and how many there are.

    Example:
        >>> count_active([torch.tensor([True, False, False])])
        (1, 3)
    """
    _check(masks)
    return _sum([mask.count_nonzero() for mask in masks]), sum(mask.numel() for mask in masks)


def count_changed(old: Sequence[Tensor], new: Sequence[Tensor]) -> tuple[int, int]:
    """How many entries differ between two times, and how many there are.

    Example:
        >>> count_changed([torch.tensor([True, False])], [torch.tensor([False, False])])
        (1, 2)
    """
    _check(old)
    _check(new)
    shapes_old, shapes_new = [tuple(mask.shape) for mask in old], [tuple(mask.shape) for mask in new]
    if shapes_old != shapes_new:
        raise ValueError(
            f"The old masks have shapes {shapes_old} and the new ones {shapes_new}; give the same masks at two times."
        )
    changed = [(before ^ after).count_nonzero() for before, after in zip(old, new, strict=True)]
    return _sum(changed), sum(mask.numel() for mask in new)


def count_shared(old: Sequence[Tensor], new: Sequence[Tensor]) -> tuple[int, int]:
    """How many weights are active in both, and how many in at least one; their ratio is the Jaccard index.

    Args:
        old: ``bool``, of any shapes.
        new: ``bool``, of the shapes of ``old``.

    Raises:
        ValueError: There is no mask, one is not ``bool``, or the shapes differ.

    Example:
        >>> count_shared([torch.tensor([True, True, False])], [torch.tensor([True, False, True])])
        (1, 3)
    """
    changed, _ = count_changed(old, new)
    both = _sum([(before & after).count_nonzero() for before, after in zip(old, new, strict=True)])
    return both, both + changed


def count_dead(rows: Sequence[Tensor]) -> tuple[int, int]:
    """How many neurons and filters have no active input, and how many there are.

    Example:
        >>> count_dead([torch.tensor([[True, False], [False, False]])])
        (1, 2)
    """
    _check(rows)
    for row in rows:
        if row.dim() != 2:
            raise ValueError(
                f"A mask of shape {tuple(row.shape)} has no rows; give (outputs, fan-in), as MaskedWeight.rows(mask)."
            )
    return _sum([(row_counts(row) == 0).count_nonzero() for row in rows]), sum(len(row) for row in rows)


def count_bits(packed: Tensor) -> int:
    """How many bits are set: the active weights of a mask as :func:`~lightning_sparse.functional.pack` packs it.

    Args:
        packed: ``uint8``, any shape.

    Example:
        >>> count_bits(torch.tensor([0b101, 0b11], dtype=torch.uint8))
        4
    """
    # Neighbours are added: 8 counts of one bit, 4 of two, 2 of four, 1 of eight.
    pairs = packed - ((packed >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return int(((nibbles + (nibbles >> 4)) & 0x0F).sum())


def _check(masks: Sequence[Tensor]) -> None:
    if not masks:
        raise ValueError("There is no mask to count; give one tensor for each layer.")
    for mask in masks:
        if mask.dtype != torch.bool:
            raise ValueError(f"A mask is {mask.dtype}; give torch.bool, True = active, as in `weight != 0`.")


def _sum(counts: Sequence[Tensor]) -> int:
    return int(torch.stack([count.to(counts[0].device) for count in counts]).sum())
