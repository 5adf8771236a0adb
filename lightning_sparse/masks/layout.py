"""Where the entries of a weight are: all in this process, or only some of them.

Only this file, :mod:`~lightning_sparse.masks.sums` and :mod:`~lightning_sparse.masks.derivatives` know how a weight can
be spread over processes: as a DTensor, by FSDP2 and tensor parallelism. All other code asks a :class:`Layout` which
entries this process holds, where they lie in the whole weight, and for sums over all processes that hold some. If
several processes hold the same entry, one of them owns it and counts it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_sparse.functional.masks import count_true
from lightning_sparse.masks.sums import largest_of_processes, rank, sum_of_group, sum_over_processes, world_size

__all__ = [
    "Block",
    "Layout",
    "Whole",
    "count_of_whole",
    "is_sharded",
    "laid_like",
    "layout_of",
    "local_part",
    "obstacle_of_shards",
    "saved_everywhere",
]


_everywhere: ContextVar[bool] = ContextVar("_everywhere", default=False)


@contextmanager
def saved_everywhere() -> Generator[None]:
    """Let every process get the whole of what is saved, so that training can resume from it at once."""
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)


class Layout(ABC):
    """How a weight of a given shape is laid out over the processes of a training run.

    Args:
        shape: Shape of the whole weight.

    Attributes:
        is_whole: Whether every process holds every entry.
    """

    is_whole: ClassVar[bool]

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    @property
    @abstractmethod
    def local_shape(self) -> torch.Size:
        """Shape of the part that this process holds."""

    @property
    @abstractmethod
    def owned(self) -> bool:
        """Whether this process counts its entries. Of several processes that hold the same entries, one counts them."""

    @property
    @abstractmethod
    def copies(self) -> int:
        """How many processes hold each entry."""

    @abstractmethod
    def local(self, tensor: Tensor) -> Tensor:
        """The part of ``tensor``, which is laid out like the weight, that this process holds. It shares memory."""

    @abstractmethod
    def take(self, whole: Tensor) -> Tensor:
        """This process's entries, taken from a tensor that it holds whole."""

    @abstractmethod
    def whole(self, local: Tensor) -> Tensor:
        """The inverse of :meth:`take`. A collective: every process must call it."""

    def saved(self, local: Tensor) -> Tensor:
        """The whole tensor for a checkpoint, on the CPU. Process 0 gets it, and writes it; others get an empty tensor.

        If every process holds every entry, or inside :func:`saved_everywhere`, all processes get the whole tensor. A
        collective, like :meth:`whole`.
        """
        whole = self.whole(local.detach())
        if rank() == 0 or self.is_whole or _everywhere.get():
            return whole.cpu()
        return torch.empty(0, dtype=local.dtype)

    @abstractmethod
    def sum(self, counts: Tensor) -> Tensor:
        """Counts of local entries, summed over all processes; each entry counts once. A collective."""

    @abstractmethod
    def largest(self, values: Tensor) -> Tensor:
        """The maximum of each value over all processes. A collective."""

    @abstractmethod
    def place_of(self, local_places: Tensor) -> Tensor:
        """Map places in the flattened local entries, ``int64``, to places in the flattened whole."""

    @abstractmethod
    def of_rows(self, leading: int) -> Layout:
        """The layout of one value for each row, if the first ``leading`` dimensions count rows.

        A process that holds a part of a row holds the row's value.
        """

    @abstractmethod
    def sum_rows(self, rows: Tensor, leading: int) -> Tensor:
        """Add up what each process computed for its part of a row, over the processes that hold parts of that row.

        Args:
            rows: A number for each local row, flat.
            leading: How many dimensions count rows.
        """

    @abstractmethod
    def cuts_rows(self, leading: int) -> bool:
        """Whether a row is divided among several processes. The first ``leading`` dimensions count rows."""

    @abstractmethod
    def divides(self, dim: int) -> int:
        """Into how many parts dimension ``dim`` is divided."""

    def places(self, device: torch.device) -> Tensor:
        """The place of each local entry in the flattened whole: ``int64``, of the local shape."""
        return self.place_of(torch.arange(self.local_shape.numel(), device=device)).view(self.local_shape)


@final
class Whole(Layout):
    """Every process holds every entry: a single device, or data-parallel training.

    Example:
        >>> layout = Whole(torch.Size([2, 2]))
        >>> layout.places(torch.device("cpu"))
        tensor([[0, 1],
                [2, 3]])
    """

    is_whole: ClassVar[bool] = True

    @property
    def local_shape(self) -> torch.Size:  # noqa: D102
        return self.shape

    @property
    def owned(self) -> bool:  # noqa: D102
        return rank() == 0

    @property
    def copies(self) -> int:  # noqa: D102
        return world_size()

    def local(self, tensor: Tensor) -> Tensor:  # noqa: D102
        return tensor

    def take(self, whole: Tensor) -> Tensor:  # noqa: D102
        return whole

    def whole(self, local: Tensor) -> Tensor:  # noqa: D102
        return local

    def sum(self, counts: Tensor) -> Tensor:  # noqa: D102
        return counts

    def largest(self, values: Tensor) -> Tensor:  # noqa: D102
        return values

    def place_of(self, local_places: Tensor) -> Tensor:  # noqa: D102
        return local_places

    def of_rows(self, leading: int) -> Layout:  # noqa: D102
        return Whole(self.shape[:leading])

    def sum_rows(self, rows: Tensor, leading: int) -> Tensor:  # noqa: D102
        return rows

    def cuts_rows(self, leading: int) -> bool:  # noqa: D102
        return False

    def divides(self, dim: int) -> int:  # noqa: D102
        return 1

    def __repr__(self) -> str:
        return "whole"


@final
class Block(Layout):
    """Each process holds a block of the entries, possibly an empty one, as a DTensor describes it.

    Args:
        shape: Shape of the whole weight.
        mesh: The processes that hold it.
        placements: How each dimension of the mesh divides the weight.
    """

    is_whole: ClassVar[bool] = False

    def __init__(self, shape: torch.Size, mesh: Any, placements: Sequence[Any]) -> None:
        super().__init__(shape)
        self._mesh, self._placements = mesh, tuple(placements)
        local_shape, offsets = compute_local_shape_and_global_offset(shape, mesh, self._placements)
        self._local_shape, self._offsets = torch.Size(local_shape), tuple(offsets)
        self._sizes: tuple[int, ...] = tuple(mesh.shape)
        pairs = list(zip(self._sizes, self._placements, strict=True))
        self._copies = world_size() // math.prod(size for size, placement in pairs if not _is_copied(placement))
        here = mesh.get_coordinate()
        is_first = all(at == 0 for at, placement in zip(here, self._placements, strict=True) if _is_copied(placement))
        self._owned = is_first and bool((mesh.mesh == 0).any())  # of several parallel meshes, the one with rank 0

    @property
    def local_shape(self) -> torch.Size:  # noqa: D102
        return self._local_shape

    @property
    def owned(self) -> bool:  # noqa: D102
        return self._owned

    @property
    def copies(self) -> int:  # noqa: D102
        return self._copies

    def local(self, tensor: Tensor) -> Tensor:  # noqa: D102
        return local_part(tensor)

    def take(self, whole: Tensor) -> Tensor:  # noqa: D102
        block = tuple(slice(at, at + size) for at, size in zip(self._offsets, self._local_shape, strict=True))
        return whole[block]

    def whole(self, local: Tensor) -> Tensor:  # noqa: D102
        bits = local.view(torch.uint8) if local.dtype == torch.bool else local
        gathered = self.as_dtensor(bits.contiguous()).full_tensor()
        return gathered.view(torch.bool) if local.dtype == torch.bool else gathered

    def sum(self, counts: Tensor) -> Tensor:  # noqa: D102
        return sum_over_processes(counts if self.owned else torch.zeros_like(counts))

    def largest(self, values: Tensor) -> Tensor:  # noqa: D102
        return largest_of_processes(values)

    def place_of(self, local_places: Tensor) -> Tensor:  # noqa: D102
        if self._local_shape[1:] == self.shape[1:]:  # contiguous in the whole
            return local_places + self._offsets[0] * math.prod(self.shape[1:])
        place, rest, stride = torch.zeros_like(local_places), local_places, 1
        for size, at, of_all in zip(*map(reversed, (self._local_shape, self._offsets, self.shape)), strict=True):
            place += (rest % max(1, size) + at) * stride
            rest, stride = rest // max(1, size), stride * of_all
        return place

    def of_rows(self, leading: int) -> Layout:  # noqa: D102
        placements = [Replicate() if _dim(each) >= leading else each for each in self._placements]
        return Block(self.shape[:leading], self._mesh, placements)

    def sum_rows(self, rows: Tensor, leading: int) -> Tensor:  # noqa: D102
        for mesh_dim in self._dims_that_cut(leading):
            rows = sum_of_group(rows, self._mesh.get_group(mesh_dim))
        return rows

    def cuts_rows(self, leading: int) -> bool:  # noqa: D102
        return bool(self._dims_that_cut(leading))

    def divides(self, dim: int) -> int:  # noqa: D102
        return math.prod(size for size, each in zip(self._sizes, self._placements, strict=True) if _dim(each) == dim)

    def _dims_that_cut(self, leading: int) -> list[int]:
        pairs = enumerate(zip(self._sizes, self._placements, strict=True))
        return [number for number, (size, each) in pairs if size > 1 and _dim(each) >= leading]

    def as_dtensor(self, local: Tensor) -> DTensor:
        """The whole tensor as a DTensor; ``local`` is this process's part."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(local, self._mesh, self._placements, run_check=False, shape=self.shape, stride=stride)

    def __repr__(self) -> str:
        names = self._mesh.mesh_dim_names or [f"dimension {number}" for number in range(len(self._sizes))]
        parts = zip(self._placements, self._sizes, names, strict=True)
        return ", ".join(f"{placement} over {size} of {name}" for placement, size, name in parts)


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a parameter.

    Example:
        >>> layout_of(torch.zeros(2, 3))
        whole
    """
    if isinstance(tensor, DTensor):
        return Block(tensor.shape, tensor.device_mesh, tensor.placements)
    return Whole(tensor.shape)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, so that processes may hold different entries of it."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds. It shares memory and has no autograd history."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local().detach()


def count_of_whole(parameter: Tensor, mask: Tensor) -> int:
    """Count the ``True`` entries of a parameter's whole mask, given the local part. A collective if it is sharded."""
    count = count_true(mask)
    if not is_sharded(parameter):
        return count
    return int(layout_of(parameter).sum(torch.tensor(count, device=mask.device)))


def laid_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Divide ``tensor`` as ``other`` is divided. A collective, unless it already is.

    If several processes hold a copy of a weight, its gradient may be a partial sum that is not reduced yet.
    """
    if isinstance(tensor, DTensor) and isinstance(other, DTensor) and tensor.placements != other.placements:
        return tensor.redistribute(other.device_mesh, other.placements)
    return tensor


def obstacle_of_shards(tensor: Tensor) -> str:
    """Why masks cannot work on a parameter that is divided this way; empty if they can.

    If tensor parallelism has already divided a dimension, FSDP2 interleaves the parts. If these are not equal in size,
    torch itself misreports which entries a process holds.
    """
    if not isinstance(tensor, DTensor):
        return ""
    if tensor.device_mesh.get_coordinate() is None:
        return "this process holds no part of it, as in a pipeline"
    layout = Block(tensor.shape, tensor.device_mesh, tensor.placements)
    for placement in tensor.placements:
        if not (_is_copied(placement) or placement.is_shard() or _is_strided(placement)):
            return f"its placement {placement} is neither a shard nor a copy of it"
        dim = _dim(placement)
        if _is_strided(placement) and tensor.shape[dim] % layout.divides(dim):
            return (
                f"FSDP2 and tensor parallelism divide its dimension {dim} of {tensor.shape[dim]} into"
                f" {layout.divides(dim)} parts that are not equal in size"
            )
    return ""


def _is_copied(placement: Any) -> bool:
    return bool(placement.is_replicate())


def _is_strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"


def _dim(placement: Any) -> int:
    """The dimension that a placement divides; -1 if it divides none."""
    return getattr(placement, "dim", -1)
