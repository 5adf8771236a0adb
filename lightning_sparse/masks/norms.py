"""Weight norm, which divides the rows of a direction by their norms: what its masks must leave."""

from __future__ import annotations

from torch import Tensor

from lightning_sparse.functional.masks import count_true
from lightning_sparse.masks.weight import MaskedWeight

__all__ = ["nan_outputs"]


def nan_outputs(weight: MaskedWeight) -> int:
    """How many norms of the direction of a weight norm are 0 under its mask; 0 for all other weights.

    Of sharded weights, 0 too: a process does not see whole rows.
    """
    candidate = weight.candidate
    if candidate.part != "direction" or not weight.layout.is_whole:
        return 0
    owner, name = candidate.owner, candidate.local_name
    magnitude = getattr(owner, "original0" if name == "original1" else f"{name.removesuffix('_v')}_g")
    assert isinstance(magnitude, Tensor)
    taken = [i for i in range(weight.value.dim()) if magnitude.dim() == 0 or magnitude.shape[i] == 1]
    active = weight.value.ne(0) & weight.mask  # what has just grown is 0 until it is trained
    return count_true((~active).all(dim=taken))
