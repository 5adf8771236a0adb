"""At which optimizer steps masks are updated. What is public here is found in :mod:`lightning_sparse.schedules`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

__all__ = ["Duration", "Timetable", "UpdateTimes", "as_number", "without_end"]

Duration = int | float
"""``int``: a number of optimizer steps. ``float`` in [0, 1]: a fraction of training."""


@dataclass(frozen=True)
class UpdateTimes:
    """The times of updates: at regular intervals from ``start`` to ``stop``, and at ``stop`` itself.

    Args:
        every: Time between updates, at least one step.
        start: Time of the first update.
        stop: Time of the last update.
        least: The least number of steps between updates if ``every`` is a fraction.
        before: Times of updates before ``start``, with another interval.

    Raises:
        ValueError: A duration is negative, a fraction is above 1, or ``stop`` comes before ``start``.

    Example:
        >>> UpdateTimes(every=0.1, start=0, stop=0.75).resolve(total_steps=100)
        Timetable(every=10, start=0, stop=75, before=None)
    """

    every: Duration
    start: Duration = 0
    stop: Duration = 1.0
    least: int = 1
    before: UpdateTimes | None = None

    def __post_init__(self) -> None:
        for name in ("every", "start", "stop"):
            object.__setattr__(self, name, as_number(getattr(self, name)))
        for name, duration in (("update_every", self.every), ("start", self.start), ("stop", self.stop)):
            _check_duration(name, duration)
        if self.every == 0:
            raise ValueError("update_every is 0; give at least 1 step, or a fraction of training above 0.")
        if type(self.start) is type(self.stop) and self.start > self.stop:
            raise ValueError(f"start ({self.start}) comes after stop ({self.stop}); give a stop of at least start.")

    @property
    def needs_total_steps(self) -> bool:
        """Whether a duration is a fraction of training."""
        own = any(isinstance(duration, float) for duration in (self.every, self.start, self.stop))
        return own or (self.before is not None and self.before.needs_total_steps)

    def resolve(self, total_steps: float) -> Timetable:
        """The times in steps, for a training of ``total_steps`` optimizer steps (``inf`` where it has no known end).

        Raises:
            ValueError: A fraction of a training without known end is asked for, or ``stop`` comes before ``start``.
        """
        if self.needs_total_steps and math.isinf(total_steps):
            own = {"start": self.start, "stop": self.stop, "update_every": self.every}
            earlier = self.before is not None and self.before.needs_total_steps
            raise ValueError(without_end(own | {"times before": self.before} if earlier else own))
        start, stop = _steps(self.start, total_steps), _steps(self.stop, total_steps)
        if isinstance(self.stop, float):
            stop = min(stop, int(total_steps) - 1)  # the last step that exists
        if isinstance(self.start, float):
            start = min(start, int(total_steps) - 1)
        if start > stop:
            raise ValueError(
                f"Updates start at step {start}, after they stop at {stop}, in {total_steps:g} steps. Give an earlier"
                " start or a later stop, or both in the same unit."
            )
        every = self.every if isinstance(self.every, int) else max(self.least, _steps(self.every, total_steps))
        before = None if self.before is None else self.before.resolve(total_steps)
        return Timetable(every=every, start=start, stop=stop, before=before)


# Steps; in less, two updates may be all that is meant.
_A_WHILE = 5


@dataclass(frozen=True)
class Timetable:
    """:class:`UpdateTimes` in optimizer steps. Step ``t`` is the one after ``t`` completed steps.

    Example:
        >>> times = Timetable(every=10, start=5, stop=28)
        >>> [times.latest(step) for step in (4, 5, 14, 15, 27, 28, 99)]
        [None, 5, 5, 15, 25, 28, 28]
    """

    every: int
    start: int
    stop: int
    before: Timetable | None = None

    @property
    def first(self) -> int:
        """The time of the first update."""
        return self.start if self.before is None else self.before.first

    @property
    def only_at_its_ends(self) -> bool:
        """Whether no update comes between the first time and the last, although there is time between them."""
        return self.before is None and _A_WHILE <= self.stop - self.start < self.every

    def shifted(self, by: int) -> Timetable:
        """The same times, ``by`` steps later.

        Example:
            >>> Timetable(every=10, start=0, stop=75).shifted(16)
            Timetable(every=10, start=16, stop=91, before=None)
        """
        before = None if self.before is None else self.before.shifted(by)
        return Timetable(every=self.every, start=self.start + by, stop=self.stop + by, before=before)

    def latest(self, step: int) -> int | None:
        """The latest time of an update up to ``step``, or ``None`` before the first."""
        if step < self.start:
            return None if self.before is None else self.before.latest(step)
        if step >= self.stop:
            return self.stop
        return step - (step - self.start) % self.every

    def is_before(self, step: int) -> bool:
        """Whether the latest update up to ``step`` belongs to :attr:`before`, or ends it, as that at :attr:`start`.

        Example:
            >>> times = Timetable(every=10, start=20, stop=50, before=Timetable(every=5, start=0, stop=20))
            >>> [times.is_before(step) for step in (4, 20, 29, 30)]
            [True, True, True, False]
        """
        latest = self.latest(step)
        return self.before is not None and latest is not None and latest <= self.start

    def progress(self, step: int) -> float:
        """How far ``step`` is from the first update to the last, in [0, 1]."""
        if step >= self.stop:
            return 1.0
        if step <= self.first:
            return 0.0
        return (step - self.first) / (self.stop - self.first)


def without_end(times: Mapping[str, object]) -> str:
    """The sentence that refuses times, by argument, if some are fractions of a training of unknown length.

    Example:
        >>> print(without_end({"start": 0, "stop": 0.5})[:48])
        stop=0.5 is in fractions of training, but the Tr
    """
    *others, last = [f"{name}={value}" for name, value in times.items() if not isinstance(value, int)]
    given = f"{', '.join(others)} and {last} are" if others else f"{last} is"
    return (
        f"{given} in fractions of training, but the Trainer has no known end (max_epochs=-1 without max_steps, or a"
        " data loader without length). Set max_epochs or max_steps, or give an int, which is a number of steps."
    )


def _check_duration(name: str, duration: Duration) -> None:
    if isinstance(duration, bool) or not isinstance(duration, int | float):
        raise ValueError(f"{name} is {duration!r}; give an int (optimizer steps) or a float (fraction of training).")
    if duration < 0 or (isinstance(duration, float) and not duration <= 1.0):
        raise ValueError(
            f"{name} is {duration!r}; give an int of at least 0 (optimizer steps) or a float in [0, 1] (fraction of"
            " training)."
        )


def _steps(duration: Duration, total_steps: float) -> int:
    return duration if isinstance(duration, int) else round(duration * total_steps)


def as_number(value: Any) -> Any:
    """A number as Python's own, from numpy or a tensor without dimensions too; anything else as it is."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, int) else value
