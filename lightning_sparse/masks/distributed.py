"""Masks on several processes: what must be equal is compared, and one broadcast makes it so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse.functional.hashing import content_hash
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.masks.sums import sum_over_processes, world_size

__all__ = [
    "agree_to_begin",
    "all_agree",
    "broadcast_",
    "broadcast_masks_",
    "check_weights_agree",
    "masks_agree",
    "mean_",
    "vote",
    "world_size",
]


def broadcast_(mask: Tensor) -> None:
    """Give every process the mask of rank 0: one flat transfer, a byte a weight."""
    if world_size() > 1:
        dist.broadcast(mask.view(torch.uint8), src=0)


def broadcast_masks_(group: MaskGroup) -> None:
    """Give every process the masks of rank 0, of the weights that each holds whole.

    Of sharded weights every process has chosen its own part, by the same sums.
    """
    if not group.is_spread:
        broadcast_(group.mask)
        return
    for weight, mask in zip(group, group.mask.split([weight.mask.numel() for weight in group]), strict=True):
        if weight.layout.is_whole:
            broadcast_(mask)


def all_agree(holds: bool, device: torch.device) -> bool:
    """Whether something holds in every process. A collective."""
    return int(sum_over_processes(torch.tensor([not holds], dtype=torch.int32, device=device))) == 0


def mean_(tensors: Sequence[Tensor]) -> None:
    """Make each tensor its mean over all processes. A collective."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(world_size())


def agree_to_begin(settings: Mapping[str, str], error: Exception | None) -> None:
    """Compare what must be equal in every process as training begins, and let all refuse what one refuses.

    A collective: every process calls it, one that cannot begin too.

    Args:
        settings: What must be equal, by what it is of, such as the arguments of a method.
        error: Why this process cannot begin; None where it can.

    Raises:
        Exception: ``error``, where there is one.
        MisconfigurationException: Another process cannot begin, or settings differ; the message says where.
    """
    if world_size() == 1:
        if error is not None:
            raise error
        return
    mine = {"settings": dict(settings), "error": None if error is None else str(error)}
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, mine)
    if error is not None:
        raise error
    for rank, theirs in enumerate(cast("list[dict[str, Any]]", every)):
        if theirs["error"] is not None:
            raise MisconfigurationException(f"Process {rank} cannot begin: {theirs['error']}")
    for rank, theirs in enumerate(every):
        for what in sorted(settings.keys() | theirs["settings"].keys()):
            here, there = settings.get(what, "missing"), theirs["settings"].get(what, "missing")
            if here != there:
                raise MisconfigurationException(
                    f"The processes differ in {what}: {_difference(here, there)} in process {dist.get_rank()} and"
                    f" {_difference(there, here)} in process {rank}. Give every process the same module, callbacks"
                    " and data."
                )


def vote(usable: bool, group: MaskGroup) -> bool:
    """Whether every process can update the masks of ``group``, which must be the same in all; all of them must ask.

    Raises:
        MisconfigurationException: The masks of a weight differ, or one has a gradient on some processes only; the
            message names it.
    """
    if world_size() == 1:
        return usable
    if group.is_spread:
        differ, unusable = _differing_copies(group, [weight.mask for weight in group], int(not usable))
        _refuse_differing(differ)
        return unusable == 0
    has_gradient = [weight.parameter.grad is not None for weight in group]
    votes = torch.tensor([usable, *has_gradient], dtype=torch.int64, device=group.mask.device)
    lowest, highest = _extremes(torch.cat([votes, content_hash(group.mask)[None]]))
    if int(lowest[-1]) != int(highest[-1]):  # all processes see it, so all of them go on to look where
        masks_agree(group)
    same = (lowest == highest)[1:-1].tolist()
    if not all(same):
        differ = enumerated(weight.name for weight, its in zip(group, same, strict=True) if not its)
        raise MisconfigurationException(
            f"Some processes have no gradient of {differ}, and others have one, so they would train different weights."
            " Let every process compute the same loss, and set gradients to None on all of them or on none."
        )
    return bool(lowest[0])


def masks_agree(group: MaskGroup) -> None:
    """Compare a hash of each mask across the processes. A collective.

    Raises:
        MisconfigurationException: The masks of a weight differ; the message names it.
    """
    _refuse_differing(_differing(group, [weight.mask for weight in group]))


def _refuse_differing(differ: Sequence[str]) -> None:
    if differ:
        raise MisconfigurationException(
            f"The masks of {enumerated(differ)} differ between the processes. Only this callback changes masks: look"
            " for code that writes to them on some ranks only, or for parameters that are not synchronised."
        )


def check_weights_agree(group: MaskGroup) -> list[str]:
    """Names of the weights whose values differ between the processes. A collective."""
    return _differing(group, [weight.value for weight in group])


def _differing(group: MaskGroup, tensors: Sequence[Tensor]) -> list[str]:
    if world_size() == 1:
        return []
    if group.is_spread:
        return _differing_copies(group, tensors)[0]
    lowest, highest = _extremes(torch.stack([content_hash(tensor) for tensor in tensors]))
    return [weight.name for weight, same in zip(group, (lowest == highest).tolist(), strict=True) if not same]


def _differing_copies(group: MaskGroup, tensors: Sequence[Tensor], count: int = 0) -> tuple[list[str], int]:
    """Names of weights whose copies differ between processes, and the sum of a count; one transfer.

    Entries that only one process holds need no comparison. Hashes are summed twice: over all processes, and over those
    that own the entries. If all copies are equal, one sum is a multiple of the other.
    """
    copied = [(w, tensor) for w, tensor in zip(group, tensors, strict=True) if w.layout.copies > 1]
    hashes = [content_hash(tensor) for _, tensor in copied]
    of_owners = [its * weight.layout.owned for its, (weight, _) in zip(hashes, copied, strict=True)]
    more = torch.tensor(count, device=group.mask.device)
    *sums, total = sum_over_processes(torch.stack([*hashes, *of_owners, more])).tolist()
    of_all, of_owners = sums[: len(copied)], sums[len(copied) :]
    triples = zip(copied, of_all, of_owners, strict=True)
    # Sums wrap around, as those of hashes do.
    differ = [weight.name for (weight, _), its, own in triples if (its - own * weight.layout.copies) % (1 << 64)]
    return differ, total


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest of each value over the processes, by one transfer."""
    both = torch.cat([values, ~values])  # ~ turns the order around, and has no overflow
    dist.all_reduce(both, dist.ReduceOp.MIN)
    lowest, highest = both.split(len(values))
    return lowest, ~highest


def _difference(text: str, other: str, around: int = 60) -> str:
    """The part of ``text`` around the first character in which it differs from ``other``."""
    first = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, first - around)
    cut = text[start : first + around]
    return repr(f"{'…' if start else ''}{cut}{'…' if first + around < len(text) else ''}")
