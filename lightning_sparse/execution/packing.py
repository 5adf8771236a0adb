"""Packing of one tensor into its nonzero values and their places, bit for bit.

An entry is zero if all its bits are 0, so infinities, payloads of NaN and subnormal values come back unchanged.
Negative zeros, which are common in a product of weights and a mask, are stored as places without values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.execution.notes import DTYPES, TensorNotes
from lightning_sparse.execution.positions import bitmask_of, gaps_nbytes, gaps_of, iterate_bitmask, iterate_gaps

__all__ = [
    "Packed",
    "is_inflated",
    "pack_dense",
    "pack_tensor",
    "packed_nbytes",
    "unpack_tensor",
    "without_minus_zeros",
]

# What every version of safetensors stores by its own name; all else is stored as bytes.
_STORED = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
_HAVE_MINUS_ZERO = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ALIGNMENT = 64  # of torch's own memory
_NBYTES_OF_ENTRY = 100
"""About what the header of a file says of one stored tensor."""


class Packed(NamedTuple):
    """What is stored of a tensor, and what a reader must know beside it.

    Args:
        pieces: Tensors by the suffix that follows the tensor's own name, an empty one where it is dense.
        notes: For a reader; ``None`` where nothing needs to be said.
    """

    pieces: dict[str, Tensor]
    notes: TensorNotes | None


class _Form(NamedTuple):
    """How positions are stored, and the bytes that they take."""

    name: str
    nbytes: int
    width: int = 0

    def encode(self, positions: Tensor, numel: int) -> Tensor:
        return gaps_of(positions, numel, self.width) if self.width else bitmask_of(positions, numel)


class _Plan(NamedTuple):
    """Positions of the values, and of zeros with a minus sign where those have some of their own."""

    positions: Tensor
    form: _Form
    minus: Tensor | None
    minus_form: _Form | None
    nbytes: int


def pack_tensor(tensor: Tensor, cast: torch.dtype | None = None) -> Packed:
    """Store what is not zero, or all of it where that is smaller.

    Args:
        tensor: A strided tensor on the CPU, of any shape and any dtype of :data:`DTYPES`.
        cast: The dtype in which the values are stored; by default their own.

    Example:
        >>> packed = pack_tensor(torch.eye(100))
        >>> packed.notes
        TensorNotes(dtype='float32', shape=(100, 100), positions='gaps', minus=None)
        >>> {suffix: (piece.dtype, piece.nbytes) for suffix, piece in packed.pieces.items()}
        {'.gaps': (torch.uint8, 101), '.values': (torch.float32, 400)}
    """
    flat = tensor.contiguous().flatten()
    plan = _plan(flat, _itemsize(tensor, cast))
    if plan is None:
        return pack_dense(tensor, cast)
    numel = flat.numel()
    pieces = {
        f".{plan.form.name}": plan.form.encode(plan.positions, numel),
        ".values": _stored(_integers(flat)[plan.positions].view(flat.dtype), cast),
    }
    if plan.minus is not None and plan.minus_form is not None:
        pieces[f".minus.{plan.minus_form.name}"] = plan.minus_form.encode(plan.minus, numel)
    minus = None if plan.minus_form is None else plan.minus_form.name
    return Packed(pieces, TensorNotes(_name(tensor.dtype), tuple(tensor.shape), plan.form.name, minus))


def pack_dense(tensor: Tensor, cast: torch.dtype | None = None) -> Packed:
    """Store all values; see :func:`pack_tensor`.

    Example:
        >>> pack_dense(torch.eye(2)).notes is None
        True
        >>> pack_dense(torch.eye(2), torch.float16).notes
        TensorNotes(dtype='float32', shape=(2, 2), positions=None, minus=None)
    """
    is_plain = cast in (None, tensor.dtype) and tensor.dtype in _STORED
    notes = None if is_plain else TensorNotes(_name(tensor.dtype), tuple(tensor.shape))
    return Packed({"": _stored(tensor.contiguous(), cast)}, notes)


def packed_nbytes(tensor: Tensor, cast: torch.dtype | None = None) -> int:
    """Bytes that :func:`pack_tensor` takes, what a file's header says of them included, about.

    Example:
        >>> packed_nbytes(torch.eye(100)), packed_nbytes(torch.ones(100, 100))
        (701, 40100)
    """
    itemsize = _itemsize(tensor, cast)
    plan = _plan(tensor.contiguous().flatten(), itemsize)
    return tensor.numel() * itemsize + _NBYTES_OF_ENTRY if plan is None else plan.nbytes


def unpack_tensor(pieces: Mapping[str, Tensor], notes: TensorNotes) -> Tensor:
    """The tensor that :func:`pack_tensor` took apart, in memory of its own.

    No memory is taken before the pieces were found to fit together, and none that they do not account for.

    Args:
        pieces: Those that ``notes`` ask for.
        notes: What was said of the tensor.

    Raises:
        ValueError: They do not fit; the message goes on after "The tensor x is damaged: ".
        MemoryError: They fit, and there is not enough memory.

    Example:
        >>> packed = pack_tensor(torch.eye(100))
        >>> bool((unpack_tensor(packed.pieces, packed.notes) == torch.eye(100)).all())
        True
    """
    dtype, numel = DTYPES[notes.dtype], math.prod(notes.shape)
    if notes.positions is None:
        return _unpack_dense(pieces[""], dtype, notes.shape)
    values = _restored(pieces[".values"], dtype)
    if values.ndim != 1:
        raise ValueError(f"its values have the shape {tuple(values.shape)}, and they should be a list")
    positions = _decode(pieces[f".{notes.positions}"], notes.positions, numel, len(values))
    minus: Iterator[Tensor] = iter(())
    if notes.minus is not None:
        if dtype not in _HAVE_MINUS_ZERO:
            raise ValueError(f"it has zeros with a minus sign, and {notes.dtype} has none")
        minus = _decode(pieces[f".minus.{notes.minus}"], notes.minus, numel, None)
    result = _zeros(numel, dtype)
    bits, patterns, start = _integers(result), _integers(values), 0
    for part in positions:
        bits.scatter_(0, part, patterns[start : start + len(part)])
        start += len(part)
    for part in minus:
        if bits[part].any():
            raise ValueError("some of its zeros with a minus sign are where it has other values")
        bits.scatter_(0, part, _minus_zero(dtype))
    return result.view(notes.shape)


def is_inflated(tensor: Tensor) -> bool:
    """Whether a tensor of gigabytes stands on memory of far less: an expanded one, as a hostile file may hold.

    Example:
        >>> is_inflated(torch.ones(1).expand(10**12)), is_inflated(torch.ones(1).expand(10))
        (True, False)
    """
    return tensor.nbytes > 2**30 and tensor.nbytes > 16 * tensor.untyped_storage().nbytes()


def without_minus_zeros(tensor: Tensor) -> Tensor:
    """The same with 0.0 for -0.0.

    Example:
        >>> without_minus_zeros(torch.tensor([-0.0, -1.0, 2.0])).tolist()
        [0.0, -1.0, 2.0]
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if real.dtype not in _HAVE_MINUS_ZERO:
        return tensor
    plain = real.contiguous().clone()
    bits = _integers(plain)
    bits[bits == _minus_zero(plain.dtype)] = 0
    return torch.view_as_complex(plain) if tensor.is_complex() else plain


def _plan(flat: Tensor, itemsize: int) -> _Plan | None:
    """What to store of a flat tensor; ``None`` where all of it is the smallest."""
    bits = _integers(flat)
    positions, minus, minus_form = _nonzero(bits), None, None
    if flat.dtype in _HAVE_MINUS_ZERO:
        is_minus = bits[positions] == _minus_zero(flat.dtype)
        form = _smallest_form(positions[is_minus], flat.numel())
        if form.nbytes + _NBYTES_OF_ENTRY < int(is_minus.count_nonzero()) * (itemsize + 1):
            positions, minus, minus_form = positions[~is_minus], positions[is_minus], form
    form = _smallest_form(positions, flat.numel())
    nbytes = form.nbytes + len(positions) * itemsize + 2 * _NBYTES_OF_ENTRY
    nbytes += 0 if minus_form is None else minus_form.nbytes + _NBYTES_OF_ENTRY
    is_smaller = nbytes < flat.numel() * itemsize + _NBYTES_OF_ENTRY
    return _Plan(positions, form, minus, minus_form, nbytes) if is_smaller else None


def _smallest_form(positions: Tensor, numel: int) -> _Form:
    bitmask = _Form("bitmask", -(-numel // 8))
    if len(positions) >= bitmask.nbytes:
        return bitmask
    gaps = (_Form("gaps", gaps_nbytes(positions, numel, width), width) for width in (1, 2))
    return min((*gaps, bitmask), key=lambda form: form.nbytes)


def _decode(piece: Tensor, form: str, numel: int, count: int | None) -> Iterator[Tensor]:
    if piece.ndim != 1 or piece.dtype not in {torch.uint8} | ({torch.uint16} if form == "gaps" else set()):
        raise ValueError(f"its {form} have the shape {tuple(piece.shape)} and the type {_name(piece.dtype)}")
    return (iterate_gaps if form == "gaps" else iterate_bitmask)(piece, numel, count)


def _unpack_dense(piece: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = _restored(piece, dtype)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"it has the shape {tuple(tensor.shape)}, and its notes say {shape}")
    return tensor.clone() if tensor.data_ptr() == piece.data_ptr() else tensor  # pieces may be a mapped file's memory


def _stored(values: Tensor, cast: torch.dtype | None) -> Tensor:
    if cast is not None:
        return values.to(cast)
    return values if values.dtype in _STORED else _bytes(values)


def _bytes(values: Tensor) -> Tensor:
    if values.numel() == 1:  # whose strides may be anything, as where it was expanded
        values = values.clone(memory_format=torch.contiguous_format)
    return values.reshape(-1).view(torch.uint8).view(*values.shape, values.element_size())


def _restored(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in the dtype of their tensor."""
    if piece.dtype == dtype and dtype in _STORED:
        return piece
    if piece.dtype == torch.float16 and dtype in {torch.float32, torch.float64}:
        return piece.to(dtype)
    if piece.dtype != torch.uint8 or dtype in _STORED or piece.shape[-1:] != (dtype.itemsize,):
        raise ValueError(f"its values have the type {_name(piece.dtype)}, and it has {_name(dtype)}")
    flat = piece.reshape(-1)
    if flat.data_ptr() % dtype.itemsize or flat.storage_offset() % dtype.itemsize:  # as bytes of a mapped file may lie
        flat = flat.clone()
    return flat.view(dtype).view(piece.shape[:-1])


def _zeros(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros by NumPy, which leaves pages alone that no value will touch, where ``torch.zeros`` writes them all."""
    nbytes = numel * dtype.itemsize
    try:
        memory = np.zeros(nbytes + _ALIGNMENT, dtype=np.uint8)
    except (MemoryError, ValueError) as error:
        raise MemoryError(f"{nbytes:,} bytes") from error
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + nbytes]).view(dtype)


def _integers(values: Tensor) -> Tensor:
    """The same memory as integers; numbers of sixteen bytes, for which there are none, as they are."""
    integer = _INTEGERS.get(values.element_size())
    return values if integer is None else values.view(integer)


def _nonzero(bits: Tensor) -> Tensor:
    """Positions with any bit set."""
    if bits.is_complex():
        return bits.view(torch.int64).view(-1, 2).any(dim=1).nonzero().flatten()
    return bits.nonzero().flatten()


def _minus_zero(dtype: torch.dtype) -> int:
    """The pattern of -0.0 as one of :data:`_INTEGERS`: the highest bit alone."""
    return 1 << 7 if dtype.itemsize == 1 else -(1 << 8 * dtype.itemsize - 1)


def _itemsize(tensor: Tensor, cast: torch.dtype | None) -> int:
    return (cast or tensor.dtype).itemsize


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
