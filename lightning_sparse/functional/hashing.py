"""Hashes of tensors' contents, computed on their device: equal contents have equal hashes on every device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["content_hash"]

_INTEGER_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTOR, _OFFSET = 0x5851F42D4C957F2D, 0x14057B7EF767814F


def content_hash(tensor: Tensor) -> Tensor:
    """A polynomial hash modulo 2⁶⁴ of the bits of a tensor; two swapped entries change it.

    Args:
        tensor: ``bool``, integer or real floating point, any shape and strides; order is that of ``flatten()``.

    Returns:
        ``int64``, shape ``()``, on the device of ``tensor``.

    Example:
        >>> one, other = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
        >>> bool(content_hash(one) == content_hash(one.clone())), bool(content_hash(one) == content_hash(other))
        (True, False)
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.dtype == torch.bool:
        active = flat.nonzero().squeeze(1)
        return (active * _FACTOR + _OFFSET).bitwise_xor_(active << 17).sum()
    # A copy, always: a 64-bit tensor would be hashed in place.
    bits = flat.view(_INTEGER_OF_WIDTH[flat.element_size()]).to(torch.int64, copy=True)
    odd = torch.arange(1, max(1, 2 * len(bits)), 2, device=bits.device)
    return bits.bitwise_xor_(bits << 21).add_(_OFFSET).mul_(odd.add_(_FACTOR - 1)).sum()
