"""What a training has spent on operations so far: the memory behind ``flops/*`` of the monitor."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_sparse.functional.flops import inference_flops, sparse_flops, training_flops

__all__ = ["SpentFLOPs"]


@dataclass
class SpentFLOPs:
    """The operations of a forward pass, and of training so far.

    Attributes:
        total: Those of the dense network, without Dynamic ReLUs.
        layers: Those of each masked weight, dense.
        sparsity: Of the masks with which the coming step computes.
        spent: Those of training so far, in steps of dense training.
        steps: Steps of training so far.
        dynamic: Those of Dynamic ReLUs, while the network has some.
    """

    total: int
    layers: dict[str, int]
    sparsity: dict[str, float]
    spent: float = 0.0
    steps: int = 0
    dynamic: int = 0

    @property
    def _arguments(self) -> tuple[list[int], list[float], int]:
        dense = list(self.layers.values())
        return dense, [self.sparsity[name] for name in self.layers], self.total - sum(dense)

    @property
    def inference(self) -> float:
        """Operations of a forward pass, over those of the dense network."""
        return inference_flops(*self._arguments) + self.dynamic / self.total

    @property
    def values(self) -> dict[str, float]:
        """What is logged."""
        training = {"flops/training": self.spent / self.steps} if self.steps else {}
        return {"flops/inference": self.inference, **training}

    def add(self, steps: int, dense_gradients: float) -> None:
        """Count ``steps`` of training. The last one spent ``dense_gradients`` on gradients of pruned weights."""
        if steps:  # none, while batches accumulate
            forward = sparse_flops(*self._arguments) + self.dynamic
            self.spent += steps * training_flops(forward, self.total, dense_gradients)
            self.steps += steps
