"""The masked weights of one method in one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse.functional.masks import pack, unpack
from lightning_sparse.masks.plan import Candidate
from lightning_sparse.masks.weight import MaskedWeight, MaskPool

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
        not_finite_for: Steps in a row whose gradients held inf or NaN where they were looked at.
    """

    def __init__(self, candidates: Sequence[Candidate], optimizer: torch.optim.Optimizer) -> None:
        super().__init__(candidates)
        self.optimizer = optimizer
        self.updated_at = -1
        self.not_finite_for = 0

    @classmethod
    def of(cls, weights: Sequence[MaskedWeight], optimizer: torch.optim.Optimizer, like: MaskGroup) -> MaskGroup:
        """A group of weights that have masks already, as they come under another optimizer."""
        group = cls.__new__(cls)
        group._weights, group.optimizer = list(weights), optimizer
        group.updated_at, group.not_finite_for = like.updated_at, like.not_finite_for
        group.lay_masks()
        return group

    def packed(self) -> dict[str, PackedMask]:
        """The masks at one bit a weight, by name, for a checkpoint."""
        return {
            weight.name: {
                "shape": list(weight.shape),
                "bits": pack(weight.layout.whole(weight.mask)),
                "budget": weight.budget,
                "updated_at": self.updated_at,
                "uses": weight.candidate.uses,
            }
            for weight in self
        }

    def load_(self, packed: Mapping[str, PackedMask]) -> None:
        """Take the masks of a checkpoint: all of them or, where one does not fit, none.

        Raises:
            MisconfigurationException: A mask is missing, has another shape or is cut short.
        """
        masks = [_unpack(weight, packed) for weight in self]
        for weight, mask in zip(self, masks, strict=True):
            weight.mask.copy_(weight.layout.take(mask))
            weight.budget = packed[weight.name]["budget"]
            self.updated_at = packed[weight.name]["updated_at"]
        self.recount()


def _unpack(weight: MaskedWeight, packed: Mapping[str, PackedMask]) -> Tensor:
    if weight.name not in packed:
        raise MisconfigurationException(
            f"The checkpoint holds no mask of {weight.name}; it has masks of {', '.join(packed) or 'nothing'}. Resume"
            " with the same module and the same include= and exclude= as the run that wrote it."
        )
    saved = packed[weight.name]
    missing = PackedMask.__required_keys__ - saved.keys()
    if not isinstance(saved.get("bits"), Tensor):
        missing |= {"bits"}
    if missing:
        raise MisconfigurationException(
            f"The checkpoint's mask of {weight.name} is cut short: it lacks {', '.join(sorted(missing))}. Resume from"
            " an earlier checkpoint."
        )
    if list(saved["shape"]) != list(weight.shape):
        raise MisconfigurationException(
            f"The checkpoint's mask of {weight.name} has shape {tuple(saved['shape'])}, but the weight has"
            f" {tuple(weight.shape)}. Resume with the module that wrote the checkpoint."
        )
    try:
        return unpack(saved["bits"], weight.shape)
    except ValueError as error:
        raise MisconfigurationException(f"The checkpoint's mask of {weight.name} cannot be read: {error}") from error
