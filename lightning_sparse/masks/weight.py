"""A weight with its mask, and weights that are ranked together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparse.functional import selection
from lightning_sparse.functional.masks import counts_true, memory_order, multiplier, zero_pruned_
from lightning_sparse.functional.selection import Key, Scores
from lightning_sparse.masks.layout import Layout, Whole
from lightning_sparse.masks.plan import Candidate

__all__ = ["MaskPool", "MaskedWeight"]


# Weights of a layer for which a second mask, as wide as the weights, is kept: 1 MiB. A step of a network of such layers
# is so short that reading a mask of bytes shows.
_SMALL = 2**18


class MaskedWeight:
    """A weight and its mask.

    :attr:`value`, :attr:`grad` and :attr:`mask` are what this process holds; :attr:`shape`, :attr:`numel` and
    :attr:`num_active` are those of the whole weight.

    Attributes:
        name: Name in the plain module.
        parameter: The parameter; the module's own, not a copy.
        module_type: Name of the class of the module that owns it.
        layout: Where its entries are.
        mask: ``bool``, shape and strides of the value; ``True`` = active. A view into its group's flat mask.
        num_active: Active weights, as counted at the last update.
        budget: Active weights that the method allows.
    """

    def __init__(self, candidate: Candidate, flat_mask: Tensor) -> None:
        self.name = candidate.name
        self.parameter = candidate.parameter
        self.module_type = candidate.module_type
        self.layout: Layout = Whole(candidate.parameter.shape)
        self.mask = _view_as(flat_mask, self.value)
        self.num_active = self.budget = self.numel
        self._candidate = candidate
        self._multiplier = self.mask

    # What it is.

    @property
    def value(self) -> Tensor:
        """The entries that this process holds; writing to them writes to the parameter."""
        return self.layout.local(self.parameter.detach())

    @property
    def grad(self) -> Tensor:
        """The gradient of :attr:`value`; zeros where the weight took no part in the loss."""
        grad = self.parameter.grad
        return torch.zeros_like(self.value) if grad is None else self.layout.local(grad)

    @property
    def numel(self) -> int:
        """Number of weights, pruned ones included."""
        return self.layout.shape.numel()

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.layout.shape

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer: that of the weight, or of one of its :attr:`copies`."""
        return self._candidate.layer_shape

    @property
    def copies(self) -> int:
        """Layers of one shape that lie in the weight, as the experts of a mixture; 1 for all others."""
        return self._candidate.copies

    @property
    def unshared_numel(self) -> int:
        """Number of weights that the module would have here if each use had its own."""
        return self.numel * self._candidate.uses

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]."""
        return 1.0 - self.num_active / self.numel

    @property
    def target_sparsity(self) -> float:
        """Sparsity of the budget: what the method allows since its last update."""
        return 1.0 - self.budget / self.numel

    @property
    def candidate(self) -> Candidate:
        """Its entry in the plan."""
        return self._candidate

    @property
    def is_in_place(self) -> bool:
        """Whether the module still holds the parameter where it was found."""
        return getattr(self._candidate.owner, self._candidate.local_name, None) is self.parameter

    @property
    def lies_as_its_mask(self) -> bool:
        """Whether the value has the order in memory and the device of the mask."""
        value = self.value
        return value.stride() == self.mask.stride() and value.device == self.mask.device

    def follow(self, candidate: Candidate) -> None:
        """Be the mask of another parameter of the same shape, which has taken this one's place in the module."""
        self._candidate, self.parameter = candidate, candidate.parameter

    # How its entries are ranked and counted.

    def smallest(self, scores: Scores, k: int, among: Tensor | None = None, key: Key | None = None) -> Tensor:
        """The mask of the ``k`` smallest scores of the whole weight, of this process' entries.

        Args:
            scores: Floating point, shaped like :attr:`value`.
            k: How many of the whole to choose.
            among: ``bool``: the entries that may be chosen; all active ones by default.
            key: What is compared instead of the scores; see :func:`~lightning_sparse.functional.smallest`.
        """
        return selection.smallest(scores, k, self.mask if among is None else among, key)

    def largest(self, scores: Scores, k: int, among: Tensor | None = None, key: Key | None = None) -> Tensor:
        """The mask of the ``k`` largest scores; see :meth:`smallest`."""
        return selection.largest(scores, k, self.mask if among is None else among, key)

    def count(self, mask: Tensor) -> int:
        """The number of ``True`` of the whole, of a mask shaped like :attr:`value`."""
        return counts_true([mask])[0]

    # How its entries lie.

    def rows(self, tensor: Tensor) -> Tensor:
        """``tensor``, of the weight's shape, as ``(outputs, fan-in)``: one row for each output neuron or filter.

        Right for linear, (grouped, transposed) convolution and recurrent layers, where a row is one gate of one unit.
        """
        return self._candidate.rows(tensor)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`: shape ``(outputs, fan-in)`` to the weight's."""
        return self._candidate.from_rows(rows)

    def flatten(self, tensor: Tensor) -> Tensor:
        """``tensor``, of the weight's shape, in the order of the group's flat mask."""
        return tensor.permute(memory_order(self.mask)).reshape(-1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """The inverse of :meth:`flatten`, as a view."""
        return _view_as(flat, self.mask)

    # What masks do to it.

    @torch.no_grad()
    def apply_(self) -> None:
        """Zero the pruned weights."""
        self.zero_pruned_(self.value)

    def zero_pruned_(self, tensor: Tensor) -> None:
        """Zero the entries of ``tensor``, of the weight's shape, where weights were pruned at the last count."""
        as_wide = self._multiplier.element_size() == tensor.element_size()
        zero_pruned_(tensor, self._multiplier if as_wide else self.mask)

    def recount(self, num_active: int) -> None:
        """Take the number of active weights, and make what follows from a new mask."""
        self.num_active = num_active
        if self.mask.numel() <= _SMALL:
            self._multiplier = multiplier(self.mask, self.parameter.dtype)

    def lay_mask(self, flat_mask: Tensor) -> None:
        """Move the mask into ``flat_mask``, in the order in which the value lies in memory now."""
        mask = _view_as(flat_mask, self.value)
        mask.copy_(self.mask)
        self.mask = self._multiplier = mask
        self.recount(self.num_active)

    def __repr__(self) -> str:
        return f"MaskedWeight({self.name}, {tuple(self.shape)}, sparsity={self.sparsity:.4f})"


class MaskPool(Sequence[MaskedWeight]):
    """Weights that are ranked together, with their masks, all active at first.

    Args:
        candidates: The weights, on one device.

    Attributes:
        mask: The masks of all its weights in one flat ``bool`` tensor; each weight's mask is a view of a part.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        sizes = [candidate.parameter.numel() for candidate in candidates]
        self.mask = torch.ones(sum(sizes), dtype=torch.bool, device=_device_of([c.parameter for c in candidates]))
        parts = self.mask.split(sizes)
        self._weights = [MaskedWeight(candidate, part) for candidate, part in zip(candidates, parts, strict=True)]

    def lay_masks(self) -> None:
        """Lay all masks anew, in the order in which the weights lie in memory now, and where they are."""
        sizes = [weight.mask.numel() for weight in self]
        device = _device_of([weight.parameter for weight in self])
        self.mask = torch.empty(sum(sizes), dtype=torch.bool, device=device)
        for weight, part in zip(self, self.mask.split(sizes), strict=True):
            weight.lay_mask(part)

    def __getitem__(self, index: int) -> MaskedWeight:  # type: ignore[override]
        return self._weights[index]

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def numel(self) -> int:
        """Number of weights, pruned ones included."""
        return sum(weight.numel for weight in self)

    @property
    def unshared_numel(self) -> int:
        """Number of weights that there would be if each use of a shared one had its own; budgets count these."""
        return sum(weight.unshared_numel for weight in self)

    @property
    def num_active(self) -> int:
        """Active weights, as counted at the last update."""
        return sum(weight.num_active for weight in self)

    # How its entries are ranked and counted.

    def smallest(self, scores: Scores, k: int, among: Tensor, key: Key | None = None) -> Tensor:
        """The flat mask of the ``k`` smallest scores of all weights together; see :meth:`MaskedWeight.smallest`.

        Args:
            scores: One tensor for each weight, in the order of :meth:`flat`.
            k: How many of the whole to choose.
            among: ``bool``, flat: the entries that may be chosen.
            key: What is compared instead of the scores.
        """
        return selection.smallest(scores, k, among, key)

    def count(self, flat_mask: Tensor) -> int:
        """The number of ``True`` of the whole, of a flat mask in the order of :attr:`mask`."""
        return counts_true([flat_mask])[0]

    # How its entries lie.

    def flat(self, what: Callable[[MaskedWeight], Tensor]) -> list[Tensor]:
        """What is asked of each weight, of its shape, as flat tensors in the order of :attr:`mask`; no copies."""
        return [weight.flatten(what(weight)) for weight in self]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor for each weight, shaped like it, in one flat tensor in the order of :attr:`mask`."""
        return torch.cat([weight.flatten(tensor) for weight, tensor in zip(self, tensors, strict=True)])

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor in the order of :attr:`mask` as one view for each weight, shaped like it."""
        parts = flat.split([weight.mask.numel() for weight in self])
        return [weight.unflatten(part) for weight, part in zip(self, parts, strict=True)]

    # What masks do.

    def recount(self) -> None:
        """Count the active weights anew; one transfer from a device that is not the CPU."""
        for weight, num_active in zip(self, counts_true([weight.mask for weight in self]), strict=True):
            weight.recount(num_active)

    def apply_(self) -> None:
        """Zero the pruned weights."""
        for weight in self:
            weight.apply_()


def _view_as(flat: Tensor, like: Tensor) -> Tensor:
    """A flat tensor as a view with the shape and the order in memory of ``like``."""
    order = memory_order(like)
    inverse = [order.index(dim) for dim in range(len(order))]
    return flat.view([like.shape[dim] for dim in order]).permute(inverse)


def _device_of(parameters: Sequence[nn.Parameter]) -> torch.device:
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        raise MisconfigurationException(
            f"The weights of one optimizer lie on {', '.join(sorted(map(str, devices)))}, and masks are ranked on"
            " one device. Use one optimizer, and one method with include=, for each device."
        )
    return devices.pop()
