from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torchmetrics import Metric

from lightning_sparse.functional.topology import count_dead, dead_neurons, exploration_rate, mask_change, sparsity
from lightning_sparse.metrics import (
    DeadNeurons,
    ExplorationRate,
    InferenceFLOPs,
    MaskChange,
    Sparsity,
    TrainingFLOPs,
)

OLD = [torch.tensor([[True, True, False], [False, False, False]]), torch.tensor([[True, True]])]
NEW = [torch.tensor([[False, True, True], [False, False, False]]), torch.tensor([[False, True]])]


def number_dead(rows: Sequence[Tensor]) -> int:
    return count_dead(rows)[0]


TWINS: list[tuple[Metric, Callable[..., float], tuple[Any, ...]]] = [
    (Sparsity(), sparsity, (NEW,)),
    (MaskChange(), mask_change, (OLD, NEW)),
    (ExplorationRate(), exploration_rate, (NEW,)),
    (DeadNeurons(), dead_neurons, (NEW,)),
    (DeadNeurons(normalize=False), number_dead, (NEW,)),
]
IDS = ["sparsity", "mask_change", "exploration_rate", "dead_neurons", "number_dead"]


def layer(arguments: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    return tuple(argument[index : index + 1] for argument in arguments)


@pytest.mark.parametrize(("metric", "function", "arguments"), TWINS, ids=IDS)
class TestTwin:
    def test_gives_what_the_function_gives(
        self, metric: Metric, function: Callable[..., float], arguments: tuple[Any, ...]
    ) -> None:
        metric.reset()
        assert metric(*arguments).item() == pytest.approx(function(*arguments))

    @pytest.mark.parametrize("call", ["update", "forward"])
    def test_adds_up_layer_by_layer(
        self, metric: Metric, function: Callable[..., float], arguments: tuple[Any, ...], call: str
    ) -> None:
        metric.reset()
        for index in range(len(NEW)):
            getattr(metric, call)(*layer(arguments, index))
        assert metric.compute().item() == pytest.approx(function(*arguments))

    def test_survives_pickling(
        self, metric: Metric, function: Callable[..., float], arguments: tuple[Any, ...]
    ) -> None:
        copy: Metric = pickle.loads(pickle.dumps(metric))
        copy.reset()
        copy.update(*arguments)
        assert copy.compute().item() == pytest.approx(function(*arguments))


def measure(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    values: list[float] = []
    for metric, _, arguments in TWINS:
        metric.reset()
        metric.update(*arguments)
        values.append(metric.compute().item())
    inference, training = InferenceFLOPs(), TrainingFLOPs()
    inference.update([100.0], [0.9], rest=100.0)
    training.update(sparse=20.0, dense=100.0)
    values += [inference.compute().item(), training.compute().item()]
    torch.save(values, root / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_equal_masks_give_what_one_gives(tmp_path: Path) -> None:
    start_processes(measure, args=(tmp_path,), nprocs=2, start_method="fork")
    expected = [function(*arguments) for _, function, arguments in TWINS] + [0.55, 0.2]
    for rank in (0, 1):
        assert torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) == pytest.approx(expected)
