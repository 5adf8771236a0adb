"""Sums over the processes of a training run. If several calls run side by side, their sums travel together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sparse.masks.lockstep import ask, in_lockstep, side_by_side

__all__ = [
    "largest_of_processes",
    "rank",
    "side_by_side_if",
    "sum_of_group",
    "sum_over_processes",
    "world_size",
]

T = TypeVar("T")


def world_size() -> int:
    """How many processes communicate through torch now; 1 if torch does not communicate."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process; 0 if torch does not communicate."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_of_group(values: Tensor, group: Any) -> Tensor:
    """Sum numbers over the processes of a group. A collective of that group."""
    return _reduced(values, "sum", group)


def largest_of_processes(values: Tensor) -> Tensor:
    """The maximum of each number over all processes. A collective."""
    return _reduced(values, "max")


def sum_over_processes(counts: Tensor) -> Tensor:
    """Sum numbers over all processes. A collective; in lockstep, one for all calls that ask."""
    return _reduced(counts, "sum")


def side_by_side_if(spread: bool, calls: Iterable[Callable[[], T]]) -> list[T]:
    """Make calls that may ask for sums over processes. If the sums are collectives, those of all calls travel together.

    Args:
        spread: Whether the sums are collectives.
        calls: Made in order. They must not write to anything that another call reads.
    """
    if not spread or in_lockstep():
        return [call() for call in calls]
    return side_by_side(list(calls), _answers)


_OPERATIONS = {"sum": "SUM", "max": "MAX"}
_Question = tuple[Tensor, str, Any]


def _reduced(values: Tensor, operation: str, group: Any = None) -> Tensor:
    if world_size() == 1:
        return values
    question: _Question = (values, operation, group)
    return ask(question) if in_lockstep() else _answers([question])[0]


def _answers(questions: Sequence[_Question]) -> list[Tensor]:
    """Answer all questions, with one transfer for each kind of question."""
    kinds: dict[Any, list[int]] = {}
    for number, (values, operation, group) in enumerate(questions):
        kinds.setdefault((operation, group, values.dtype, values.device), []).append(number)
    answers: list[Tensor] = [values for values, _, _ in questions]
    for (operation, group, _, device), numbers in kinds.items():
        shapes = [answers[number].shape for number in numbers]
        together = torch.cat([answers[number].detach().reshape(-1) for number in numbers])
        sent = together.to(_device_of(group, device))
        dist.all_reduce(sent, getattr(dist.ReduceOp, _OPERATIONS[operation]), group=group)
        parts = sent.to(device).split([shape.numel() for shape in shapes])
        for number, part, shape in zip(numbers, parts, shapes, strict=True):
            answers[number] = part.view(shape)
    return answers


def _device_of(group: Any, device: torch.device) -> torch.device:
    """The device from which tensors of ``device`` can be sent: NCCL sends only from GPUs, even tensors of the CPU."""
    if device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device
