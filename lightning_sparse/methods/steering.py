r"""A controller of the strength of a regulariser that makes sparsity follow a given course.

It is ours, not a paper's. The error is the log ratio of densities, :math:`e = \ln (1 - s) - \ln (1 - s^*(p))`, above 0
if too many weights are active. A proportional-integral controller sets the strength; the integral keeps the final
sparsity,

.. math:: \alpha = A\,u, \qquad u = \operatorname{clip}_{-1}^{1}\Bigl(\frac{e}{b} + I\Bigr),
    \qquad \frac{dI}{dp} = \frac{e}{b\,\tau} \text{ after the arrival, where } |u| < 1

and may turn negative to undo an overshoot. The scale :math:`A` is found while training, because a useful strength may
be 1e-5 as well as 0.1: it grows as long as full strength does not close the gap, and is halved where sparsity crosses
its target at speed. Optimizers that divide by the size of past gradients (Adam) thus see strengths of one size; to an
answer on a logarithmic scale they would be deaf for a thousand steps after a strong one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_sparse.masks.schema import Check, number
from lightning_sparse.schedules import Constant, Polynomial, check_fraction

__all__ = ["STEERING_FIELDS", "Steering"]

_ARRIVAL = 0.7  # the share of training after which the target is the final sparsity
_BAND = 0.05  # b: the error, a ratio of densities, that is answered with full strength
_MEMORY = 0.03  # τ: the integral doubles the answer to a lasting error after this share of training
_FIRST_SCALE = 3e-2  # too much for long trainings, and halved there before the thresholds have left 0 by much
_LARGEST_SCALE = 0.5
_GROWTH = 100.0  # A grows tenfold in 2.3 % of training,
_LARGEST_GROWTH = 0.25  # and by a quarter in a step at most: momentum answers after ten
_FAST = 0.1  # of the band, in one step: a crossing that asks for a smaller scale
_SMALLEST_DENSITY = 1e-6

STEERING_FIELDS: Mapping[str, Check] = {
    "error": number(),
    "integral": number(-1.0, 1.0),
    "scale": number(0.0, _LARGEST_SCALE),
    "initial": number(0.0, 1.0),
}
"""What the fields of a saved :class:`Steering` may be."""


class Steering:
    """Finds the strength that holds sparsity on its course.

    Args:
        sparsity: The final sparsity, in [0, 1).

    Raises:
        ValueError: It is not.

    Example:
        >>> steering = Steering(0.9)
        >>> steering.observe(sparsity=0.1, progress=0.5, elapsed=0.01)  # too dense
        >>> steering.alpha > 0
        True
    """

    def __init__(self, sparsity: float) -> None:
        constant = Constant(sparsity)
        check_fraction("sparsity", constant, below_one=True)
        self.sparsity = constant.value
        self._error = 0.0
        self._integral = 0.0
        self._scale = _FIRST_SCALE
        self._initial = 0.0

    def begin_at(self, sparsity: float) -> None:
        """Let the course begin at this sparsity, where a network is sparse already."""
        self._initial = min(sparsity, self.sparsity)

    @property
    def scale(self) -> float:
        """The strength that it may give at most, now: A."""
        return self._scale

    @property
    def alpha(self) -> float:
        """The strength now; below 0 where sparsity has overshot."""
        return self._scale * _clip(self._wanted)

    @property
    def _wanted(self) -> float:
        """The answer as a share of the scale; beyond 1 it is cut."""
        return self._error / _BAND + self._integral

    def target(self, progress: float) -> float:
        """The sparsity that is due at ``progress`` in [0, 1] of training."""
        return Polynomial(self._initial, self.sparsity)(min(1.0, progress / _ARRIVAL))

    def observe(self, sparsity: float, progress: float, elapsed: float) -> None:
        """Take note of the sparsity at ``progress``, ``elapsed`` after the last look (fractions of training)."""
        before = self._error
        self._error = _log_density(sparsity) - _log_density(self.target(progress))
        if abs(self._wanted) >= 1.0:
            if abs(self._error) >= abs(before):
                growth = min(_GROWTH * elapsed, _LARGEST_GROWTH)
                self._scale = min(self._scale * math.exp(growth), _LARGEST_SCALE)
        elif progress >= _ARRIVAL:
            self._integral = _clip(self._integral + self._error / _BAND * elapsed / _MEMORY)
        if self._error * before < 0.0:
            self._integral *= 0.5
            if abs(self._error - before) > _FAST * _BAND:
                self._scale *= 0.5

    def state(self) -> dict[str, float]:
        """What must be remembered."""
        return {"error": self._error, "integral": self._integral, "scale": self._scale, "initial": self._initial}

    def load(self, state: Mapping[str, float]) -> None:
        """Take what :meth:`state` gave."""
        self._error, self._integral, self._scale = state["error"], state["integral"], state["scale"]
        self._initial = state["initial"]


def _clip(value: float) -> float:
    return min(max(value, -1.0), 1.0)


def _log_density(sparsity: float) -> float:
    return math.log(max(1.0 - sparsity, _SMALLEST_DENSITY))
