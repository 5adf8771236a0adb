"""The kernel for single vectors. It uses SELL: the rows of a slice are the lanes of a vector register.

    y[order[s * L + l]] = clamp(bias[s * L + l] + sum_k value[k][l] * x[column[k][l]]),   k in slice s

With a batch of one, each weight is used only once, so the number of bytes decides. Columns take two bytes if there are
at most 65,536 inputs. Rows are sorted by length: those of a slice are about equally long, and its padding is small.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir

from lightning_sparse.execution.kernels.llvm.emitter import I1, I16, I32, I64, POINTER, Emitter, Kernel, Layout

__all__ = ["VECTORS_16", "VECTORS_32"]

SUMS = 4
"""Columns at a time, so that their loads overlap."""

LAYOUT = Layout(
    (
        "x",
        "y",
        "slices",  # int64: where each slice begins, in columns of the slice, and where the last ends
        "columns",  # uint16 or int32: inputs, a slice's rows side by side
        "values",
        "bias",  # in the order of the slices
        "order",  # int32: the output of each row of each slice; -1 where a slice has none
        "low",
        "high",
    )
)


def _emit(emit: Emitter, index: Any) -> None:
    b, lanes, kind = emit.build, emit.elements.lanes, emit.elements.vector
    x, columns, values = emit.address("x"), emit.address("columns"), emit.address("values")
    low, high = emit.broadcast(emit.element_field("low")), emit.broadcast(emit.element_field("high"))
    with emit.loop(emit.begin, emit.end) as piece:
        row = b.mul(piece, emit.integer(lanes))
        bias = emit.load_vector(emit.at(emit.address("bias"), row))
        sums = [emit.variable(bias), *(emit.variable(ir.Constant(kind, None)) for _ in range(SUMS - 1))]
        begin = emit.load(emit.address("slices"), piece, I64)
        end = emit.load(emit.address("slices"), b.add(piece, emit.integer(1)), I64)
        with emit.counting(begin, end, SUMS) as (column, counter):
            for copy, place in enumerate(sums):
                _emit_column(emit, place, x, columns, values, b.add(column, emit.integer(copy)), index)
        with emit.loop(emit.get(counter, I64), end) as column:
            _emit_column(emit, sums[0], x, columns, values, column, index)
        result = emit.clamp(emit.sum_of([emit.get(place, kind) for place in sums]), low, high)
        _emit_scatter(emit, result, row)
    b.ret_void()


def _emit_column(emit: Emitter, place: Any, x: Any, columns: Any, values: Any, column: Any, index: Any) -> None:
    start = emit.build.mul(column, emit.integer(emit.elements.lanes))
    inputs = emit.at(columns, start, index)
    gathered = _gather(emit, x, inputs, index) if emit.elements.gathers else _collect(emit, x, inputs, index)
    product = (emit.load_vector(emit.at(values, start)), gathered)
    emit.build.store(emit.multiply_add(*product, emit.get(place, emit.elements.vector)), place)


def _collect(emit: Emitter, x: Any, columns: Any, index: Any) -> Any:
    """Load entries of ``x`` one by one. Four or two columns are read at once, because loads are the bottleneck."""
    b, lanes = emit.build, emit.elements.lanes
    at_once = min(64 // index.width, lanes)
    gathered = ir.Constant(emit.elements.vector, ir.Undefined)
    for first in range(0, lanes, at_once):
        address = emit.at(columns, emit.integer(first), index)
        word = b.load(address, typ=ir.IntType(at_once * index.width), align=index.width // 8)
        word = word if word.type == I64 else b.zext(word, I64)
        for lane in range(first, first + at_once):
            shifted = b.lshr(word, emit.integer((lane - first) * index.width))
            column = b.and_(shifted, emit.integer(2**index.width - 1))
            gathered = b.insert_element(gathered, emit.load(x, column), ir.Constant(I32, lane))
    return gathered


def _gather(emit: Emitter, x: Any, columns: Any, index: Any) -> Any:
    """Load entries of ``x`` by one instruction."""
    b, lanes, kind = emit.build, emit.elements.lanes, emit.elements.vector
    narrow = b.load(columns, typ=ir.VectorType(index, lanes), align=index.width // 8)
    columns = b.zext(narrow, ir.VectorType(I32, lanes)) if index is I16 else narrow
    addresses = ir.VectorType(POINTER, lanes)
    places = b.gep(x, [columns], source_etype=emit.elements.scalar)
    places.type = addresses  # llvmlite takes a gep's type from its base alone, which is wrong here
    mask = ir.VectorType(I1, lanes)
    gather = emit.module.declare_intrinsic(
        f"llvm.masked.gather.{emit.elements.suffix}.v{lanes}p0",
        (),
        ir.FunctionType(kind, [addresses, I32, mask, kind]),
    )
    all_lanes = ir.Constant(mask, [True] * lanes)
    return b.call(gather, [places, ir.Constant(I32, emit.elements.size), all_lanes, ir.Constant(kind, ir.Undefined)])


def _emit_scatter(emit: Emitter, result: Any, row: Any) -> None:
    b, order, y = emit.build, emit.address("order"), emit.address("y")
    for lane in range(emit.elements.lanes):
        target = emit.load_index(order, b.add(row, emit.integer(lane)))
        with b.if_then(b.icmp_signed(">=", target, emit.integer(0))):
            b.store(b.extract_element(result, ir.Constant(I32, lane)), emit.at(y, target))


VECTORS_16 = Kernel("vectors_16", LAYOUT, partial(_emit, index=I16))
VECTORS_32 = Kernel("vectors_32", LAYOUT, partial(_emit, index=I32))
