"""Masks that a user has given: what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.masks.places import printable
from lightning_sparse.masks.plan import Candidate
from lightning_sparse.masks.weight import MaskedWeight

__all__ = ["check_bool", "wrong_shapes"]


def check_bool(masks: Mapping[str, Any]) -> None:
    """Refuse what is no mask.

    Raises:
        ValueError: A name is no string, or a value no tensor of ``torch.bool``.

    Example:
        >>> check_bool({"weight": torch.ones(2)})
        Traceback (most recent call last):
            ...
        ValueError: masks['weight'] is torch.float32; give a tensor of torch.bool, as in `weight != 0`.
    """
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise ValueError(f"masks has the name {name!r}; give the names of parameters, as named_parameters() does.")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"masks[{name!r}] is {kind}; give a tensor of torch.bool, as in `weight != 0`.")


def wrong_shapes(masks: Mapping[str, Tensor], weights: Iterable[Candidate | MaskedWeight], source: str) -> str | None:
    """The sentence on masks that have other shapes than their weights; None where there is none.

    Args:
        masks: By name.
        weights: Those of the module; one without a mask is passed over.
        source: Whence the masks come, the subject of the sentence.
    """
    wrong = [
        f"{printable(weight.name)} is {tuple(weight.parameter.shape)} and its mask {tuple(masks[weight.name].shape)}"
        for weight in weights
        if weight.name in masks and masks[weight.name].shape != weight.parameter.shape
    ]
    if not wrong:
        return None
    return (
        f"{source} has masks whose shapes differ from the weights': {'; '.join(wrong)}. Give the masks of this module."
    )
