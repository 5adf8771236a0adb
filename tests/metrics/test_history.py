from __future__ import annotations

import pytest
import torch

from lightning_sparse.functional.topology import exploration_rate, mask_change
from lightning_sparse.metrics.history import MaskHistory


def masks(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first": (3, 5), "second": (7,)}  # neither a multiple of eight
    return {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()}


def test_changes_are_those_of_the_functions() -> None:
    first, second, third = masks(0), masks(1), masks(2)
    history = MaskHistory(first)
    assert history.observe(second) == mask_change(list(first.values()), list(second.values()))
    assert history.observe(third) == mask_change(list(second.values()), list(third.values()))
    assert history.changed_since_start == mask_change(list(first.values()), list(third.values()))
    assert history.ever_active == exploration_rate([first[name] | second[name] | third[name] for name in first])


def test_masks_may_change_in_place() -> None:
    mask = torch.tensor([True, False])
    history = MaskHistory({"weight": mask})
    mask[0] = False
    assert history.observe({"weight": mask}) == 0.5


def test_it_keeps_a_bit_a_weight_of_each_mask() -> None:
    state = MaskHistory({"weight": torch.ones(80, dtype=torch.bool)}).state_dict()
    assert [part["weight"].nbytes for part in (state["initial"], state["latest"], state["ever_active"])] == [10] * 3


def test_it_goes_on_from_its_state() -> None:
    history, resumed = MaskHistory(masks(0)), MaskHistory(masks(1))
    history.observe(masks(1))
    resumed.load_state_dict(history.state_dict())
    assert history.observe(masks(2)) == resumed.observe(masks(2))
    assert history.changed_since_start == resumed.changed_since_start
    assert history.ever_active == resumed.ever_active


def test_a_history_of_other_masks_is_refused() -> None:
    state = MaskHistory({"other": torch.ones(3, dtype=torch.bool)}).state_dict()
    with pytest.raises(ValueError, match=r"masks other.*these are first, second"):
        MaskHistory(masks(0)).load_state_dict(state)


def test_masks_that_join_begin_their_history_there() -> None:
    first, second = masks(0), masks(1)
    history = MaskHistory({"first": first["first"]})
    history.add(first)
    assert history.changed_since_start == 0
    assert history.observe(second) == mask_change(list(first.values()), list(second.values()))
    assert history.ever_active == exploration_rate([first[name] | second[name] for name in first])


def test_a_history_of_fewer_or_more_masks_keeps_what_both_have() -> None:
    first, second = masks(0), masks(1)
    fewer, more = MaskHistory({"second": first["second"]}), MaskHistory(first)
    fewer.observe({"second": second["second"]})
    more.observe(second)
    grown, shrunk = MaskHistory(second), MaskHistory({"second": second["second"]})
    grown.load_state_dict(fewer.state_dict())
    shrunk.load_state_dict(more.state_dict())
    changed = mask_change([first["second"]], [second["second"]])
    assert shrunk.changed_since_start == changed
    assert grown.changed_since_start == pytest.approx(changed * 7 / 22)
    assert shrunk.observe({"second": second["second"]}) == grown.observe(second) == 0


def test_a_history_of_other_shapes_is_refused() -> None:
    state = MaskHistory({"second": torch.ones(70, dtype=torch.bool)}).state_dict()
    with pytest.raises(ValueError, match="in their sizes"):
        MaskHistory(masks(0)).load_state_dict(state)
