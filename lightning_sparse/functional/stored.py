"""Tensors as a file claims them: whether their entries are there, which of them are zero, and a digest of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.functional.masks import tensor_bytes

__all__ = ["digest", "nonzero", "obstacle", "tensors_in"]

_DEEPEST = 32  # a file may hold a mapping that holds itself


def obstacle(tensor: Tensor) -> str:
    """Why the entries of ``tensor`` cannot be read one by one, as the end of a sentence; empty if they can.

    A file of a kilobyte can hold a tensor of a terabyte, in which one entry stands for all. Computing with it would
    take that terabyte.

    Example:
        >>> obstacle(torch.ones(3))
        ''
        >>> obstacle(torch.ones(1).expand(10, 100))
        'claims 1,000 entries and stores 1; save tensor.clone()'
    """
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"has the layout {tensor.layout}; save tensor.to_dense()"
    if tensor.is_quantized:
        return "is quantized; save tensor.dequantize()"
    if tensor.is_meta:
        return "is on the meta device, which holds no values; save it with its values"
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > stored:
        return f"claims {tensor.numel():,} entries and stores {stored:,}; save tensor.clone()"
    return ""


def nonzero(tensor: Tensor) -> Tensor:
    """``bool``: which entries are not zero, of any type whose entries take whole bytes.

    Raises:
        ValueError: The type packs several entries into a byte.

    Example:
        >>> nonzero(torch.tensor([0.0, -0.0, 0.5]).to(torch.float8_e4m3fn))
        tensor([False, False,  True])
    """
    try:
        return tensor != 0
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"has the type {tensor.dtype}, whose entries cannot be compared with 0") from error


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Every tensor in nested mappings and lists.

    Raises:
        ValueError: They are nested too deeply, as where one holds itself.

    Example:
        >>> [tensor.shape for tensor in tensors_in({"a": [torch.ones(2)], "b": 3})]
        [torch.Size([2])]
    """
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item, depth + 1)


def digest(value: Any) -> str:
    """A digest of nested mappings, lists, primitives and tensors, whatever their order in mappings: BLAKE2b, 128 bits.

    Raises:
        ValueError: A tensor has no entries of its own, or the nesting is too deep.

    Example:
        >>> digest({"a": torch.ones(2), "b": 1}) == digest({"b": 1, "a": torch.ones(2)})
        True
    """
    for tensor in tensors_in(value):
        if fault := obstacle(tensor):
            raise ValueError(f"a tensor in it {fault}")
    total = hashlib.blake2b(digest_size=16)
    _feed(total, value)
    return total.hexdigest()


def _feed(total: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        total.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        total.update(tensor_bytes(value))
    elif isinstance(value, Mapping):
        total.update(f"mapping {len(value)}".encode())
        for key in sorted(value, key=repr):
            _feed(total, key)
            _feed(total, value[key])
    elif isinstance(value, list | tuple):
        total.update(f"list {len(value)}".encode())
        for item in value:
            _feed(total, item)
    else:
        total.update(f"{type(value).__name__} {value!r}".encode(errors="backslashreplace"))
