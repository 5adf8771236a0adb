from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_sparse import ACDC, DST, EAST, FGGP, GMP, RigL
from lightning_sparse.schedules import (
    Constant,
    Cosine,
    Cyclic,
    Exponential,
    Linear,
    Polynomial,
    Schedule,
    Steps,
    Timetable,
    UpdateTimes,
    as_schedule,
    check_fraction,
)

FROM_TO: list[Callable[[float, float], Schedule]] = [Linear, Polynomial, Cosine, Exponential]
HUNDREDTH = st.integers(0, 99).map(lambda percent: percent / 100)


@pytest.mark.parametrize("kind", FROM_TO)
@given(initial=HUNDREDTH, final=HUNDREDTH)
def test_a_schedule_begins_exactly_at_its_initial_value(
    kind: Callable[[float, float], Schedule], initial: float, final: float
) -> None:
    assert kind(initial, final)(0.0) == initial


@pytest.mark.parametrize("kind", FROM_TO)
@given(initial=HUNDREDTH, final=HUNDREDTH)
def test_a_schedule_ends_exactly_at_its_final_value(
    kind: Callable[[float, float], Schedule], initial: float, final: float
) -> None:
    assert kind(initial, final)(1.0) == final


@pytest.mark.parametrize("kind", FROM_TO)
@given(ends=st.tuples(HUNDREDTH, HUNDREDTH).map(sorted), progress=st.floats(0.0, 1.0))
def test_a_rising_schedule_stays_between_its_ends(
    kind: Callable[[float, float], Schedule], ends: list[float], progress: float
) -> None:
    assert ends[0] - 1e-12 <= kind(*ends)(progress) <= ends[1] + 1e-12


@pytest.mark.parametrize(
    ("schedule", "quarter", "half"),
    [
        (Constant(0.3), 0.3, 0.3),
        (Linear(0.2, 1.0), 0.4, 0.6),
        # 0.8 · (1 - 0.75³) = 0.4625 and 0.8 · (1 - 0.5³) = 0.7
        (Polynomial(0.0, 0.8), 0.4625, 0.7),
        (Polynomial(0.0, 0.8, exponent=2.0), 0.35, 0.6),
        # 1 - 0.5 · (1 + cos(π/4)) = 0.1464
        (Cosine(0.0, 1.0), 0.146447, 0.5),
        # 0.0001^0.25 = 0.1 are left, and 0.01
        (Exponential(0.0, 0.9999), 0.9, 0.99),
    ],
    ids=repr,
)
def test_values_of_schedules_by_hand(schedule: Schedule, quarter: float, half: float) -> None:
    assert (schedule(0.25), schedule(0.5)) == pytest.approx((quarter, half), abs=1e-6)


def test_schedules_are_frozen_and_compare_by_value() -> None:
    schedule = Polynomial(0.0, 0.9)
    assert schedule == Polynomial(0.0, 0.9)
    with pytest.raises(FrozenInstanceError):
        schedule.final = 0.5  # type: ignore[misc]


# check_fraction


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, 95, 100, math.nan, math.inf])
def test_a_value_outside_of_0_to_below_1_is_refused_with_the_value_and_the_range(value: float) -> None:
    with pytest.raises(ValueError, match=rf"sparsity is {value:g}.* \[0, 1\)"):
        check_fraction("sparsity", Constant(value), below_one=True)


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 1, 1.0])
def test_one_is_a_fraction_where_it_is_allowed(value: float) -> None:
    check_fraction("pool", Constant(value), below_one=False)


def test_a_percentage_is_answered_with_the_fraction() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 0\.95\?"):
        check_fraction("sparsity", Constant(95), below_one=True)


def test_a_schedule_that_leaves_the_range_halfway_is_refused() -> None:
    class Hump(Schedule):
        def __call__(self, progress: float) -> float:
            return 2.0 if 0.4 < progress < 0.6 else 0.5

    with pytest.raises(ValueError, match=r"is 2 at progress 0\.4"):
        check_fraction("sparsity", Hump(), below_one=True)


def test_an_exponential_that_begins_at_1_is_refused_like_any_other_schedule() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        check_fraction("sparsity", Exponential(1.0, 0.5), below_one=True)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Exponential("a", 0.9), r"Exponential\(initial='a', final=0\.9\): initial is 'a'; give a number\."),  # type: ignore[arg-type]
        (lambda: Exponential(0.0, None), r": final is None; give a number\."),  # type: ignore[arg-type]
        (lambda: Exponential(0.0, True), r": final is True; give a number\."),
        (lambda: Cyclic("0.9"), r": sparsity is '0\.9'; give a number\."),  # type: ignore[arg-type]
        (lambda: Cyclic(0.9, multiplier=None), r": multiplier is None; give a number\."),  # type: ignore[arg-type]
        (lambda: Cyclic(0.9, cycles=2.0), r": cycles is 2\.0; give an int of at least 1, such as 2\."),  # type: ignore[arg-type]
        (lambda: Cyclic(0.9, shape=3), r": shape is one of 'cosine', 'triangular'\."),  # type: ignore[arg-type]
        (lambda: EAST("0.9"), r"^sparsity is '0\.9'; give a number, a fraction in \[0, 1\)\.$"),  # type: ignore[arg-type]
        (lambda: EAST(None), r"^sparsity is None; give a number"),  # type: ignore[arg-type]
        (lambda: EAST("0.9", cycles=0), r"^sparsity is '0\.9'; give a number"),  # type: ignore[arg-type]
        (lambda: EAST(Constant(0.9)), r"sparsity is Constant.*; give a number.* needs cycles=0\.$"),  # type: ignore[arg-type]
        (lambda: EAST(0.9, cycles=2.0), r": cycles is 2\.0; give an int"),  # type: ignore[arg-type]
        (lambda: EAST(0.9, stop=None), r"^stop is None; give an int"),  # type: ignore[arg-type]
        (lambda: DST("0.1"), r"^alpha is '0\.1'; give the strength of a regulariser, a number of at least 0"),  # type: ignore[arg-type]
        (lambda: DST(True), r"^alpha is True; give the strength"),
        (lambda: DST(1e-4, reset_sparsity="1"), r"^reset_sparsity is '1'; give a number above 0"),  # type: ignore[arg-type]
        (lambda: DST(1e-4, reset_sparsity=True), r"^reset_sparsity is True; give a number above 0"),
        (lambda: DST(sparsity="0.9"), r"^sparsity is '0\.9'; give a number"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_number_is_refused_where_it_is_given(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("value", ["0.9", None, [0.9]])
def test_a_value_that_is_no_number_is_refused_with_the_value(value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(value))):
        check_fraction("sparsity", Constant(value), below_one=True)


def test_the_ends_of_a_schedule_are_looked_at_first() -> None:
    with pytest.raises(ValueError, match=r"sparsity is 95 at progress 1\.00 .* Did you mean 0\.95\?"):
        check_fraction("sparsity", Linear(0, 95), below_one=True)


NUMBERS = [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), nn.Parameter(torch.tensor(0.5))]


@pytest.mark.parametrize("number", [*NUMBERS, Fraction(1, 2)], ids=lambda number: type(number).__name__)
def test_numbers_of_other_libraries_become_pythons_own(number: Any) -> None:
    for schedule in (Constant(number), Cosine(0.5, number), Linear(number, 0.5), Exponential(0.5, number)):
        check_fraction("sparsity", schedule, below_one=True)
        assert schedule(1.0) == 0.5
        assert type(schedule(1.0)) is float
    assert type(Cyclic(number).sparsity) is float
    assert as_schedule(number) == Constant(0.5)


def test_so_do_those_of_a_schedule_of_ones_own() -> None:
    class Own(Schedule):
        def __call__(self, progress: float) -> Any:
            return np.float32(progress)

    check_fraction("drop_fraction", Own(), below_one=False)
    with pytest.raises(ValueError, match=r"sparsity is 1 at progress 1\.00"):
        check_fraction("sparsity", Own(), below_one=True)


@pytest.mark.parametrize("value", [torch.tensor([0.5]), torch.tensor(True), np.True_, np.array([0.5]), 0.5j])
def test_other_values_of_other_libraries_are_no_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"give a number, a fraction in \[0, 1\)"):
        check_fraction("sparsity", Constant(value), below_one=True)


@pytest.mark.parametrize("number", [np.float32(0.5), torch.tensor(0.5)], ids=["numpy", "tensor"])
def test_methods_take_them(number: Any) -> None:
    assert FGGP(number).sparsity == FGGP(0.5).sparsity
    assert RigL(number, drop_fraction=number).sparsity == Constant(0.5)
    assert type(DST(sparsity=number).sparsity) is float
    assert EAST(number).target_sparsity() == 0.5


# Durations


@pytest.mark.parametrize("name", ["every", "start", "stop"])
@pytest.mark.parametrize("duration", [-1, -0.1, 1.5, True, "x", None, math.nan, math.inf, -math.inf])
def test_a_bad_duration_is_named_with_its_value_and_what_is_allowed(name: str, duration: Any) -> None:
    durations: dict[str, Any] = {"every": 1, "start": 0, "stop": 1.0, name: duration}
    with pytest.raises(ValueError, match=f"{name} is {re.escape(repr(duration))}; give an int.* float"):
        UpdateTimes(**durations)


@pytest.mark.parametrize("every", [0, 0.0])
def test_no_time_between_updates_is_refused(every: float) -> None:
    with pytest.raises(ValueError, match="update_every is 0; give at least 1 step"):
        UpdateTimes(every=every)


@pytest.mark.parametrize(("start", "stop"), [(10, 9), (0.5, 0.4)])
def test_a_start_after_the_stop_is_refused_at_once_where_both_are_of_one_kind(start: float, stop: float) -> None:
    with pytest.raises(ValueError, match=f"{start}.* after .*{stop}"):
        UpdateTimes(every=1, start=start, stop=stop)


@pytest.mark.parametrize(("start", "stop"), [(60, 0.5), (0.9, 10)])
def test_a_start_after_the_stop_is_refused_when_the_steps_are_known(start: float, stop: float) -> None:
    with pytest.raises(ValueError, match=r"after they stop at \d+, in 100 steps\. Give an earlier start or a later"):
        UpdateTimes(every=1, start=start, stop=stop).resolve(100)


@pytest.mark.parametrize("times", [UpdateTimes(1, 0, 1.0), UpdateTimes(1, 0.0, 5), UpdateTimes(0.1, 0, 5)], ids=repr)
def test_fractions_of_an_endless_training_are_refused(times: UpdateTimes) -> None:
    with pytest.raises(ValueError, match="max_epochs or max_steps"):
        times.resolve(math.inf)


@pytest.mark.parametrize(
    ("times", "sentence"),
    [
        (UpdateTimes(0.01, 0.0, 0.8), r"^start=0\.0, stop=0\.8 and update_every=0\.01 are in fractions of training"),
        (UpdateTimes(10, 0, 0.8), r"^stop=0\.8 is in fractions of training, but the Trainer has no known end"),
        (UpdateTimes(10, 400, 1000, before=UpdateTimes(0.001, 0, 400)), r"^times before=UpdateTimes.* is in fractions"),
    ],
)
def test_they_are_named_as_they_were_given(times: UpdateTimes, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        times.resolve(math.inf)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (GMP(0.9), r"^update_every=0\.01, start=0\.0 and stop=0\.8 are in"),
        (ACDC(0.9), r"^update_every=0\.05, start=0\.1, stop=0\.85 and last_dense=0\.75 are in"),
        (EAST(0.9, update_every=9, start=0, stop=99), r"^cycle_update_every=0\.001 is in"),
    ],
)
def test_those_of_a_method_are_named_as_its_arguments(method: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        method.timetable(math.inf)


def test_steps_of_an_endless_training_are_taken_as_they_are() -> None:
    assert UpdateTimes(every=10, start=5, stop=500).resolve(math.inf) == Timetable(10, 5, 500)


@pytest.mark.parametrize(
    ("total", "timetable"),
    [(300, Timetable(3, 0, 240)), (100_000, Timetable(1_000, 0, 80_000)), (1, Timetable(1, 0, 0))],
)
def test_default_durations_fit_short_and_long_trainings(total: int, timetable: Timetable) -> None:
    assert UpdateTimes(every=0.01, start=0.0, stop=0.8).resolve(total) == timetable


@pytest.mark.parametrize("total", [1, 2, 99, 100_000])
def test_the_whole_training_ends_at_the_last_step_that_exists(total: int) -> None:
    assert UpdateTimes(every=1, start=0, stop=1.0).resolve(total).stop == total - 1


def test_an_update_comes_at_most_once_a_step_however_small_the_fraction() -> None:
    assert UpdateTimes(every=0.0001).resolve(10).every == 1


@given(
    st.integers(1, 10**6),
    st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1.0)),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1.0),
)
def test_fractions_resolve_to_steps_within_the_training(total: int, every: float, first: float, second: float) -> None:
    times = UpdateTimes(every=every, start=min(first, second), stop=max(first, second)).resolve(total)
    assert times.every >= 1
    assert 0 <= times.start <= times.stop < total


# Timetables


@st.composite
def timetables(draw: st.DrawFn) -> Timetable:
    start = draw(st.integers(0, 60))
    return Timetable(every=draw(st.integers(1, 50)), start=start, stop=start + draw(st.integers(0, 120)))


def due_steps(times: Timetable) -> list[int]:
    """Every ``every`` steps from ``start``, as one would count them, and ``stop``."""
    due: list[int] = []
    step = times.start
    while step < times.stop:
        due.append(step)
        step += times.every
    return [*due, times.stop]


@given(timetables())
def test_updates_are_due_at_every_so_many_steps_and_at_the_stop(times: Timetable) -> None:
    assert [step for step in range(200) if times.latest(step) == step] == due_steps(times)


@given(timetables(), st.integers(0, 200))
def test_latest_is_the_last_due_step_that_has_come(times: Timetable, step: int) -> None:
    assert times.latest(step) == max((due for due in due_steps(times) if due <= step), default=None)


@pytest.mark.parametrize(("total", "updates"), [(300, 81), (100_000, 81)])
def test_defaults_make_81_updates_and_end_at_four_fifths(total: int, updates: int) -> None:
    due = due_steps(UpdateTimes(every=0.01, start=0.0, stop=0.8).resolve(total))
    assert (len(due), due[-1]) == (updates, total * 4 // 5)


@given(timetables(), st.integers(0, 200))
def test_progress_runs_evenly_from_0_at_the_start_to_1_at_the_stop(times: Timetable, step: int) -> None:
    if step < times.start or times.start < times.stop:
        exact = Fraction(step - times.start, max(1, times.stop - times.start))
        assert times.progress(step) == pytest.approx(float(min(max(exact, Fraction(0)), Fraction(1))))
    else:
        assert times.progress(step) == 1.0


def test_one_shot_pruning_has_made_no_progress_before_its_step() -> None:
    assert [Timetable(every=1, start=50, stop=50).progress(step) for step in (0, 49, 50, 51)] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"values": 0.1, "at": (0.5,)},
        {"values": (0.1, "a"), "at": (0.5,)},
        {"values": (0.1, 0.2), "at": ("x",)},
        {"values": "ab", "at": (0.5,)},
        {"values": (0.1, True), "at": (0.5,)},
    ],
)
def test_steps_of_what_is_no_number_are_refused_in_words(arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"(values|at) of Steps is .*; give a list of numbers"):
        Steps(**arguments)
