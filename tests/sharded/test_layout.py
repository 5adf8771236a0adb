"""Layouts, against weights that hold their own places, divided by torch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_sparse.functional import largest, smallest
from lightning_sparse.masks import select_weights
from lightning_sparse.masks.layout import Block, Layout, layout_of, local_part, obstacle_of_shards
from lightning_sparse.masks.pool import MaskPool
from lightning_sparse.masks.sums import side_by_side_if, sum_over_processes
from tests.sharded.processes import Mesh, forked, processes_of

SHAPES = [(16, 12), (7, 5), (3, 8), (1, 9), (6, 6), (13, 4)]
STYLES = [None, ColwiseParallel, RowwiseParallel]


def divided(values: Tensor, mesh: Mesh, style: type | None) -> nn.Linear:
    """A linear layer with these weights, divided over a mesh that is made anew."""
    data, tensor = (
        init_device_mesh("cpu", mesh, mesh_dim_names=("data", "tensor"))[name] for name in ("data", "tensor")
    )
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    layer.weight = nn.Parameter(values.clone())
    if style is not None and mesh[1] > 1:
        parallelize_module(nn.Sequential(layer), tensor, {"0": style()})
    if mesh[0] > 1:
        fully_shard(layer, mesh=data)
    return layer


def look(layout: Layout, local: Tensor, whole: Tensor) -> None:
    assert local.shape == layout.local_shape
    assert torch.equal(layout.take(whole), local)
    assert torch.equal(layout.places(torch.device("cpu")), local.to(torch.int64))
    assert torch.equal(layout.whole(local), whole)
    bits = local.to(torch.int64) % 3 == 0
    assert torch.equal(layout.whole(bits), whole.to(torch.int64) % 3 == 0)
    held = torch.tensor(local.numel() * layout.owned)
    assert int(sum_over_processes(held)) == whole.numel()  # each entry has one owner
    assert int(sum_over_processes(torch.tensor(local.numel()))) == whole.numel() * layout.copies
    rows = layout.sum_rows(local.sum(dim=1), 1)
    assert torch.equal(layout.of_rows(1).take(whole.sum(dim=1)), rows)
    assert layout.cuts_rows(1) == (local.shape[1:] != whole.shape[1:])


def look_at_all(mesh: Mesh) -> None:
    dist.init_process_group("gloo")
    refused = 0
    for shape in SHAPES:
        whole = torch.arange(float(shape[0] * shape[1])).view(shape)
        for style in STYLES:
            weight = divided(whole, mesh, style).weight
            if obstacle_of_shards(weight):
                refused += 1
                assert style is ColwiseParallel
                assert shape[0] % (mesh[0] * mesh[1])
            else:
                look(layout_of(weight), local_part(weight), whole)
    assert refused == (0 if 1 in mesh else sum(bool(rows % (mesh[0] * mesh[1])) for rows, _ in SHAPES))


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2), pytest.param((3, 2), marks=pytest.mark.slow)], ids=str)
def test_each_process_knows_which_entries_it_holds(mesh: Mesh) -> None:
    forked(processes_of(mesh), look_at_all, mesh)


def rank_all(mesh: Mesh) -> None:
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator).mul(3).round() for shape in ((16, 12), (12, 16), (3, 8))]
    layers = [
        divided(value, mesh, style)
        for value, style in zip(values, (ColwiseParallel, RowwiseParallel, None), strict=True)
    ]
    pool = MaskPool(select_weights(nn.Sequential(*layers)).masked)
    chosen = pool.smallest(pool.flat(lambda weight: weight.value), 150, torch.ones_like(pool.mask), key=torch.abs)
    expected = smallest([value.flatten() for value in values], 150, torch.ones(408, dtype=torch.bool), key=torch.abs)
    parts = expected.split([value.numel() for value in values])
    calls = list[int]()
    original = dist.all_reduce
    dist.all_reduce = lambda *arguments, **more: (calls.append(1), original(*arguments, **more))[1]
    of_each = pool.each(lambda weight, k: weight.largest(weight.value, k, torch.ones_like(weight.mask)), (50, 60, 7))
    # Four digits of the keys, and where there are ties one of the places; all layers ask together.
    assert len(calls) <= 5
    dist.all_reduce = original
    for weight, value, its, part, own, k in zip(
        pool, values, pool.split(chosen), parts, of_each, (50, 60, 7), strict=True
    ):
        assert torch.equal(its, weight.layout.take(part.view(value.shape)))
        assert torch.equal(own, weight.layout.take(largest(value, k, torch.ones_like(value, dtype=torch.bool))))
    assert pool.count(chosen) == 150
    assert pool.counts(of_each) == [50, 60, 7]


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)], ids=str)
def test_layers_that_are_sharded_and_whole_are_ranked_together(mesh: Mesh) -> None:
    forked(processes_of(mesh), rank_all, mesh)


def test_what_one_call_raises_ends_the_others() -> None:
    def fail(number: int) -> int:
        total = int(sum_over_processes(torch.tensor(number)))
        if number == 1:
            raise ValueError("the second")
        return total + int(sum_over_processes(torch.tensor(number)))

    def run() -> None:
        dist.init_process_group("gloo")
        with pytest.raises(ValueError, match="the second"):
            side_by_side_if(True, [lambda: fail(0), lambda: fail(1), lambda: fail(2)])
        assert side_by_side_if(True, [lambda: fail(2), lambda: fail(3)]) == [8, 12]

    forked(2, run)


def test_a_mesh_that_leaves_a_process_out_is_refused() -> None:
    def run() -> None:
        dist.init_process_group("gloo")
        mesh = dist.device_mesh.DeviceMesh("cpu", [0])
        weight = DTensor.from_local(torch.zeros(2, 2), mesh, run_check=False)
        assert bool(obstacle_of_shards(weight)) == (dist.get_rank() == 1)
        assert dist.get_rank() == 1 or isinstance(layout_of(weight), Block)

    forked(2, run)
