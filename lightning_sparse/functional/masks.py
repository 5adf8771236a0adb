"""Masks: counting their entries, zeroing pruned entries, and packing into one bit per weight.

A mask is a ``bool`` tensor, ``True`` = active.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "awake",
    "check_packed",
    "count_true",
    "counts_true",
    "multiplier",
    "on_cpu",
    "pack",
    "row_counts",
    "tensor_bytes",
    "unpack",
    "zero_pruned_",
]

# Entries zeroed at a time on the CPU: the integers that a chunk of the mask is widened to stay in the cache.
_CHUNK = 1 << 17

_NUMPY_IS_FAST = (torch.float32, torch.float64)  # to compare these it takes a quarter of torch's time

_LARGEST = 1 << 63  # what torch counts in
_LARGEST_BYTE = 255
_MANY, _NARROW, _WIDE = 1 << 18, 64, 1 << 13  # entries of masks, and of rows, that are counted in other ways

_INTEGER_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def count_true(mask: Tensor) -> int:
    """The number of ``True`` in a mask; on a CPU in a tenth of the time of :meth:`torch.Tensor.count_nonzero`.

    Example:
        >>> count_true(torch.tensor([True, False, True]))
        2
    """
    return counts_true([mask])[0]


def counts_true(masks: Sequence[Tensor]) -> list[int]:
    """The number of ``True`` in each of several masks; from other devices than the CPU, in one transfer.

    Example:
        >>> counts_true([torch.tensor([True, False]), torch.tensor([False])])
        [1, 0]
    """
    if all(map(on_cpu, masks)):
        return [int(np.count_nonzero(mask.numpy())) for mask in masks]
    return torch.stack([mask.count_nonzero() for mask in masks]).tolist()


def row_counts(rows: Tensor) -> Tensor:
    """The number of ``True`` in each row of a mask; for large masks on a CPU in half of the time of a sum, or less.

    Args:
        rows: ``bool``, two-dimensional, any strides.

    Returns:
        ``int64``, one for each row.

    Example:
        >>> row_counts(torch.tensor([[True, False, True], [False, False, False]]))
        tensor([2, 0])
    """
    width = rows.shape[1]
    if not on_cpu(rows) or rows.numel() < _MANY or width < _NARROW or rows.stride(1) != 1:
        return rows.sum(dim=1, dtype=torch.int32).long()  # without dtype= it takes six times as long
    if width > _WIDE:
        return torch.tensor([int(np.count_nonzero(row)) for row in rows.numpy()])
    whole = width // 8 * 8
    counts = rows[:, whole:].sum(dim=1)
    entries = rows[:, :whole].contiguous().view(-1)
    if entries.storage_offset() % 8:
        entries = entries.clone()
    eights = entries.view(torch.int64).view(len(rows), whole // 8)
    for some in eights.split(_LARGEST_BYTE, dim=1):  # of so many, no byte's sum flows over
        counts += some.sum(dim=1, keepdim=True).view(torch.uint8).sum(dim=1)
    return counts


def awake(tensor: Tensor, mask: Tensor) -> Tensor:
    """Where pruned entries of ``tensor`` are not zero; NaN is not.

    Args:
        tensor: Any shape and strides.
        mask: ``bool``, the shape of ``tensor``; ``True`` = active.

    Returns:
        ``bool``, the shape of ``tensor``.

    Example:
        >>> awake(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([True, False, False]))
        tensor([False,  True, False])
    """
    tensor = tensor.detach()
    if on_cpu(tensor) and tensor.dtype in _NUMPY_IS_FAST:
        found = np.asarray(tensor.numpy() != 0)
        return torch.from_numpy(np.greater(found, mask.numpy(), out=found))
    return (tensor != 0).gt(mask)


def zero_pruned_(tensor: Tensor, mask: Tensor) -> Tensor:
    """Zero the pruned entries of ``tensor`` in place: ``tensor ← tensor ⊙ mask``, with inf and NaN zeroed too.

    Multiplying the bit patterns, read as integers, by 0 or 1 is exact for every float and costs a quarter of
    ``masked_fill_`` on a CPU.

    Args:
        tensor: Floating point, any shape and strides.
        mask: ``bool``, the shape of ``tensor``; ``True`` = active. Or its :func:`multiplier`, which is faster.

    Returns:
        ``tensor``.

    Example:
        >>> zero_pruned_(torch.tensor([1.0, float("nan"), -3.0]), torch.tensor([True, False, True]))
        tensor([ 1.,  0., -3.])
    """
    bits = tensor.detach().view(_INTEGER_OF_WIDTH[tensor.element_size()])
    if mask.dtype == bits.dtype:
        bits.mul_(mask)
        return tensor
    keep = mask.view(torch.int8)
    order = memory_order(keep)
    one_order = bits.permute(order).is_contiguous() and keep.permute(order).is_contiguous()
    if bits.is_cpu and bits.numel() > _CHUNK and one_order:
        _multiply_in_chunks_(bits.permute(order).view(-1), keep.permute(order).view(-1))
    else:
        bits.mul_(keep)
    return tensor


def on_cpu(tensor: Tensor) -> bool:
    """Whether the CPU can read a tensor without waiting: decides which of two ways of selection and counting is taken.

    Example:
        >>> on_cpu(torch.ones(2))
        True
    """
    return tensor.is_cpu


def multiplier(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as integers 1 and 0 of the width of ``dtype``, by which :func:`zero_pruned_` multiplies.

    It takes as much memory as a weight; :func:`zero_pruned_` with it takes half the time.

    Args:
        mask: ``bool``, any shape and strides, which are kept.
        dtype: Floating-point type of the tensors whose entries are to be zeroed.

    Example:
        >>> multiplier(torch.tensor([True, False]), torch.float32)
        tensor([1, 0], dtype=torch.int32)
    """
    return mask.to(_INTEGER_OF_WIDTH[dtype.itemsize])


def _multiply_in_chunks_(bits: Tensor, keep: Tensor) -> None:
    buffer = torch.empty(_CHUNK, dtype=bits.dtype)
    for chunk, keep_chunk in zip(bits.split(_CHUNK), keep.split(_CHUNK), strict=True):
        chunk.mul_(buffer[: chunk.numel()].copy_(keep_chunk))


def memory_order(tensor: Tensor) -> list[int]:
    """The dimensions of ``tensor`` from the outermost in memory to the innermost.

    Example:
        >>> memory_order(torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last))
        [0, 2, 3, 1]
    """
    return sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))


def pack(mask: Tensor) -> Tensor:
    """Pack a mask into one bit per weight: eight entries of ``mask.flatten()`` per byte, the first in the lowest bit.

    Args:
        mask: ``bool``, any shape.

    Returns:
        ``uint8`` of ``⌈mask.numel() / 8⌉`` entries, on the CPU.

    Example:
        >>> pack(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    flat = mask.detach().cpu().contiguous().flatten().view(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = padded[:, 0].clone()
    for bit in range(1, 8):
        packed |= padded[:, bit] << bit
    return packed


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask that :func:`pack` packed.

    Args:
        packed: ``uint8``, one-dimensional.
        shape: The shape of the mask.

    Returns:
        ``bool``, of ``shape``, on the device of ``packed``.

    Raises:
        ValueError: ``packed`` does not hold one bit for each entry of ``shape``, or ``shape`` is not a shape. Nothing
            has been allocated then.

    Example:
        >>> unpack(torch.tensor([5], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    numel = check_packed(packed, shape)
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(1) >> bits) & 1).flatten()[:numel].view(torch.bool).reshape(tuple(shape))


def check_packed(packed: Tensor, shape: Sequence[int]) -> int:
    """Check that :func:`unpack` would accept these; nothing is allocated.

    Returns:
        The number of entries.

    Raises:
        ValueError: ``packed`` does not hold one bit for each entry of ``shape``, or ``shape`` is not a shape.

    Example:
        >>> check_packed(torch.tensor([5], dtype=torch.uint8), (3,))
        3
    """
    numel = _numel_of(shape)
    if not isinstance(packed, Tensor):  # as a file may have it
        raise ValueError(f"A mask is packed into a tensor, not a {type(packed).__name__}.")
    if packed.layout != torch.strided or packed.is_meta:
        raise ValueError("A mask is packed into a plain tensor, and this one is sparse or holds no values.")
    if packed.dtype != torch.uint8 or packed.shape != (-(-numel // 8),):
        raise ValueError(
            f"A mask of shape {tuple(shape)} is packed into {-(-numel // 8)} bytes (uint8), but a {packed.dtype} tensor"
            f" of shape {tuple(packed.shape)} was given. The file may be cut short or belong to another network."
        )
    if packed.untyped_storage().nbytes() < packed.numel():  # one byte that stands for a terabyte of them
        raise ValueError(f"A mask of shape {tuple(shape)} claims {packed.numel()} bytes and does not store them.")
    return numel


def _numel_of(shape: Sequence[int]) -> int:
    """The entries that a shape has, which a file may have made up."""
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape):
        raise ValueError(f"{tuple(shape)} is no shape: its sizes are integers of at least 0.")
    if math.prod(size for size in shape if size) >= _LARGEST:
        raise ValueError(f"{tuple(shape)} is no shape: no tensor has so many entries.")
    return math.prod(shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    r"""The bytes of a tensor in the order of ``flatten()``, for a digest; without a copy if it is contiguous on a CPU.

    Example:
        >>> bytes(tensor_bytes(torch.tensor([1, 2], dtype=torch.int16)))
        b'\x01\x00\x02\x00'
    """
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
