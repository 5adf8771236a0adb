r"""The kernel of GELU, which changes features in place: :math:`x \Phi(x)`, by the error function.

The error function is formula 7.1.26 of Abramowitz and Stegun. Its absolute error is below 1.5e-7, about the rounding
error of single precision, so it is used only there. With :math:`t = 1 / (1 + p z)` for :math:`z \ge 0`,

.. math:: \mathrm{erf}(z) = 1 - (a_1 t + a_2 t^2 + a_3 t^3 + a_4 t^4 + a_5 t^5) e^{-z^2}.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

from lightning_sparse.execution.kernels.llvm.emitter import I32, Emitter, Kernel, Layout

__all__ = ["GELU"]

# Items: rows, ``stride`` elements apart. Each has ``length`` elements, a whole number of vectors.
LAYOUT = Layout(("x", "length", "stride"))

P = 0.3275911
A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)

# exp(y) = 2^n exp(r) with n = round(y / ln 2), |r| <= ln 2 / 2; ln 2 in two parts, so that n ln 2 is exact enough.
LN2 = (0.693359375, -2.12194440e-4)
EXP_TERMS = tuple(1 / math.factorial(power) for power in range(7, -1, -1))
LEAST_EXPONENT = -87.0  # below it, the result is no normal number in single precision
ROUND = 1.5 * 2.0**23  # added to a small number, it leaves the nearest integer in the lowest bits


def _emit(emit: Emitter) -> None:
    if emit.elements.size == 4:
        lanes = emit.elements.lanes
        with emit.loop(emit.begin, emit.end) as item:
            row = emit.at(emit.address("x"), emit.build.mul(item, emit.field("stride")))
            with emit.loop(emit.integer(0), emit.field("length"), lanes) as place:
                address = emit.at(row, place)
                emit.store_vector(_gelu(emit, emit.load_vector(address)), address)
    emit.build.ret_void()


def _gelu(emit: Emitter, x: Any) -> Any:
    b = emit.build
    scaled = b.fmul(x, _all(emit, math.sqrt(0.5)))
    z = b.select(b.fcmp_ordered("<", scaled, _all(emit, 0.0)), b.fneg(scaled), scaled)
    t = b.fdiv(_all(emit, 1.0), emit.multiply_add(_all(emit, P), z, _all(emit, 1.0)))
    tail = b.fmul(_polynomial(emit, (*reversed(A), 0.0), t), _exp(emit, b.fneg(b.fmul(z, z))))
    # Phi(x) is half the tail left of zero, and one minus half the tail right of zero.
    half = b.fmul(_all(emit, 0.5), tail)
    left = b.fcmp_ordered("<", x, _all(emit, 0.0))
    return b.fmul(x, b.select(left, half, b.fsub(_all(emit, 1.0), half)))


def _exp(emit: Emitter, y: Any) -> Any:
    """The exponential of numbers that are not positive; NaN stays NaN."""
    b, integers = emit.build, ir.VectorType(I32, emit.elements.lanes)
    y = b.select(b.fcmp_ordered("<", y, _all(emit, LEAST_EXPONENT)), _all(emit, LEAST_EXPONENT), y)
    shifted = b.fadd(b.fmul(y, _all(emit, 1 / math.log(2))), _all(emit, ROUND))
    n = b.fsub(shifted, _all(emit, ROUND))
    rest = y
    for part in LN2:
        rest = emit.multiply_add(n, _all(emit, -part), rest)
    power = b.shl(b.bitcast(shifted, integers), ir.Constant(integers, [23] * emit.elements.lanes))
    bits = b.add(b.bitcast(_polynomial(emit, EXP_TERMS, rest), integers), power)
    return b.bitcast(bits, emit.elements.vector)


def _polynomial(emit: Emitter, terms: tuple[float, ...], x: Any) -> Any:
    """A polynomial by Horner's rule, the highest power first."""
    value = _all(emit, terms[0])
    for term in terms[1:]:
        value = emit.multiply_add(value, x, _all(emit, term))
    return value


def _all(emit: Emitter, number: float) -> Any:
    single = ir.Constant(emit.elements.scalar, number)
    return ir.Constant(emit.elements.vector, [single] * emit.elements.lanes)


GELU = Kernel("gelu", LAYOUT, _emit)
