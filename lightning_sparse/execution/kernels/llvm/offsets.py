"""The offset kernel: sparse matrix times feature-major activations, and convolutions on padded planes alike.

Activations are planes of positions, one plane for each channel. A weight is a value and the offset of its input:

    y[r][p] = clamp(bias[r] + sum_k value[k] * x[offset[k] + p] + residual[r][p]) & keep[p]

A linear layer's positions are the columns of its batch. A convolution's positions are the pixels of all images of a
batch, and an offset encodes channel, row and column of the kernel. ``keep`` is all ones in pixels and zero in the
padding around them, so that the padding stays zero. Positions are computed in tiles of up to eight vectors, whose sums
stay in registers. All rows are computed for one tile before the next, so that the tile's inputs stay in the cache.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lightning_sparse.execution.kernels.llvm.emitter import I32, I64, Emitter, Kernel, Layout

__all__ = ["OFFSETS", "TILE_VECTORS"]

TILE_VECTORS = 8
"""The most vectors of a tile: together with one for the weight, they fit into 16 registers."""

SUMS = 8
"""Independent sums, so that no multiply-add has to wait for the last one: latency times throughput."""

LAYOUT = Layout(
    (
        "x",  # input planes
        "y",  # output planes
        "residual",  # planes like the output, added before the clamp; 0 for none
        "rows",  # int64: where each row's weights begin, and where the last ends
        "offsets",  # int32: of each weight, in elements
        "values",  # of each weight
        "bias",  # of each row
        "keep",  # int32 or int64, as wide as an element, for each position of the output: 0 or -1
        "tiles",  # int64, three for each tile: first position in x, first position in y, number of vectors
        "blocks",  # int64: where each block of rows begins, and where the last ends
        "num_blocks",
        "plane",  # elements from one output plane to the next
        "low",
        "high",
    )
)


def _emit(emit: Emitter) -> None:
    b = emit.build
    num_blocks = emit.field("num_blocks")
    with emit.loop(emit.begin, emit.end) as item:
        tile = b.mul(b.sdiv(item, num_blocks), emit.integer(3))
        block = b.srem(item, num_blocks)
        x_start, y_start, vectors = (
            emit.load(emit.address("tiles"), b.add(tile, emit.integer(place)), I64) for place in range(3)
        )
        first = emit.load(emit.address("blocks"), block, I64)
        last = emit.load(emit.address("blocks"), b.add(block, emit.integer(1)), I64)
        done = b.append_basic_block("tile_done")
        switch = b.switch(vectors, done)
        for width in range(1, TILE_VECTORS + 1):
            with b.goto_block(case := b.append_basic_block(f"tile_of_{width}")):
                _emit_tile(emit, width, x_start, y_start, first, last)
                b.branch(done)
            switch.add_case(emit.integer(width), case)
        b.position_at_end(done)
    b.ret_void()


def _emit_tile(emit: Emitter, width: int, x_start: Any, y_start: Any, first: Any, last: Any) -> None:
    """Compute all rows of a block, for one tile of ``width`` vectors."""
    x, keep = emit.at(emit.address("x"), x_start), emit.at(emit.address("keep"), y_start, _mask(emit).element)
    with emit.loop(first, last) as row:
        sums = _emit_row(emit, width, x, row)
        start = emit.build.add(emit.build.mul(row, emit.field("plane")), y_start)
        _emit_epilogue(emit, sums, start, keep)


def _emit_row(emit: Emitter, width: int, x: Any, row: Any) -> list[Any]:
    """Return the sums of one row: a loop over several weights at once, then a loop over the rest."""
    unroll = max(1, SUMS // width)
    zero = ir.Constant(emit.elements.vector, None)
    bias = emit.broadcast(emit.load(emit.address("bias"), row))
    sums = [[emit.variable(zero if copy else bias) for _ in range(width)] for copy in range(unroll)]
    begin = emit.load(emit.address("rows"), row, I64)
    end = emit.load(emit.address("rows"), emit.build.add(row, emit.integer(1)), I64)
    rest = begin
    if unroll > 1:
        with emit.counting(begin, end, unroll) as (weight, counter):
            for copy in range(unroll):
                _emit_weight(emit, sums[copy], x, emit.build.add(weight, emit.integer(copy)))
        rest = emit.get(counter, I64)
    with emit.loop(rest, end) as weight:
        _emit_weight(emit, sums[0], x, weight)
    kind = emit.elements.vector
    return [emit.sum_of([emit.get(copy[vector], kind) for copy in sums]) for vector in range(width)]


def _emit_weight(emit: Emitter, sums: list[Any], x: Any, weight: Any) -> None:
    value = emit.broadcast(emit.load(emit.address("values"), weight))
    inputs = emit.at(x, emit.load_index(emit.address("offsets"), weight))
    for vector, place in enumerate(sums):
        loaded = emit.load_vector(emit.at(inputs, emit.integer(vector * emit.elements.lanes)))
        emit.build.store(emit.multiply_add(value, loaded, emit.get(place, emit.elements.vector)), place)


def _emit_epilogue(emit: Emitter, sums: list[Any], start: Any, keep: Any) -> None:
    """Add the residual, clamp, clear the padding, and store."""
    b, lanes = emit.build, emit.elements.lanes
    places = [emit.variable(value) for value in sums]
    residual = emit.field("residual")
    with b.if_then(b.icmp_signed("!=", residual, emit.integer(0))):
        base = emit.at(emit.address("residual"), start)
        for vector, place in enumerate(places):
            added = emit.load_vector(emit.at(base, emit.integer(vector * lanes)))
            b.store(b.fadd(emit.get(place, emit.elements.vector), added), place)
    low, high = emit.broadcast(emit.element_field("low")), emit.broadcast(emit.element_field("high"))
    y, mask = emit.at(emit.address("y"), start), _mask(emit)
    for vector, place in enumerate(places):
        at = emit.integer(vector * lanes)
        value = emit.clamp(emit.get(place, emit.elements.vector), low, high)
        kept = b.load(emit.at(keep, at, mask.element), typ=mask, align=emit.elements.size)
        bits = b.and_(b.bitcast(value, mask), kept)
        emit.store_vector(b.bitcast(bits, emit.elements.vector), emit.at(y, at))


def _mask(emit: Emitter) -> Any:
    return ir.VectorType(I32 if emit.elements.size == 4 else I64, emit.elements.lanes)


OFFSETS = Kernel("offsets", LAYOUT, _emit)
