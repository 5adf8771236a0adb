from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException, start_processes

from lightning_sparse.masks import MaskGroup, MaskRegistry, select_weights
from lightning_sparse.masks.distributed import agree_to_begin, broadcast_, check_weights_agree, masks_agree, vote

Task = Callable[[int], "Tensor | None"]


def _run(rank: int, task: Task, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root / 'store'}", rank=rank, world_size=2)
    try:
        torch.save(task(rank), root / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two_ranks(task: Task, root: Path) -> list[Tensor | None]:
    """What ``task`` returns in two forked processes; an error in one of them is raised here."""
    start_processes(_run, args=(task, root), nprocs=2, start_method="fork")
    return [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def group_of_two_layers() -> MaskGroup:
    module = nn.ModuleDict(
        {"a": nn.Linear(4, 8), "b": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), "c": nn.Linear(3, 2)}
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    (group,) = MaskRegistry().claim("method", select_weights(module).masked, [optimizer])
    group.mask.copy_(torch.rand(group.numel, generator=torch.Generator().manual_seed(0)) < 0.5)
    return group


def swap_two_entries(mask: Tensor) -> None:
    on, off = mask.nonzero()[0], (~mask).nonzero()[0]
    mask[tuple(on)], mask[tuple(off)] = False, True


def test_every_rank_gets_the_mask_of_rank_0(tmp_path: Path) -> None:
    def task(rank: int) -> Tensor:
        mask = torch.rand(1_001, generator=torch.Generator().manual_seed(rank)) < 0.5
        broadcast_(mask)
        return mask

    first, second = on_two_ranks(task, tmp_path)
    assert first is not None
    assert second is not None
    assert torch.equal(first, torch.rand(1_001, generator=torch.Generator().manual_seed(0)) < 0.5)
    assert torch.equal(first, second)


def test_a_broadcast_reaches_the_masks_of_the_weights(tmp_path: Path) -> None:
    def task(rank: int) -> Tensor:
        group = group_of_two_layers()
        if rank:
            group.mask.zero_()
        broadcast_(group.mask)
        return group[1].mask

    first, second = on_two_ranks(task, tmp_path)
    assert first is not None
    assert first.any()
    assert second is not None
    assert torch.equal(first, second)


def test_equal_masks_agree(tmp_path: Path) -> None:
    on_two_ranks(lambda rank: masks_agree(group_of_two_layers()), tmp_path)


def test_weights_that_differ_are_no_disagreement_of_masks(tmp_path: Path) -> None:
    def task(rank: int) -> None:
        torch.manual_seed(rank)  # the initial weights of each rank
        masks_agree(group_of_two_layers())

    on_two_ranks(task, tmp_path)


def flip_one(group: MaskGroup) -> None:
    group[1].mask[2, 1, 0, 2].logical_not_()


def swap_two(group: MaskGroup) -> None:
    swap_two_entries(group[1].mask)


def empty(group: MaskGroup) -> None:
    group[1].mask.zero_()


def shift(group: MaskGroup) -> None:
    group[1].mask.copy_(group[1].mask.roll(1, dims=3))


@pytest.mark.parametrize("change", [flip_one, swap_two, empty, shift])
def test_a_mask_that_differs_on_one_rank_is_named_and_no_other(
    change: Callable[[MaskGroup], None], tmp_path: Path
) -> None:
    def task(rank: int) -> None:
        group = group_of_two_layers()
        if rank:
            change(group)
        masks_agree(group)

    with pytest.raises(ProcessRaisedException, match=r"The masks of b\.weight differ between the processes"):
        on_two_ranks(task, tmp_path)


def test_every_mask_that_differs_is_named(tmp_path: Path) -> None:
    def task(rank: int) -> None:
        group = group_of_two_layers()
        if rank:
            swap_two_entries(group[0].mask)
            swap_two_entries(group[2].mask)
        masks_agree(group)

    with pytest.raises(ProcessRaisedException, match=r"The masks of a\.weight, c\.weight differ"):
        on_two_ranks(task, tmp_path)


def test_any_two_swapped_entries_of_a_layer_are_seen(tmp_path: Path) -> None:
    def task(rank: int) -> Tensor:
        group = group_of_two_layers()
        original, unseen = group[2].mask.clone(), 0
        pairs = [(i, j) for i in range(6) for j in range(i) if original.flatten()[i] != original.flatten()[j]]
        for i, j in pairs:
            group[2].mask.copy_(original)
            if rank:
                flat = group[2].mask.view(-1)
                flat[i], flat[j] = bool(original.flatten()[j]), bool(original.flatten()[i])
            try:
                masks_agree(group)
                unseen += 1
            except Exception as error:
                assert "c.weight" in str(error)  # noqa: PT017 - raised on both ranks, so the next pair can follow
        return torch.tensor([unseen, len(pairs)])

    for outcome in on_two_ranks(task, tmp_path):
        assert outcome is not None
        assert outcome[0] == 0
        assert outcome[1] > 0


@pytest.mark.parametrize(
    ("of_ranks", "everywhere"), [((True, True), True), ((True, False), False), ((False, False), False)]
)
def test_an_update_happens_on_every_rank_or_on_none(
    of_ranks: tuple[bool, bool], everywhere: bool, tmp_path: Path
) -> None:
    def task(rank: int) -> Tensor:
        return torch.tensor(vote(of_ranks[rank], group_of_two_layers()))

    assert [bool(outcome) for outcome in on_two_ranks(task, tmp_path)] == [everywhere, everywhere]


def test_a_vote_on_masks_that_differ_names_the_layer(tmp_path: Path) -> None:
    def task(rank: int) -> None:
        group = group_of_two_layers()
        if rank:
            flip_one(group)
        vote(True, group)

    with pytest.raises(ProcessRaisedException, match=r"The masks of b\.weight differ between the processes"):
        on_two_ranks(task, tmp_path)


def test_weights_that_differ_are_named(tmp_path: Path) -> None:
    def task(rank: int) -> Tensor:
        torch.manual_seed(0)
        group = group_of_two_layers()
        if rank:
            group[2].value[0, 1] += 1e-6
        return torch.tensor([name == "c.weight" for name in check_weights_agree(group)])

    assert [outcome.tolist() for outcome in on_two_ranks(task, tmp_path) if outcome is not None] == [[True], [True]]


@pytest.mark.parametrize("failing", [0, 1])
def test_what_one_process_refuses_all_refuse(failing: int, tmp_path: Path) -> None:
    def task(rank: int) -> None:
        agree_to_begin({"times": "every 3"}, ValueError("there is no file") if rank == failing else None)

    with pytest.raises(ProcessRaisedException, match=r"there is no file"):
        on_two_ranks(task, tmp_path)


def test_settings_that_differ_are_named_with_both(tmp_path: Path) -> None:
    def task(rank: int) -> None:
        agree_to_begin({"the arguments of GMP": f"sparsity=0.{8 + rank}"}, None)

    with pytest.raises(ProcessRaisedException, match=r"differ in the arguments of GMP: 'sparsity=0\.[89]' in process"):
        on_two_ranks(task, tmp_path)


def test_one_process_agrees_with_itself() -> None:
    group = group_of_two_layers()
    before = group.mask.clone()
    broadcast_(group.mask)
    masks_agree(group)
    agree_to_begin({"times": "every 3"}, None)
    assert torch.equal(group.mask, before)
    assert vote(True, group)
    assert not vote(False, group)
