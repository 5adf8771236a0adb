"""What the guard and the digests cost: processor time of each look, on networks of several sizes.

Processor time, not the clock's: other work on the machine does not count. The looks at evidence, and at some entries of
each weight, come in every step; the count of every pruned weight after each update, every hundred steps, at validation
and at epoch ends; the digest when a checkpoint is written or read, and hashes of weights and masks at epoch ends, where
there are several processes.

    python -m benchmarks.guard
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import process_time
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from benchmarks.harness import argument_parser, report
from lightning_sparse.functional.hashing import content_hash
from lightning_sparse.functional.stored import digest
from lightning_sparse.masks import MaskGroup, select_weights
from lightning_sparse.methods.guard import Guard, count_awake
from lightning_sparse.zoo import LeNet300100

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LeNet-300-100": LeNet300100,
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
}


def of(look: Callable[[], Any], seconds: float = 0.5) -> float:
    """Microseconds of processor time of one call."""
    look()
    calls, began = 0, process_time()
    while (spent := process_time() - began) < seconds:
        look()
        calls += 1
    return 1e6 * spent / calls


def row(name: str) -> dict[str, Any]:
    """What is measured of one network, at 90 %."""
    network = NETWORKS[name]()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    group = MaskGroup(select_weights(network).masked, optimizer)
    group.mask.copy_(torch.rand(group.mask.shape) < 0.1)
    group.recount()
    group.apply_()
    for weight in group:
        weight.parameter.grad = torch.zeros_like(weight.parameter)
    guard = Guard(group)
    guard.note_gradients()

    def evidence() -> None:
        guard.written_weights()  # as the batch begins
        guard.written_weights()  # before the forward
        guard.written_weights()  # after it
        guard.written_weights()  # before the step
        guard.note_gradients()
        guard.moments_are_others()
        guard.step_begins()
        guard.written_gradients(clipped=False)
        guard.step_is_odd()
        guard.note_weights()

    state = {"masks": group.packed()}
    spent = of(evidence)
    return {
        "network": name,
        "weights": len(group),
        "millions": group.numel / 1e6,
        "evidence, µs a step": spent,
        "µs a weight": spent / len(group),
        "some entries, µs a step": of(guard.finds_some_awake),
        "count, ms": of(lambda: count_awake(group)) / 1e3,
        "digest, ms": of(lambda: digest(state)) / 1e3,
        "hash, ms": of(lambda: [content_hash(weight.value) for weight in group]) / 1e3,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argument_parser(__doc__)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = list(NETWORKS)[:1] if options.smallest else list(NETWORKS)
    report("The guard and digests, processor time at 90 %", [row(name) for name in names], options.json)


if __name__ == "__main__":
    main()
