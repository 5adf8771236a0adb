"""Which masks are allowed within a layer: any, N:M, the same fan-in for all neurons, whole filters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.masks import on_cpu, row_counts
from lightning_sparse.functional.selection import Key
from lightning_sparse.masks.layout import layout_of
from lightning_sparse.masks.plan import Candidate
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.schedules import as_number

__all__ = ["AnyPattern", "ConstantFanIn", "Filters", "NofM", "Pattern", "as_pattern"]

_FEW = 8  # weights of a block that are compared with each other in less time than a sort takes


class Pattern(ABC):
    """A rule for the masks of a layer; chooses active weights under this rule."""

    @abstractmethod
    def refuses(self, candidate: Candidate, *, is_last: bool) -> str:
        """Why a weight cannot have such a mask and stays dense; empty where it can.

        Args:
            candidate: A weight.
            is_last: Whether it is the last of the module that would be masked: the output layer, as a rule.
        """

    def least(self, weight: MaskedWeight) -> int:
        """The fewest weights that are left of a layer, whatever its budget."""
        return 0

    @abstractmethod
    def feasible(self, weight: MaskedWeight, budget: int, among: Tensor) -> int:
        """The most weights, of at most ``budget`` or :meth:`least`, that such a mask can hold within ``among``."""

    @abstractmethod
    def largest(self, weight: MaskedWeight, scores: Tensor, k: int, among: Tensor, key: Key | None = None) -> Tensor:
        """The mask of this pattern with the largest scores.

        Args:
            weight: The layer.
            scores: Floating point, of the weight's shape; what is infinite is chosen before all else.
            k: How many to choose; a number that :meth:`feasible` gave for the same ``among``.
            among: ``bool``, of the weight's shape: the entries that may be chosen.
            key: What is compared instead of the scores.

        Returns:
            ``bool``, of the weight's shape.
        """


@final
@dataclass(frozen=True)
class AnyPattern(Pattern):
    """Any weights: unstructured sparsity."""

    def refuses(self, candidate: Candidate, *, is_last: bool) -> str:  # noqa: D102
        return ""

    def feasible(self, weight: MaskedWeight, budget: int, among: Tensor) -> int:  # noqa: D102
        return budget

    def largest(  # noqa: D102
        self, weight: MaskedWeight, scores: Tensor, k: int, among: Tensor, key: Key | None = None
    ) -> Tensor:
        return weight.largest(scores, k, among, key)


@final
@dataclass(frozen=True)
class NofM(Pattern):
    """At most ``n`` of every ``m`` neighbours along the inputs are active; GPUs execute 2:4.

    If a budget allows more weights, a looser rule holds: ``⌊m · budget / numel⌋`` of ``m``, or ``n`` if that is larger.
    A layer whose number of inputs is not a multiple of ``m`` stays dense.

    Args:
        n: Active weights of each block, at least 1.
        m: Weights of a block, more than ``n``. In a convolution a block runs along the input channels, at one place
            of the kernel.

    Raises:
        ValueError: Not 1 ≤ n < m.

    Example:
        >>> NofM(2, 4)
        NofM(n=2, m=4)
        >>> NofM(4, 2)
        Traceback (most recent call last):
            ...
        ValueError: NofM(n=4, m=2): n weights of every m are active; give 1 ≤ n < m, such as NofM(2, 4).
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            object.__setattr__(self, name, as_number(getattr(self, name)))
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (self.n, self.m))
        if not (whole and 1 <= self.n < self.m):
            raise ValueError(f"{self}: n weights of every m are active; give 1 ≤ n < m, such as NofM(2, 4).")

    def refuses(self, candidate: Candidate, *, is_last: bool) -> str:  # noqa: D102
        inputs = _inputs(candidate)
        if inputs % self.m:
            return f"pattern: {inputs} inputs are not a multiple of {self.m}"
        layout = layout_of(candidate.parameter)
        parts = layout.divides(candidate.leading)
        if layout.cuts_rows(candidate.leading + 1) or inputs % (parts * self.m):
            return f"pattern: its {inputs} inputs are divided into {parts} parts, none of which may cut {self.m}"
        return _refuses_sharded(candidate)

    def feasible(self, weight: MaskedWeight, budget: int, among: Tensor) -> int:  # noqa: D102
        active = self._blocks(weight, among).sum(dim=2)  # (outputs, blocks, kernel)
        for looser in range(self._at_most(weight, budget), self.n, -1):
            if not weight.count(active < looser):  # every block can hold as many: the looser rule is met exactly
                return looser * (weight.numel // self.m)
        return min(budget, int(weight.layout.sum(active.clamp(max=self.n).sum())))

    def largest(  # noqa: D102
        self, weight: MaskedWeight, scores: Tensor, k: int, among: Tensor, key: Key | None = None
    ) -> Tensor:
        if k >= weight.numel:
            return among.clone()
        keys = (scores if key is None else key(scores)).masked_fill(~among, -torch.inf)
        return weight.largest(keys, k, self._best(weight, keys, self._at_most(weight, k)) & among)

    def best(self, weight: MaskedWeight, scores: Tensor) -> Tensor:
        """The mask with the ``n`` largest scores of every block; takes a fifth of the time of :meth:`largest`.

        Args:
            weight: The layer.
            scores: Floating point, of the weight's shape.

        Returns:
            ``bool``, of the weight's shape.
        """
        return self._best(weight, scores, self.n)

    def _best(self, weight: MaskedWeight, scores: Tensor, n: int) -> Tensor:
        best = _largest_of_each(self._blocks(weight, scores), n)
        return weight.from_rows(best.flatten(1))

    def _at_most(self, weight: MaskedWeight, budget: int) -> int:
        """Active weights that a block may hold under this budget."""
        return max(self.n, min(self.m, self.m * budget // weight.numel))

    def _blocks(self, weight: MaskedWeight, tensor: Tensor) -> Tensor:
        rows = weight.rows(tensor)
        kernel = weight.candidate.fan_in // _inputs(weight.candidate)
        return rows.reshape(len(rows), rows.shape[1] // kernel // self.m, self.m, kernel)


@final
@dataclass(frozen=True)
class ConstantFanIn(Pattern):
    """The same number of active inputs for each neuron, except for neurons that are pruned completely.

    If the budget is smaller than the number of neurons, the neurons with the largest scores keep one input each.
    """

    def refuses(self, candidate: Candidate, *, is_last: bool) -> str:  # noqa: D102
        if layout_of(candidate.parameter).cuts_rows(candidate.leading):
            return "pattern: the inputs of a neuron are divided between processes; divide its outputs instead"
        return _refuses_sharded(candidate)

    def feasible(self, weight: MaskedWeight, budget: int, among: Tensor) -> int:  # noqa: D102
        fan_ins = row_counts(weight.rows(among))
        alive = weight.count_rows(fan_ins > 0)
        if budget < alive or alive == 0:
            return min(budget, alive)
        # The smallest of those alive: the largest of what each lacks of a whole row.
        missing = torch.where(fan_ins > 0, weight.candidate.fan_in - fan_ins, 0)
        most = torch.cat([missing, missing.new_zeros(1)]).max()
        return min(budget // alive, weight.candidate.fan_in - int(weight.layout.largest(most))) * alive

    def largest(  # noqa: D102
        self, weight: MaskedWeight, scores: Tensor, k: int, among: Tensor, key: Key | None = None
    ) -> Tensor:
        eligible = weight.rows(among)
        counts = row_counts(eligible)
        alive, keys = counts > 0, weight.rows(scores if key is None else key(scores))
        if not on_cpu(keys) or int(counts.sum()) < keys.numel():  # as a rule all are, where a layer grows
            keys = torch.where(eligible, keys, -torch.inf)
        fan_in = k // max(1, weight.count_rows(alive))
        if fan_in == 0:
            fan_in, eligible = 1, eligible & weight.largest_rows(keys.amax(dim=1), k, alive).unsqueeze(1)
            keys = keys.masked_fill(~eligible, -torch.inf)
        # A partition finds the last of each row; those that equal it are taken in the order of their places.
        last = keys.topk(fan_in, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        if on_cpu(keys):  # as a rule no others equal it
            chosen = (keys >= last).logical_and_(eligible)
            if not (row_counts(chosen) > fan_in).any():
                return weight.from_rows(chosen)
        above, ties = keys > last, keys == last
        missing = fan_in - above.sum(dim=1, keepdim=True, dtype=torch.int32)
        chosen = above | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= missing))
        return weight.from_rows(chosen & eligible)


@final
@dataclass(frozen=True)
class Filters(Pattern):
    """Whole output neurons or filters, ranked by the Euclidean norm of their scores; the output layer stays dense.

    Every layer keeps at least one.
    """

    def refuses(self, candidate: Candidate, *, is_last: bool) -> str:  # noqa: D102
        return "pattern: the outputs of the last layer are all needed" if is_last else _refuses_sharded(candidate)

    @override
    def least(self, weight: MaskedWeight) -> int:
        return weight.candidate.fan_in

    def feasible(self, weight: MaskedWeight, budget: int, among: Tensor) -> int:  # noqa: D102
        fan_in = weight.candidate.fan_in
        return min(max(1, budget // fan_in), weight.count_rows(_has_some(weight, among))) * fan_in

    def largest(  # noqa: D102
        self, weight: MaskedWeight, scores: Tensor, k: int, among: Tensor, key: Key | None = None
    ) -> Tensor:
        rows = weight.rows(scores if key is None else key(scores))
        norms = weight.sum_rows(rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(dim=1))
        chosen = weight.largest_rows(norms, k // weight.candidate.fan_in, _has_some(weight, among))
        return weight.from_rows(chosen.unsqueeze(1).expand_as(rows).contiguous())


def as_pattern(value: Pattern | str) -> Pattern:
    """A pattern object, unchanged, or the pattern of a short form: ``"any"``, or ``"2:4"`` for ``NofM(2, 4)``.

    Raises:
        ValueError: The value is not a pattern.

    Example:
        >>> as_pattern("2:4")
        NofM(n=2, m=4)
    """
    if isinstance(value, Pattern):
        return value
    if value == "any":
        return AnyPattern()
    n, _, m = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not (n.strip().isdecimal() and m.strip().isdecimal()):
        raise ValueError(
            f"pattern is {value!r}; give 'any', N of M as '2:4', or one of NofM(2, 4), ConstantFanIn(), Filters()."
        )
    return NofM(int(n), int(m))


def _largest_of_each(blocks: Tensor, n: int) -> Tensor:
    """Where the ``n`` largest of dimension 2 are; equal ones are taken in the order of their places on any device."""
    m = blocks.shape[2]
    if m > _FEW:
        order = blocks.argsort(dim=2, descending=True, stable=True)[:, :, :n]
        return torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, order, True)
    places = [place.contiguous() for place in blocks.unbind(2)]
    ahead = [torch.zeros_like(place, dtype=torch.int8) for place in places]  # how many come before each
    for i in range(m):
        for j in range(i + 1, m):
            later_first = places[j] > places[i]
            ahead[i] += later_first
            ahead[j] += ~later_first
    return torch.stack([count < n for count in ahead], dim=2)


def _inputs(candidate: Candidate) -> int:
    """Inputs of each output: the input channels of a convolution, whose kernels are not counted."""
    return candidate.fan_in // math.prod(candidate.layer_shape[2:])


def _has_some(weight: MaskedWeight, mask: Tensor) -> Tensor:
    """Which rows hold some of a mask, wherever these are."""
    has = row_counts(weight.rows(mask)) > 0
    return has if weight.layout.is_whole else weight.sum_rows(has.to(torch.int32)) > 0


def _refuses_sharded(candidate: Candidate) -> str:
    """Why no pattern can be kept in a weight as it is divided."""
    if candidate.input_first and not layout_of(candidate.parameter).is_whole:
        return "pattern: it stores its inputs first, and processes hold parts of it; leave it out of fully_shard"
    return ""
