"""Schedules of values and times of updates during training.

A :class:`Schedule` gives a value at a progress in [0, 1]. :class:`UpdateTimes` says at which optimizer steps masks are
updated. Both are frozen dataclasses and can be written in YAML.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lightning_sparse.timetable import Duration, Timetable, UpdateTimes, as_number

__all__ = [
    "Constant",
    "Cosine",
    "Cyclic",
    "Duration",
    "Exponential",
    "Linear",
    "Polynomial",
    "Schedule",
    "Steps",
    "Timetable",
    "UpdateTimes",
    "as_number",
    "as_schedule",
    "check_fraction",
]

_MOST_CYCLES = 1_000

CycleShape = Literal["cosine", "triangular"]
"""How density rises and falls within a cycle."""


class Schedule(ABC):
    """A value over training: ``schedule(progress)`` with progress from 0 (first) to 1 (last)."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]."""


class _OfNumbers(Schedule):
    """A schedule whose fields are numbers; those of numpy, and tensors without dimensions, become Python's own."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, as_number(getattr(self, field.name)))

    def _check_numbers(self, but: str = "") -> None:
        """Refuse a field that is no number, other than that of the name ``but``."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name != but and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{self}: {field.name} is {value!r}; give a number.")
            if field.name != but and not math.isfinite(value):
                raise ValueError(f"{self}: {field.name} is {value!r}; give a finite number.")


@dataclass(frozen=True)
class Constant(_OfNumbers):
    """The same value throughout.

    Example:
        >>> Constant(0.5)(0.3)
        0.5
    """

    value: float

    def __call__(self, progress: float) -> float:  # noqa: D102
        return self.value


@dataclass(frozen=True)
class Polynomial(_OfNumbers):
    r"""From ``initial`` to ``final``, fast first: :math:`v(p) = v_f + (v_i - v_f)(1 - p)^e`.

    With ``exponent`` 3 and values of sparsity it is the cubic schedule of gradual magnitude pruning.

    References:
        Zhu & Gupta, "To prune, or not to prune", 2017, eq. 1, https://arxiv.org/abs/1710.01878

    Example:
        >>> [round(Polynomial(0.0, 0.8)(p), 3) for p in (0.0, 0.5, 1.0)]
        [0.0, 0.7, 0.8]
    """

    initial: float
    final: float
    exponent: float = 3.0

    def __call__(self, progress: float) -> float:  # noqa: D102
        # The ends exactly: v_f + (v_i − v_f) is not always v_i in floating point.
        if progress <= 0.0:
            return self.initial
        if progress >= 1.0:
            return self.final
        return self.final + (self.initial - self.final) * (1.0 - progress) ** self.exponent


@dataclass(frozen=True)
class Linear(_OfNumbers):
    r"""From ``initial`` to ``final`` at an even pace: :math:`v(p) = v_i + (v_f - v_i)\,p`.

    Example:
        >>> Linear(0.0, 0.5)(0.5)
        0.25
    """

    initial: float
    final: float

    def __call__(self, progress: float) -> float:  # noqa: D102
        return Polynomial(self.initial, self.final, exponent=1.0)(progress)


@dataclass(frozen=True)
class Cosine(_OfNumbers):
    r"""From ``initial`` to ``final`` along half a cosine: :math:`v(p) = v_f + (v_i - v_f)\,\frac12 (1 + \cos \pi p)`.

    Example:
        >>> round(Cosine(0.5, 0.005)(0.5), 4)
        0.2525
    """

    initial: float
    final: float

    def __call__(self, progress: float) -> float:  # noqa: D102
        if progress <= 0.0:
            return self.initial
        if progress >= 1.0:
            return self.final
        return self.final + (self.initial - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Exponential(_OfNumbers):
    r"""Sparsity whose remainder shrinks by a constant factor: :math:`1 - v(p) = (1 - v_i)\,((1 - v_f)/(1 - v_i))^p`.

    Example:
        >>> round(Exponential(0.0, 0.99)(0.5), 6)
        0.9
    """

    initial: float
    final: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        if not (self.initial < 1.0 and self.final < 1.0):
            raise ValueError(f"{self} must begin and end below sparsity 1; give fractions in [0, 1).")

    def __call__(self, progress: float) -> float:  # noqa: D102
        if progress <= 0.0:
            return self.initial
        if progress >= 1.0:
            return self.final
        return 1.0 - (1.0 - self.initial) * ((1.0 - self.final) / (1.0 - self.initial)) ** progress


@dataclass(frozen=True)
class Cyclic(_OfNumbers):
    r"""A sparsity that falls and rises again, cycle after cycle, and begins and ends each cycle at ``sparsity``.

    At position :math:`x` of a cycle, with density :math:`d = 1 - s` and :math:`m` times that density at the peak,

    .. math:: d(x) = d + \bigl(\min(1, m d) - d\bigr)\, w(x), \qquad
        w(x) = \tfrac12 (1 - \cos 2 \pi x) \;\text{or}\; 1 - |1 - 2x|

    Args:
        sparsity: The sparsity between cycles and after the last, in [0, 1).
        cycles: Number of cycles.
        length: Length of the first cycle, as a fraction of the schedule's time.
        growth: Ratio of a cycle's length to that of the cycle before.
        multiplier: Factor of the number of active weights in the middle of a cycle, at least 1.
        shape: How density rises and falls: along a cosine or evenly.

    Raises:
        ValueError: An argument is out of its range, there are more than 1000 cycles, or they do not fit into the
            schedule's time.

    Example:
        >>> [round(Cyclic(0.9, cycles=2, length=0.2)(p), 3) for p in (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)]
        [0.9, 0.7, 0.9, 0.7, 0.9, 0.9]

    References:
        Li et al., "Pushing the Limits of Sparsity", TMLR 2025, https://arxiv.org/abs/2411.13545. The defaults are those
        of the authors' code: in 250 epochs, two cycles of 50 epochs each, with three times the density.
    """

    sparsity: float
    cycles: int = 2
    length: float = 0.2
    growth: float = 1.0
    multiplier: float = 3.0
    shape: CycleShape = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers(but="shape")
        if not isinstance(self.cycles, int):
            raise ValueError(f"{self}: cycles is {self.cycles!r}; give an int of at least 1, such as 2.")
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"{self}: sparsity is a fraction in [0, 1).")
        if self.cycles > _MOST_CYCLES:
            raise ValueError(
                f"{self}: cycles is {self.cycles}; give at most {_MOST_CYCLES}. More are shorter than the steps of a"
                " training."
            )
        if self.cycles < 1 or self.multiplier < 1.0 or self.growth <= 0.0:
            raise ValueError(f"{self}: give at least 1 cycle, a multiplier of at least 1 and a growth above 0.")
        if self.shape not in get_args(CycleShape):
            raise ValueError(f"{self}: shape is one of {', '.join(map(repr, get_args(CycleShape)))}.")
        if not self.length > 0.0 or self.end > 1.0 + 1e-9:
            raise ValueError(
                f"{self}: its cycles take {self.end:g} of the schedule's time, and must fit into (0, 1]; give fewer or"
                " shorter ones."
            )

    @property
    def end(self) -> float:
        """When the last cycle ends, as a fraction of the schedule's time."""
        return sum(self.length * self.growth**cycle for cycle in range(self.cycles))

    def __call__(self, progress: float) -> float:  # noqa: D102
        begin = 0.0
        for cycle in range(self.cycles):
            length = self.length * self.growth**cycle
            if begin < progress < begin + length:
                return self._in_cycle((progress - begin) / length)
            begin += length
        return self.sparsity

    def _in_cycle(self, position: float) -> float:
        low = 1.0 - self.sparsity
        cosine = self.shape == "cosine"
        wave = 0.5 * (1.0 - math.cos(2.0 * math.pi * position)) if cosine else 1.0 - abs(1.0 - 2.0 * position)
        return max(0.0, self.sparsity - (min(1.0, self.multiplier * low) - low) * wave)  # no rounding error below 0


@dataclass(frozen=True)
class Steps(Schedule):
    """Constant between steps: ``values[0]`` at first, and ``values[i]`` from the progress ``at[i - 1]`` on.

    Args:
        values: The values, one more than there are times.
        at: When the next value begins, rising, in [0, 1].

    Raises:
        ValueError: The number of values is wrong, or times decrease or are outside of [0, 1].

    Example:
        >>> [Steps((0.2, 0.1, 0.0), at=(0.5, 0.75))(p) for p in (0.0, 0.5, 0.7, 1.0)]
        [0.2, 0.1, 0.1, 0.0]
    """

    values: Sequence[float]
    at: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("values", "at"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if len(self.values) != len(self.at) + 1:
            raise ValueError(
                f"{self} has {len(self.values)} values and {len(self.at)} times; give one value more than times, such"
                " as Steps((0.2, 0.1, 0.0), at=(0.5, 0.75))."
            )
        if list(self.at) != sorted(self.at) or not all(0.0 <= time <= 1.0 for time in self.at):
            raise ValueError(f"{self}: the times must rise within [0, 1].")

    def __call__(self, progress: float) -> float:  # noqa: D102
        return self.values[sum(time <= progress for time in self.at)]


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    plain: tuple[Any, ...] = tuple(map(as_number, values)) if isinstance(values, Iterable) else (None,)
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in plain):
        raise ValueError(f"{name} of Steps is {values!r}; give a list of numbers.")
    return plain


def as_schedule(value: float | Schedule) -> Schedule:
    """A number as the schedule that is always that number; a schedule as it is.

    Example:
        >>> as_schedule(0.5)
        Constant(value=0.5)
    """
    return value if isinstance(value, Schedule) else Constant(value)


def check_fraction(name: str, schedule: Schedule, *, below_one: bool) -> None:
    """Refuse a schedule that leaves [0, 1), or [0, 1] where ``below_one`` is false, at any of its 101 percentiles.

    Raises:
        ValueError: It does; the message holds the value, the progress and the range.

    Example:
        >>> check_fraction("sparsity", Constant(95), below_one=True)
        Traceback (most recent call last):
            ...
        ValueError: sparsity is 95, but it is a fraction in [0, 1). Did you mean 0.95?
    """
    allowed = "[0, 1)" if below_one else "[0, 1]"
    for percent in (0, 100, *range(1, 100)):  # the ends first: they are what was given
        value = as_number(schedule(percent / 100))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}; give a number, a fraction in {allowed}, or a Schedule of it.")
        if not (0.0 <= value < 1.0 or (value == 1.0 and not below_one)):
            hint = f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""
            where = "" if isinstance(schedule, Constant) else f" at progress {percent / 100:.2f} of {schedule}"
            raise ValueError(f"{name} is {value:g}{where}, but it is a fraction in {allowed}.{hint}")
