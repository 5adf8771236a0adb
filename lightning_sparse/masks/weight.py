"""A weight with its mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_sparse.functional import selection
from lightning_sparse.functional.held import Held
from lightning_sparse.functional.masks import counts_true, memory_order, multiplier, zero_pruned_
from lightning_sparse.functional.selection import Key, Scores
from lightning_sparse.functional.spread import smallest_of_spread
from lightning_sparse.masks.layout import Layout, layout_of, local_part
from lightning_sparse.masks.plan import Candidate
from lightning_sparse.masks.sums import sum_over_processes

__all__ = ["MaskedWeight", "view_as"]

# Weights of a layer for which a second mask, as wide as the weights, is kept: 1 MiB. A step of a network of such layers
# is so short that reading a mask of bytes shows.
_SMALL = 2**18


class MaskedWeight:
    """A weight and its mask.

    If the weight is sharded, :attr:`value`, :attr:`grad` and :attr:`mask` are this process's part;
    :attr:`shape`, :attr:`numel` and :attr:`num_active` describe the whole weight.

    Attributes:
        name: Name in the plain module.
        parameter: The module's own parameter, not a copy.
        module_type: Class name of the module that owns the parameter.
        layout: Which process holds which entries.
        mask: ``bool``, shape and strides of the value; ``True`` = active. A view into its group's flat mask.
        num_active: Number of active weights, as counted at the last update.
        budget: Number of active weights that the method allows.
    """

    def __init__(self, candidate: Candidate, flat_mask: Tensor) -> None:
        self.name = candidate.name
        self.parameter = candidate.parameter
        self.module_type = candidate.module_type
        self.layout: Layout = layout_of(candidate.parameter)
        self.mask = view_as(flat_mask, self.value)
        self.num_active = self.budget = self.numel
        self._candidate = candidate
        self._multiplier = self.mask

    # What it is.

    @property
    def value(self) -> Tensor:
        """The entries that this process holds; writing to them writes to the parameter."""
        return local_part(self.parameter)

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
        """Shape of the weight, or of one of its :attr:`copies`."""
        return self._candidate.layer_shape

    @property
    def copies(self) -> int:
        """Layers of one shape that lie in the weight, as the experts of a mixture; 1 for all others."""
        return self._candidate.copies

    @property
    def unshared_numel(self) -> int:
        """Number of weights if each use of a shared weight had its own copy."""
        return self.numel * self._candidate.uses

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]."""
        return 1.0 - self.num_active / self.numel

    @property
    def target_sparsity(self) -> float:
        """Sparsity of the budget that the method set at its last update."""
        return 1.0 - self.budget / self.numel

    @property
    def candidate(self) -> Candidate:
        """The weight's entry in the plan."""
        return self._candidate

    @property
    def is_in_place(self) -> bool:
        """Whether the module still holds the parameter where it was found."""
        # FSDP2 itself puts the whole of a weight in its place for as long as a forward or backward needs it.
        its = getattr(self._candidate.owner, self._candidate.local_name, None)
        return its is self.parameter or not self.layout.is_whole

    @property
    def lies_as_its_mask(self) -> bool:
        """Whether the value has the memory layout and the device of the mask."""
        value = self.value
        return value.stride() == self.mask.stride() and value.device == self.mask.device

    def follow(self, candidate: Candidate) -> None:
        """Become the mask of another parameter of the same shape that has replaced this one in the module."""
        self._candidate, self.parameter = candidate, candidate.parameter

    # How its entries are ranked and counted.

    def smallest(self, scores: Scores, k: int, among: Tensor | None = None, key: Key | None = None) -> Tensor:
        """The mask of the ``k`` smallest scores of the whole weight; if it is sharded, this process's part of the mask.

        Args:
            scores: Floating point, shaped like :attr:`value`.
            k: How many of the whole to choose.
            among: ``bool``: the entries that may be chosen; all active ones by default.
            key: What is compared instead of the scores; see :func:`~lightning_sparse.functional.smallest`.
        """
        among = self.mask if among is None else among
        if self.layout.is_whole:
            return selection.smallest(scores, k, among, key)
        scores = scores if isinstance(scores, Tensor) else torch.cat([part.reshape(-1) for part in scores])
        return _smallest(self.layout, scores, k, among, key)

    def largest(self, scores: Scores, k: int, among: Tensor | None = None, key: Key | None = None) -> Tensor:
        """The mask of the ``k`` largest scores; see :meth:`smallest`."""
        return self.smallest(scores, k, among, key=selection.negated(key))

    def count(self, mask: Tensor) -> int:
        """The number of ``True`` in a mask shaped like :attr:`value`, over all processes. A collective if sharded."""
        counted = counts_true([mask])
        return counted[0] if self.layout.is_whole else _sums(self.layout, counted, mask.device)[0]

    # How its rows are ranked and counted.

    def largest_rows(self, scores: Tensor, k: int, among: Tensor) -> Tensor:
        """The mask of the ``k`` rows with the largest scores; if the weight is sharded, this process's part of it.

        Args:
            scores: Floating point, one for each row of :meth:`rows`.
            k: How many of the whole to choose.
            among: ``bool``: the rows that may be chosen.
        """
        if self.layout.is_whole:
            return selection.largest(scores, k, among)
        return _smallest(self.rows_layout, scores, k, among, torch.neg)

    def count_rows(self, mask: Tensor) -> int:
        """The number of ``True`` of the whole, of one for each row. A collective where the weight is sharded."""
        counted = counts_true([mask])
        return counted[0] if self.layout.is_whole else _sums(self.rows_layout, counted, mask.device)[0]

    def sum_rows(self, rows: Tensor) -> Tensor:
        """A number for each row, summed over processes if several hold parts of the row; then a collective."""
        return self.layout.sum_rows(rows, self._candidate.leading)

    @property
    def cuts_rows(self) -> bool:
        """Whether several processes hold parts of a row."""
        return self.layout.cuts_rows(self._candidate.leading)

    @property
    def rows_layout(self) -> Layout:
        """Where its rows are."""
        return self.layout.of_rows(self._candidate.leading)

    # How its entries lie.

    def rows(self, tensor: Tensor) -> Tensor:
        """``tensor``, shaped like :attr:`value`, as ``(outputs, fan-in)``: one row for each output neuron or filter.

        This works for linear layers, (grouped, transposed) convolutions and recurrent layers, where a row is one gate
        of one unit. If the weight is sharded, these are the rows, or parts of rows, that this process holds.
        """
        return self._candidate.rows(tensor)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`: shape ``(outputs, fan-in)`` to the weight's."""
        if self.layout.is_whole:
            return self._candidate.from_rows(rows)
        return rows.reshape(self.layout.local_shape)

    def flatten(self, tensor: Tensor) -> Tensor:
        """``tensor``, of the weight's shape, in the order of the group's flat mask."""
        return tensor.permute(memory_order(self.mask)).reshape(-1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """The inverse of :meth:`flatten`, as a view."""
        return view_as(flat, self.mask)

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
        """Set the number of active weights, and compute what depends on a new mask."""
        self.num_active = num_active
        if self.mask.numel() <= _SMALL:
            self._multiplier = multiplier(self.mask, self.parameter.dtype)

    def lay_mask(self, flat_mask: Tensor) -> None:
        """Move the mask into ``flat_mask``, in the order in which the value lies in memory now."""
        mask = view_as(flat_mask, self.value)
        mask.copy_(self.mask)
        self.mask = self._multiplier = mask
        self.recount(self.num_active)

    def __repr__(self) -> str:
        return f"MaskedWeight({self.name}, {tuple(self.shape)}, sparsity={self.sparsity:.4f})"


def _smallest(layout: Layout, scores: Tensor, k: int, among: Tensor, key: Key | None) -> Tensor:
    """The local mask of the ``k`` smallest scores of the whole tensor, given the local part of the scores."""
    held = Held(scores.reshape(-1), layout.place_of, layout.owned)
    chosen = smallest_of_spread([held], k, among.reshape(-1), layout.shape.numel(), sum_over_processes, key)
    return chosen.view(among.shape)


def _sums(layout: Layout, counts: Sequence[int], device: torch.device) -> list[int]:
    """Sum counts of local entries over all processes."""
    return layout.sum(torch.tensor(counts, device=device)).tolist()  # type: ignore[no-any-return]


def view_as(flat: Tensor, like: Tensor) -> Tensor:
    """A flat tensor as a view with the shape and the order in memory of ``like``."""
    order = memory_order(like)
    inverse = [order.index(dim) for dim in range(len(order))]
    return flat.view([like.shape[dim] for dim in order]).permute(inverse)
