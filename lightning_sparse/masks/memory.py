"""Parameters that are not one, but lie in the same memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["SHARED", "overlapping"]

SHARED = (
    "The entries of {names} share their memory but are two parameters, which would have two masks. Make them one"
    " parameter, as in decoder.weight = encoder.weight, or leave both out with exclude=."
)
"""Why two weights cannot both be masked, and what to do."""


def overlapping(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """The pairs of tensors that have an entry of memory in common, by their places in ``tensors``.

    Views that divide a storage between them, as the weights of a recurrent layer on a GPU or the columns of one matrix,
    have none.

    Example:
        >>> whole = torch.zeros(3, 4)
        >>> overlapping([whole, whole.t(), torch.zeros(2)]), overlapping([whole[:, ::2], whole[:, 1::2]])
        ([(0, 1)], [])
    """
    by_storage: defaultdict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        address = _address(tensor)
        if address:
            by_storage[address].append((place, tensor))
    return [
        (place, other_place)
        for members in by_storage.values()
        for index, (place, tensor) in enumerate(members)
        for other_place, other in members[index + 1 :]
        if _overlap(tensor, other)
    ]


def _address(tensor: Tensor) -> int:
    """Where the storage of ``tensor`` begins; 0 where it has none of its own, as on the meta device."""
    try:
        return tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    except (RuntimeError, NotImplementedError):  # tensors of other libraries, and uninitialised ones
        return 0


def _overlap(first: Tensor, second: Tensor) -> bool:
    (start, end), (other_start, other_end) = _extent(first), _extent(second)
    if end <= other_start or other_end <= start:
        return False
    if first.element_size() != second.element_size():
        return True
    # Their extents overlap; the entries may still alternate. A byte for each place tells.
    size = first.element_size()
    begin, length = min(start, other_start), (max(end, other_end) - min(start, other_start)) // size
    ours, theirs = (torch.zeros(length, dtype=torch.bool, device="cpu") for _ in range(2))
    for places, tensor, at in ((ours, first, start), (theirs, second, other_start)):
        places.view(-1)[_places(tensor) + (at - begin) // size] = True
    return bool((ours & theirs).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage from the first that it has to the last."""
    size = tensor.element_size()
    reach = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * size
    return start, start + (int(reach) + 1) * size


def _places(tensor: Tensor) -> Tensor:
    """Where each entry is, counted from the first."""
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + torch.arange(length, device="cpu") * stride).reshape(-1)
    return places
