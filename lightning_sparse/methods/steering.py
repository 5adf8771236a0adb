r"""Steering the strength of a regulariser so that sparsity follows a stated course.

Ours, not a paper's. With the error :math:`e = s^*(p) - s`, a proportional-integral controller acts on the logarithm of
the strength, through zero, because a useful strength may be 1e-6 as well as 1e-2, and may have to turn negative to undo
an overshoot:

.. math:: \alpha = 2 \alpha_0 \sinh z, \qquad z = k \Bigl(e + \frac{1}{\tau} \int e \, dp\Bigr)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_sparse.schedules import Constant, Polynomial, check_fraction

__all__ = ["Steering"]

_SMALLEST = 1e-6  # α₀: the strength around which the scale turns from logarithmic to linear
_GAIN = 100.0  # k: an error of 0.05 is answered by α = 1.5e-4, one of 0.1 by 0.02
_MEMORY = 0.05  # τ: the integral doubles the answer to a lasting error after a twentieth of training
_LIMIT = 14.0  # of z and its parts: |α| ≤ 1.2
_ARRIVAL = 0.7  # the share of training after which the target is the final sparsity


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
        check_fraction("sparsity", Constant(sparsity), below_one=True)
        self.sparsity = sparsity
        self._error = 0.0
        self._integral = 0.0

    @property
    def alpha(self) -> float:
        """The strength now; below 0 where sparsity has overshot."""
        z = _clip(_GAIN * self._error + self._integral)
        return 2.0 * _SMALLEST * math.sinh(z)

    def target(self, progress: float) -> float:
        """The sparsity that is due at ``progress`` in [0, 1] of training."""
        return Polynomial(0.0, self.sparsity)(min(1.0, progress / _ARRIVAL))

    def observe(self, sparsity: float, progress: float, elapsed: float) -> None:
        """Take note of the sparsity at ``progress``, ``elapsed`` after the last look (fractions of training)."""
        self._error = self.target(progress) - sparsity
        self._integral = _clip(self._integral + _GAIN * self._error * elapsed / _MEMORY)

    def state(self) -> dict[str, float]:
        """What must be remembered."""
        return {"error": self._error, "integral": self._integral}

    def load(self, state: Mapping[str, float]) -> None:
        """Take what :meth:`state` gave."""
        self._error, self._integral = state["error"], state["integral"]


def _clip(value: float) -> float:
    return min(max(value, -_LIMIT), _LIMIT)
