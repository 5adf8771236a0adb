"""Arguments of any type: refused when they are given, with a sentence; numbers of numpy are numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sparse import (
    DST,
    EAST,
    FGGP,
    GMP,
    MEST,
    SET,
    DyReLUPhasing,
    FixedMask,
    RigL,
    SparsityMonitor,
    WeightSharing,
    apply_masks,
    load_masks,
    prune,
    report,
    save_masks,
)
from lightning_sparse.masks.patterns import NofM
from lightning_sparse.modules import DyReLU, share_weights
from lightning_sparse.schedules import Cyclic, UpdateTimes

ODD: list[Any] = ["2", None, 2.5, [], -1, math.nan, object(), torch.ones(3)]


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        lambda value: DyReLUPhasing(reduction=value),
        lambda value: DyReLUPhasing(seed=value),
        lambda value: WeightSharing(own=value),
        lambda value: WeightSharing(seed=value),
        lambda value: DyReLU(value),
        lambda value: DyReLU(8, value),
        lambda value: share_weights(torch.nn.Sequential(), own=value),
        lambda value: EAST(0.9, cycles=value),
        lambda value: Cyclic(0.9, cycles=value),
        lambda value: GMP(0.9, min_active=value),
        lambda value: NofM(value, 4),
    ],
)
def test_what_is_no_whole_number_is_refused_at_once(make: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"[A-Za-z].{20,}\.$"):
        make(value)


@pytest.mark.parametrize("value", ["yes", 1, None, [], 0.5])
@pytest.mark.parametrize(
    "make",
    [
        lambda value: DyReLUPhasing(freeze=value),
        lambda value: RigL(0.9, regrow=value),
        lambda value: SET(0.9, update_replaces_step=value),
        lambda value: SET(0.9, warm_moments=value),
        lambda value: MEST(0.9, soft=value),
        lambda value: SparsityMonitor(heatmap=value),
    ],
)
def test_what_is_no_bool_is_refused_at_once(make: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"give True or False\.$"):
        make(value)


@pytest.mark.parametrize("value", ["relu1", 3, ["a", 3], {"a": 1}])
@pytest.mark.parametrize(
    "make",
    [
        lambda value: DyReLUPhasing(include=value),
        lambda value: DyReLUPhasing(exclude=value),
        lambda value: WeightSharing(stages=value),
    ],
)
def test_what_is_no_list_of_globs_is_refused_at_once(make: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"give a list of strings.* or None\.$"):
        make(value)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("growth", [1.0, 0.999999])
def test_a_billion_cycles_are_refused_and_not_counted(growth: float) -> None:
    with pytest.raises(ValueError, match="give at most 1000"):
        EAST(0.9, cycles=10**9, cycle_length=1e-10, cycle_growth=growth)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["sparsity", "length", "growth", "multiplier"])
def test_a_cycle_of_no_size_is_refused(name: str, value: float) -> None:
    arguments: dict[str, Any] = {"sparsity": 0.9, name: value}
    arguments: dict[str, Any] = {"sparsity": 0.9, name: value}
    with pytest.raises(ValueError, match="give a finite number"):
        Cyclic(**arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    small: Any = np.int64(2)
    fraction: Any = np.float32(0.5)
    ten: Any = np.int64(10)
    off: Any = np.bool_(False)
    nine: Any = torch.tensor(9)
    assert RigL(np.float64(0.9), update_every=small, stop=ten, min_active=small, seed=small).update_every == 2
    assert EAST(fraction, cycles=small, stop=ten, cycle_update_every=small).times.stop == 10
    assert FGGP(0.9, pool=fraction, start=fraction).start == 0.5
    assert DST(np.float64(1e-4)).alpha == 1e-4
    assert DST(sparsity=np.float64(0.5), reset_sparsity=fraction).reset_sparsity == 0.5
    assert RigL(0.9, regrow=off).regrow is False
    assert UpdateTimes(every=small, start=0, stop=nine).resolve(20).latest(9) == 9
    assert DyReLUPhasing(small, ten, reduction=small).reduction == 2
    assert WeightSharing(own=small).own == 2
    assert NofM(small, ten) == NofM(2, 10)


@pytest.mark.parametrize(
    "call",
    [
        lambda: load_masks(b"x"),  # type: ignore[arg-type]
        lambda: apply_masks(3, {}),  # type: ignore[arg-type]
        lambda: prune(3, 0.5),  # type: ignore[arg-type]
        lambda: report(3),  # type: ignore[call-overload]
        lambda: FixedMask(b"x"),  # type: ignore[arg-type]
        lambda: save_masks(3, {}),  # type: ignore[arg-type]
    ],
)
def test_what_is_neither_module_nor_path_is_told_in_a_sentence(call: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^[A-Za-z_]+ .{20,}\.$"):
        call()
