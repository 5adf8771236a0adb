"""The masked weights of one method in one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse.functional.masks import pack, unpack
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.plan import Candidate
from lightning_sparse.masks.pool import MaskPool
from lightning_sparse.masks.weight import MaskedWeight

__all__ = ["MaskGroup", "PackedMask"]


class PackedMask(TypedDict):
    """A mask in a checkpoint: primitives and one tensor."""

    shape: list[int]
    bits: Tensor
    budget: int
    updated_at: int
    uses: int


@final
class MaskGroup(MaskPool):
    """The masked weights of one method in one optimizer: they are ranked, updated and broadcast together.

    Args:
        candidates: The weights.
        optimizer: The optimizer that steps them.

    Attributes:
        updated_at: The step of the last update; -1 before the first.
        not_finite_for: Number of consecutive steps whose gradients had inf or NaN when they were checked.
    """

    def __init__(self, candidates: Sequence[Candidate], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(candidates)
        self.optimizer = optimizer
        self.updated_at = -1
        self.not_finite_for = 0

    @classmethod
    def of(cls, weights: Sequence[MaskedWeight], optimizer: torch.optim.Optimizer, like: MaskGroup) -> MaskGroup:
        """A group of weights that have masks already and now belong to another optimizer."""
        group = cls.__new__(cls)
        group._weights, group.optimizer = list(weights), optimizer
        group.updated_at, group.not_finite_for = like.updated_at, like.not_finite_for
        group.lay_masks()
        return group

    def packed(self) -> dict[str, PackedMask]:
        """The masks by name, one bit per weight, for a checkpoint. A collective if weights are sharded."""
        return {
            weight.name: {
                "shape": list(weight.shape),
                "bits": pack(weight.layout.saved(weight.mask)),
                "budget": weight.budget,
                "updated_at": self.updated_at,
                "uses": weight.candidate.uses,
            }
            for weight in self
        }

    def load_(self, packed: Mapping[str, PackedMask], source: Literal["checkpoint", "module"] = "checkpoint") -> None:
        """Load saved masks: all of them, or none if one does not fit.

        Args:
            packed: By name.
            source: Where they come from, for the message: a checkpoint, or the last training of the module.

        Raises:
            MisconfigurationException: A mask is missing, has another shape or is cut short.
        """
        masks = [weight.layout.take(_unpack(weight, packed, source)) for weight in self]
        for weight, mask in zip(self, masks, strict=True):
            weight.mask.copy_(mask)
            weight.budget = packed[weight.name]["budget"]
            self.updated_at = packed[weight.name]["updated_at"]
        self.recount()


_WHOSE = {"checkpoint": "The checkpoint", "module": "The last training of this module"}
_REMEDY = {
    "checkpoint": "Resume with the module, include= and exclude= of the run that wrote it.",
    "module": "Its layers have changed since: train it with a new callback, which begins with the masks that fit.",
}


def _unpack(weight: MaskedWeight, packed: Mapping[str, PackedMask], source: str) -> Tensor:
    whose, remedy, name = _WHOSE[source], _REMEDY[source], printable(weight.name)
    if weight.name not in packed:
        known = ", ".join(map(printable, packed)) or "nothing"
        raise MisconfigurationException(f"{whose} holds no mask of {name}; it has masks of {known}. {remedy}")
    saved = packed[weight.name]
    if missing := PackedMask.__required_keys__ - saved.keys():
        raise MisconfigurationException(
            f"{whose} has a mask of {name} that is cut short: it lacks {', '.join(sorted(missing))}. {remedy}"
        )
    if list(saved["shape"]) != list(weight.shape):
        raise MisconfigurationException(
            f"{whose}'s mask of {name} has shape {tuple(saved['shape'])}, but the weight has {tuple(weight.shape)}."
            f" {remedy}"
        )
    try:
        return unpack(saved["bits"], weight.shape)
    except ValueError as error:
        raise MisconfigurationException(f"{whose} has a mask of {name} that cannot be read: {error}") from error
