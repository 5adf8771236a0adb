"""What can be told of the masks of a registry, whether processes hold all of them or parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lightning_sparse.functional.masks import pack, row_counts, unpack
from lightning_sparse.functional.topology import count_dead
from lightning_sparse.masks.registry import MaskRegistry
from lightning_sparse.masks.sums import sum_over_processes
from lightning_sparse.metrics.history import MaskHistory

__all__ = ["dead_neurons", "history_of", "is_spread", "saved_history", "taken_history"]


def is_spread(registry: MaskRegistry) -> bool:
    """Whether processes hold parts of the weights; the functions below are collectives then."""
    return any(not weight.layout.is_whole for weight in registry.values())


def dead_neurons(registry: MaskRegistry) -> tuple[int, int]:
    """How many neurons and filters have no input left, and how many there are.

    A sharded weight that stores its inputs first is left out: no process holds a row of it.
    """
    if not is_spread(registry):
        return count_dead([weight.rows(weight.mask) for weight in registry.values()])
    weights = [weight for weight in registry.values() if weight.layout.is_whole or not weight.candidate.input_first]
    alive = [weight.sum_rows((row_counts(weight.rows(weight.mask)) > 0).to(torch.int32)) > 0 for weight in weights]
    neurons = sum(weight.numel // weight.candidate.fan_in for weight in weights)
    return neurons - sum(weight.count_rows(rows) for weight, rows in zip(weights, alive, strict=True)), neurons


def history_of(registry: MaskRegistry) -> MaskHistory:
    """A history that begins with the masks of a registry; each process keeps that of what it holds."""
    masks = {name: weight.mask for name, weight in registry.items()}
    if not is_spread(registry):
        return MaskHistory(masks)

    def sum_(counts: Mapping[str, int]) -> list[int]:
        own = [count * registry[name].layout.owned for name, count in counts.items()]
        device = next(iter(registry.values())).mask.device
        return sum_over_processes(torch.tensor(own, device=device)).tolist()  # type: ignore[no-any-return]

    return MaskHistory(masks, sum_)


def saved_history(history: MaskHistory, registry: MaskRegistry) -> dict[str, Any]:
    """The state of a history, of whole weights."""

    def saved(name: str, bits: Tensor) -> Tensor:
        layout = registry[name].layout
        return bits if layout.is_whole else pack(layout.saved(unpack(bits, layout.local_shape)))

    state = cast("Mapping[str, dict[str, Tensor]]", history.state_dict())
    if not is_spread(registry):
        return dict(state)
    return {part: {name: saved(name, bits) for name, bits in its.items()} for part, its in state.items()}


def taken_history(state: Mapping[str, Mapping[str, Tensor]], registry: MaskRegistry) -> Any:
    """What this process holds of a saved history."""

    def taken(name: str, bits: Tensor) -> Tensor:
        weight = registry.get(name)
        if weight is None or weight.layout.is_whole:
            return bits
        return pack(weight.layout.take(unpack(bits, weight.shape)))

    return {part: {name: taken(name, bits) for name, bits in its.items()} for part, its in state.items()}
