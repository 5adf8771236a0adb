"""The history of masks since training began, at three bits per weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

from torch import Tensor

from lightning_sparse.functional.masks import pack
from lightning_sparse.functional.topology import count_bits
from lightning_sparse.masks.schema import Check, bits, mapping_of

__all__ = ["HISTORY_FIELDS", "HistoryState", "MaskHistory"]

PackedMasks = dict[str, Tensor]
Sum = Callable[[Mapping[str, int]], Sequence[int]]

HISTORY_FIELDS: Mapping[str, Check] = {part: mapping_of(bits) for part in ("initial", "latest", "ever_active")}
"""What the fields of a saved :class:`MaskHistory` may be."""


class HistoryState(TypedDict):
    """A :class:`MaskHistory` in a checkpoint: packed masks by name."""

    initial: PackedMasks
    latest: PackedMasks
    ever_active: PackedMasks


class MaskHistory:
    """Keeps the first masks, the latest masks and the union of all masks, each packed to one bit per weight.

    Args:
        masks: The masks with which training begins, by name; where weights are sharded, of what this process holds.
        sum_: Adds up counts, by name, over the processes of a sharded training; where given, what is asked of the
            history is a collective.

    Example:
        >>> import torch
        >>> history = MaskHistory({"weight": torch.tensor([True, True, False, False])})
        >>> history.observe({"weight": torch.tensor([True, False, True, False])})
        0.5
        >>> history.observe({"weight": torch.tensor([True, True, False, False])})
        0.5
        >>> history.changed_since_start, history.ever_active
        (0.0, 0.75)
    """

    def __init__(self, masks: Mapping[str, Tensor], sum_: Sum | None = None) -> None:
        self._sum = sum_ or _of_this_process
        self._sizes = {name: mask.numel() for name, mask in masks.items()}
        self._initial: PackedMasks = {name: pack(mask) for name, mask in masks.items()}
        self._latest: PackedMasks = self._initial
        self._ever_active: PackedMasks = self._initial

    def add(self, masks: Mapping[str, Tensor]) -> None:
        """Take in the first masks of weights that had none until now; of the others nothing changes."""
        new = {name: mask for name, mask in masks.items() if name not in self._latest}
        first = {name: pack(mask) for name, mask in new.items()}
        self._sizes |= {name: mask.numel() for name, mask in new.items()}
        self._initial = self._initial | first
        self._latest = self._latest | first
        self._ever_active = self._ever_active | first

    def observe(self, masks: Mapping[str, Tensor]) -> float:
        """Take in ``masks``, of the names and shapes of the first and of those added since.

        Returns:
            The share of entries that have changed since the last time, in [0, 1].
        """
        before, self._latest = self._latest, {name: pack(mask) for name, mask in masks.items()}
        self._ever_active = {name: bits | self._latest[name] for name, bits in self._ever_active.items()}
        return self._share({name: before[name] ^ bits for name, bits in self._latest.items()})

    @property
    def changed_since_start(self) -> float:
        """The share of entries that differ from those with which training began, in [0, 1]."""
        return self._share({name: self._initial[name] ^ bits for name, bits in self._latest.items()})

    @property
    def ever_active(self) -> float:
        """The share of weights that were active in some mask taken in, in [0, 1]."""
        return self._share(self._ever_active)

    def state_dict(self) -> HistoryState:
        """What a checkpoint must hold."""
        return {"initial": self._initial, "latest": self._latest, "ever_active": self._ever_active}

    def load_state_dict(self, state: HistoryState) -> None:
        """Take what :meth:`state_dict` gave, of the masks that are there today.

        Weights may have been frozen or thawed since: the state may lack some of today's masks, whose history then
        begins today, or have more, which are left out.

        Raises:
            ValueError: The state is of other masks.
        """
        sizes = {name: bits.shape for name, bits in self._latest.items()}
        for part in (state["initial"], state["latest"], state["ever_active"]):
            nested = part.keys() <= sizes.keys() or part.keys() >= sizes.keys()
            if not nested or any(part[name].shape != size for name, size in sizes.items() if name in part):
                raise ValueError(
                    f"The history is of the masks {', '.join(part)}, in their sizes, but these are {', '.join(sizes)}."
                    " Resume with the module, include= and exclude= of the run that wrote it."
                )
        self._initial = {name: state["initial"].get(name, bits) for name, bits in self._initial.items()}
        self._latest = {name: state["latest"].get(name, bits) for name, bits in self._latest.items()}
        self._ever_active = {name: state["ever_active"].get(name, bits) for name, bits in self._ever_active.items()}

    def _share(self, packed: PackedMasks) -> float:
        counts = {name: count_bits(bits) for name, bits in packed.items()}
        return sum(self._sum(counts)) / sum(self._sum(self._sizes))


def _of_this_process(counts: Mapping[str, int]) -> Sequence[int]:
    return [*counts.values()]
