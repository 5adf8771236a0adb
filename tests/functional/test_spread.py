from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from random import Random
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sparse.functional import masks, smallest, spread_on_device
from lightning_sparse.functional import spread as spreading
from lightning_sparse.functional.held import Held, Sum
from lightning_sparse.functional.spread import smallest_of_spread

T = TypeVar("T")

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Few distinct values, so that ties are the rule; each is exact in every dtype.
SCORE = st.sampled_from([-math.inf, -300.0, -1.0, -0.0, 0.0, 2.0**-14, 0.5, 1.0, 256.0, math.inf, math.nan])


class Processes:
    """As many threads as there are processes, whose sums wait for each other."""

    def __init__(self, number: int) -> None:
        self.barrier = threading.Barrier(number, timeout=60)
        self.given: list[Tensor] = [torch.empty(0)] * number
        self.sizes: list[int] = []

    def sum(self, rank: int, counts: Tensor) -> Tensor:
        self.given[rank] = counts
        if self.barrier.wait() == 0:
            self.sizes.append(counts.numel() * counts.element_size())
        total = torch.stack(self.given).sum(0).to(counts.dtype)
        self.barrier.wait()
        return total

    def run(self, call: Callable[[int, Sum], T]) -> list[T]:
        """What each process returns; the error of the first that has one is raised."""
        results: dict[int, T] = {}
        errors: dict[int, Exception] = {}

        def work(rank: int) -> None:
            try:
                results[rank] = call(rank, partial(self.sum, rank))
            except Exception as error:  # raised below
                errors[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.given))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            assert len(errors) == len(threads), "all processes raise, or none"
            raise errors[0]
        return [results[rank] for rank in range(len(threads))]


@dataclass(frozen=True)
class Grid:
    """A weight that is cut along two dimensions, each block in several processes."""

    shape: tuple[int, int]
    rows: Sequence[int]
    columns: Sequence[int]
    copies: int

    @property
    def blocks(self) -> list[tuple[slice, slice]]:
        return [
            (slice(*rows), slice(*columns))
            for rows in pairwise([0, *self.rows, self.shape[0]])
            for columns in pairwise([0, *self.columns, self.shape[1]])
        ]

    def of(self, rank: int) -> tuple[tuple[slice, slice], bool]:
        """The block of a process, and whether its entries are counted there."""
        return self.blocks[rank // self.copies], rank % self.copies == 0

    @property
    def processes(self) -> int:
        return len(self.blocks) * self.copies


def cuts(draw: st.DrawFn, size: int, most: int) -> list[int]:
    return sorted(draw(st.lists(st.integers(0, size), max_size=most)))


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    return Grid(shape, cuts(draw, shape[0], 2), cuts(draw, shape[1], 1), draw(st.integers(1, 2)))


@st.composite
def spread_selections(draw: st.DrawFn) -> tuple[Grid, Tensor, Tensor, int]:
    grid = draw(grids())
    size = math.prod(grid.shape)
    scores = torch.tensor(draw(st.lists(SCORE, min_size=size, max_size=size)), dtype=draw(st.sampled_from(FLOATS)))
    among = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    k = draw(st.integers(0, int((among & ~scores.isnan()).sum())))
    return grid, scores.view(grid.shape), among.view(grid.shape), k


def choose(grid: Grid, scores: Tensor, among: Tensor, k: int, key: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """What the processes choose together, laid into the whole; copies must agree."""
    every = torch.arange(scores.numel()).view(grid.shape)
    processes = Processes(grid.processes)

    def one(rank: int, sum_: Sum) -> Tensor:
        block, owned = grid.of(rank)
        places = every[block].reshape(-1)
        held = Held(scores[block].reshape(-1), lambda at: places[at], owned)
        return smallest_of_spread([held], k, among[block].reshape(-1), scores.numel(), sum_, key)

    chosen = processes.run(one)
    whole = torch.zeros_like(among)
    for block in reversed(range(len(grid.blocks))):
        of_block = chosen[block * grid.copies : (block + 1) * grid.copies]
        assert all(torch.equal(of_block[0], other) for other in of_block)
        region = whole[grid.blocks[block]]
        region.copy_(of_block[0].view(region.shape))
    return whole


@pytest.fixture(params=["by rounds", "by bracket", "of few", "without looking"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "of few":
        monkeypatch.setattr(spreading, "_FEW", 0)  # as if they were
    if request.param in ("by bracket", "of few"):
        for name, value in (("_LARGE", 0), ("_SAMPLE", 6)):
            monkeypatch.setattr(spreading, name, value)
    if request.param == "without looking":
        monkeypatch.setattr(masks, "on_cpu", lambda tensor: False)
        monkeypatch.setattr(spread_on_device, "_CHUNK", 4)
    return request.param


@pytest.mark.usefixtures("way")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(spread_selections())
def test_processes_choose_what_one_would(selection: tuple[Grid, Tensor, Tensor, int]) -> None:
    grid, scores, among, k = selection
    comparable = among & ~scores.isnan()
    numbers = scores.masked_fill(scores.isnan(), 0.0)
    assert torch.equal(choose(grid, scores, among, k), smallest(numbers, k, comparable))
    assert torch.equal(choose(grid, scores, among, k, torch.abs), smallest(numbers, k, comparable, key=torch.abs))


@st.composite
def layers(draw: st.DrawFn) -> list[tuple[int, Sequence[int]]]:
    """The sizes of some layers, and where each is cut between three processes."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    return [(size, sorted(draw(st.lists(st.integers(0, size), min_size=2, max_size=2)))) for size in sizes]


@pytest.mark.usefixtures("way")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(layers(), st.randoms(use_true_random=False), st.booleans())
def test_layers_that_are_spread_are_ranked_as_one(
    sizes: list[tuple[int, Sequence[int]]], random: Random, has_whole: bool
) -> None:
    numel = sum(size for size, _ in sizes)
    scores = torch.tensor([random.choice([-1.0, 0.0, 0.5, 2.0]) for _ in range(numel)])
    among = torch.tensor([random.random() < 0.7 for _ in range(numel)], dtype=torch.bool)
    k = random.randint(0, int(among.sum()))
    starts = [0, *accumulate(size for size, _ in sizes)]

    def one(rank: int, sum_: Sum) -> tuple[Tensor, Tensor]:
        held, places = list[Held](), list[Tensor]()
        for number, ((size, its_cuts), start) in enumerate(zip(sizes, starts, strict=False)):
            whole = has_whole and number == 0  # every process holds all of it
            first, last = (0, size) if whole else ([0, *its_cuts, size][rank], [0, *its_cuts, size][rank + 1])
            its = torch.arange(start + first, start + last)
            held.append(Held(scores[its], its.__getitem__, owned=not whole or rank == 0))
            places.append(its)
        at = torch.cat(places)
        return at, smallest_of_spread(held, k, among[at], numel, sum_)

    expected = smallest(scores, k, among)
    for at, chosen in Processes(3).run(one):
        assert torch.equal(chosen, expected[at])


def halves(scores: Tensor, among: Tensor, k: int, key: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, int]:
    """The choice of two processes with unequal shares, and the bytes that each has given to sums."""
    processes, cut = Processes(2), scores.numel() // 3

    def one(rank: int, sum_: Sum) -> Tensor:
        start, end = ((0, cut), (cut, scores.numel()))[rank]
        held = Held(scores[start:end], lambda at: at + start)
        return smallest_of_spread([held], k, among[start:end], scores.numel(), sum_, key)

    return torch.cat(processes.run(one)), sum(processes.sizes)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share_of_them", [0.0001, 0.3, 0.9, 1.0])
def test_many_entries_are_bracketed_by_a_sample(
    dtype: torch.dtype, share_of_them: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(200_000, generator=generator).to(dtype)  # a half has many ties here
    scores[::1000], scores[1::1000], scores[2::1000] = torch.nan, -torch.inf, torch.inf
    among = torch.rand(200_000, generator=generator) < 0.4
    k = int(share_of_them * int((among & ~scores.isnan()).sum()))
    looked_at = list[int]()
    with monkeypatch.context() as patched:
        few = spreading._OnCPU._kth
        patched.setattr(
            spreading._OnCPU, "_kth", lambda self, *a: looked_at.append(len(a[0].integers)) or few(self, *a)
        )
        chosen, sent = halves(scores, among, k)
    assert torch.equal(chosen, smallest(scores, k, among))
    assert torch.equal(halves(scores, among, k, torch.abs)[0], smallest(scores, k, among, key=torch.abs))
    assert sent <= (24_000 if dtype == torch.float64 else 16_000)
    assert sum(looked_at) < 0.2 * len(scores)  # once, and only those inside the bracket


def test_a_sample_that_misleads_does_not_harm() -> None:
    scores = torch.arange(100_000.0)
    where = torch.randint(33_333, (2000,), generator=torch.Generator().manual_seed(0)).unique()
    among = torch.zeros(100_000, dtype=torch.bool)
    among[where] = True  # a third is counted by its sample alone
    among[50_000:50_100] = True
    scores[where] += 200_000.0
    k = 60
    assert torch.equal(halves(scores, among, k)[0], smallest(scores, k, among))


def test_what_cannot_be_chosen_is_an_error_in_every_process() -> None:
    scores = torch.tensor([1.0, torch.nan, 3.0, 4.0])
    among = torch.tensor([True, True, True, False])
    with pytest.raises(ValueError, match=r"Cannot choose 3 entries: only 2 are eligible \(1 more have the score NaN"):
        halves(scores, among, 3)
    with pytest.raises(ValueError, match="k must be at least 0"):
        halves(scores, among, -1)


@pytest.mark.parametrize("numel", [1 << 20, 1 << 31])
def test_counts_are_as_wide_as_they_must_be(numel: int) -> None:
    seen = list[torch.dtype]()

    def sum_(counts: Tensor) -> Tensor:
        seen.append(counts.dtype)
        return counts

    held = Held(torch.tensor([2.0, 1.0]), lambda at: at)
    smallest_of_spread([held], 1, torch.tensor([True, True]), numel, sum_)
    assert set(seen) == {torch.int32 if numel < 1 << 31 else torch.int64}


def test_a_layer_takes_four_kilobytes() -> None:
    _, sent = halves(torch.randn(30_000, generator=torch.Generator().manual_seed(0)), torch.ones(30_000).bool(), 10_000)
    assert sent <= 4200
