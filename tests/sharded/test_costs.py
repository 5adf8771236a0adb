"""What masks of sharded weights cost: nothing of whole size is made, and little is sent."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sparse import DST, FGGP, SET, SNFS, RigL
from lightning_sparse.masks import lockstep
from lightning_sparse.methods import SparseMethod
from tests.sharded.processes import ShardedToy, forked, make_trainer

WIDTH = 512
WHOLE = WIDTH * WIDTH
TIMES: dict[str, Any] = {"update_every": 1, "stop": 5}
COLLECTIVES = 20


class Wide(ShardedToy):
    """One layer of a size at which a selection begins with a sample."""

    def __init__(self) -> None:
        super().__init__(double=False)
        self.network = nn.Sequential(
            nn.Linear(12, 4), nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        )

    def shard(self, network: Any, data: Any, tensor: Any) -> None:
        for child in (*network, network):
            fully_shard(child, mesh=data)


class Sizes(TorchDispatchMode):
    """Keeps the largest number of entries of what operations make; of a DTensor, of what is here."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        return made


class Watch:
    """Looks at what a method makes and sends in its part of each step."""

    def __init__(self, method: Any) -> None:
        self.sizes, self.calls, self.bytes, self.peak = Sizes(), 0, 0, 0
        self._before, method.before_step = method.before_step, self.before_step
        run = lockstep._Lane._run

        def run_and_look(lane: Any) -> None:  # a mode is a thread's own
            with self.sizes:
                run(lane)

        setattr(lockstep._Lane, "_run", run_and_look)  # noqa: B010  # of a class with a type variable
        # Never stopped: Python before 3.13.2 crashes where tracemalloc stops while a thread allocates without the GIL
        # (python/cpython issue 128679), as torch's own threads do here.
        tracemalloc.start()

    def before_step(self, *arguments: Any) -> None:
        sent, all_reduce = list[int](), dist.all_reduce

        def counted(tensor: Tensor, *its: Any, **more: Any) -> Any:
            sent.append(tensor.numel() * tensor.element_size())
            return all_reduce(tensor, *its, **more)

        dist.all_reduce = counted
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            with self.sizes:
                self._before(*arguments)
        finally:
            dist.all_reduce = all_reduce
            self.peak = max(self.peak, tracemalloc.get_traced_memory()[1] - before)
        self.calls, self.bytes = max(self.calls, len(sent)), max(self.bytes, sum(sent))


METHODS: dict[str, Callable[[], SparseMethod]] = {
    "fggp": partial(FGGP, 0.8, **TIMES),
    "rigl": partial(RigL, 0.8, update_replaces_step=False, **TIMES),
    "set": partial(SET, 0.8, **TIMES),
    "snfs": partial(SNFS, 0.8, **TIMES),
    "dst": partial(DST, 0.03),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_update_makes_nothing_of_whole_size_and_sends_little(name: str) -> None:
    def run() -> None:
        method = METHODS[name]()
        watch = Watch(method)
        make_trainer((2, 1), callbacks=[method], max_steps=6).fit(Wide())
        assert method.registry.num_updates > 1
        held = sum(weight.mask.numel() for weight in method.weights)
        assert watch.sizes.largest <= held < WHOLE
        assert watch.peak < 5 * WHOLE  # bytes of numpy: what is here once or twice, and no float for each of the whole
        assert watch.calls <= COLLECTIVES
        assert watch.bytes < 20 * 1024 * len(method.weights)

    forked(2, run)
