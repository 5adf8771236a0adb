"""Masks on several processes: one broadcast, one check."""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse.masks.registry import MaskGroup
from lightning_sparse.trainer import world_size

__all__ = ["broadcast_", "check_ranks_agree", "true_on_every_rank"]


def broadcast_(mask: Tensor) -> None:
    """Give every process the mask of rank 0: one flat transfer, a byte a weight."""
    if world_size() > 1:
        dist.broadcast(mask.view(torch.uint8), src=0)


def true_on_every_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds in every process; all of them must ask."""
    if world_size() == 1:
        return flag
    lowest = torch.tensor(flag, dtype=torch.uint8, device=device)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return bool(lowest)


def check_ranks_agree(group: MaskGroup) -> None:
    """Compare a hash of each mask across the processes.

    Raises:
        MisconfigurationException: The masks of a weight differ; the message names it.
    """
    if world_size() == 1:
        return
    hashes = torch.stack([_hash(weight.mask) for weight in group])
    lowest, highest = hashes.clone(), hashes.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    differ = [weight.name for weight, same in zip(group, (lowest == highest).tolist(), strict=True) if not same]
    if differ:
        raise MisconfigurationException(
            f"The masks of {', '.join(differ)} differ between the processes. Masks change in this callback alone: look"
            " for code that writes to them on some ranks only, or for parameters that are not synchronised."
        )


def _hash(mask: Tensor) -> Tensor:
    """A polynomial hash modulo 2^64: position-dependent, so that two swapped entries are seen."""
    active = mask.contiguous().flatten().nonzero().squeeze(1)
    return (active * 0x5851F42D4C957F2D + 0x14057B7EF767814F).bitwise_xor(active << 17).sum()
