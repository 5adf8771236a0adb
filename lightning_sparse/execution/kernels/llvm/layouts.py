"""The kernels that move activations from torch's layouts into ours and back, and those that split planes for strides.

``transpose`` turns rows (batch, feature) into features (feature, batch) and back. ``pad`` and ``unpad`` copy images
into padded planes and out of them. ``phases`` splits planes into every other row and column, so that a convolution of
stride 2 reads neighbours.
"""

from __future__ import annotations

from typing import Any

from lightning_sparse.execution.kernels.llvm.emitter import I64, Emitter, Kernel, Layout

__all__ = ["PAD", "PHASES", "TRANSPOSE", "UNPAD"]

# y[j][i] = x[i][j] for i < rows and j < columns. Items: blocks of as many columns as a vector has lanes. If the rows of
# x are longer than ``columns`` (x_padded), whole vectors are read at their ends. If the rows of y are longer than
# ``rows`` (y_padded), the last row of x is repeated until y's vector is full: those entries are read, but never used.
TRANSPOSE_LAYOUT = Layout(("x", "y", "rows", "columns", "x_stride", "y_stride", "x_padded", "y_padded"))


def _emit_transpose(emit: Emitter) -> None:
    b, lanes, zero = emit.build, emit.integer(emit.elements.lanes), emit.integer(0)
    rows, columns = emit.field("rows"), emit.field("columns")
    with emit.loop(emit.begin, emit.end) as block:
        j = b.mul(block, lanes)
        j_end = emit.smaller(b.add(j, lanes), columns)
        whole = b.icmp_signed("==", b.sub(j_end, j), lanes)
        with emit.counting(zero, b.select(whole, rows, zero), emit.elements.lanes) as (i, counter):
            _emit_square(emit, i, j)
        readable = b.or_(whole, b.icmp_signed("!=", emit.field("x_padded"), zero))
        y_padded = b.icmp_signed("!=", emit.field("y_padded"), zero)
        stop = b.add(rows, b.select(y_padded, emit.integer(emit.elements.lanes - 1), zero))
        stop = b.select(readable, stop, zero)
        with emit.counting(emit.get(counter, I64), stop, emit.elements.lanes) as (i, counter):
            _emit_square(emit, i, j, edges=(rows, j_end))
        with emit.loop(emit.get(counter, I64), rows) as i, emit.loop(j, j_end) as column:
            value = emit.load(emit.address("x"), b.add(b.mul(i, emit.field("x_stride")), column))
            b.store(value, emit.at(emit.address("y"), b.add(b.mul(column, emit.field("y_stride")), i)))
    b.ret_void()


def _emit_square(emit: Emitter, i: Any, j: Any, edges: tuple[Any, Any] | None = None) -> None:
    """Transpose a square of as many rows as a vector has lanes: perfect shuffles of its halves, log2(lanes) times.

    At an edge, rows after the last repeat the last, and columns after the last are not written.
    """
    b, lanes = emit.build, emit.elements.lanes
    lines: list[Any] = []
    for line in range(lanes):
        row = b.add(i, emit.integer(line))
        row = emit.smaller(row, b.sub(edges[0], emit.integer(1))) if edges else row
        lines.append(emit.load_vector(emit.at(emit.address("x"), b.add(b.mul(row, emit.field("x_stride")), j))))
    low = [place // 2 + lanes * (place % 2) for place in range(lanes)]
    high = [place + lanes // 2 for place in low]
    for _ in range(lanes.bit_length() - 1):
        pairs = list(zip(lines[: lanes // 2], lines[lanes // 2 :], strict=True))
        lines = [emit.shuffle(*pair, places) for pair in pairs for places in (low, high)]
    for line, vector in enumerate(lines):
        column = b.add(j, emit.integer(line))
        address = emit.at(emit.address("y"), b.add(b.mul(column, emit.field("y_stride")), i))
        if edges is None:
            emit.store_vector(vector, address)
        else:
            with b.if_then(b.icmp_signed("<", column, edges[1])):
                emit.store_vector(vector, address)


# Copies between contiguous images (image, channel, row, column) and planes. Items: channels. For planes, ``x`` or ``y``
# is the address of the first pixel; ``image`` and ``pitch`` are the elements from one image and row to the next.
IMAGES_LAYOUT = Layout(("x", "y", "images", "channels", "height", "width", "plane", "image", "pitch"))


def _emit_images(emit: Emitter, *, into_planes: bool) -> None:
    b = emit.build
    channels, height, width = emit.field("channels"), emit.field("height"), emit.field("width")
    zero = emit.integer(0)
    with (
        emit.loop(emit.begin, emit.end) as channel,
        emit.loop(zero, emit.field("images")) as image,
        emit.loop(zero, height) as row,
    ):
        picture = b.add(b.mul(image, channels), channel)
        contiguous = b.mul(b.add(b.mul(picture, height), row), width)
        in_plane = b.add(b.mul(channel, emit.field("plane")), b.mul(image, emit.field("image")))
        in_plane = b.add(in_plane, b.mul(row, emit.field("pitch")))
        source, target = (contiguous, in_plane) if into_planes else (in_plane, contiguous)
        _emit_copy(emit, emit.at(emit.address("x"), source), emit.at(emit.address("y"), target), width)
    b.ret_void()


def _emit_copy(emit: Emitter, source: Any, target: Any, count: Any) -> None:
    with emit.counting(emit.integer(0), count, emit.elements.lanes) as (place, counter):
        emit.store_vector(emit.load_vector(emit.at(source, place)), emit.at(target, place))
    with emit.loop(emit.get(counter, count.type), count) as place:
        emit.build.store(emit.load(source, place), emit.at(target, place))


# y[channel * 4 + phase][i][j] = x[channel][2i + a][2j + b] with phase = 2a + b. Items: channels. ``x`` is the address
# of the first entry of the padding. Whole vectors are written: a row may spill into the next, which is written later.
PHASES_LAYOUT = Layout(
    ("x", "y", "images", "height", "width", "x_plane", "x_image", "x_pitch", "y_plane", "y_image", "y_pitch", "wanted")
)


def _emit_phases(emit: Emitter) -> None:
    b = emit.build
    wanted = emit.field("wanted")
    with emit.loop(emit.begin, emit.end) as channel, emit.loop(emit.integer(0), emit.field("images")) as image:
        for vertical in range(2):
            both = b.and_(wanted, emit.integer(3 << (2 * vertical)))
            with (
                b.if_then(b.icmp_signed("!=", both, emit.integer(0))),
                emit.loop(emit.integer(0), emit.field("height")) as row,
            ):
                _emit_phase_row(emit, channel, image, row, vertical)
    b.ret_void()


def _emit_phase_row(emit: Emitter, channel: Any, image: Any, row: Any, vertical: int) -> None:
    b, lanes = emit.build, emit.elements.lanes
    from_row = b.add(b.mul(row, emit.integer(2)), emit.integer(vertical))
    source = emit.at(emit.address("x"), _place(emit, channel, image, from_row, "x"))
    phase = b.add(b.mul(channel, emit.integer(4)), emit.integer(2 * vertical))
    targets = [
        emit.at(emit.address("y"), _place(emit, b.add(phase, emit.integer(side)), image, row, "y")) for side in range(2)
    ]
    stop = b.add(emit.field("width"), emit.integer(lanes - 1))
    with emit.loop(emit.integer(0), stop, lanes) as column:
        pair = b.mul(column, emit.integer(2))
        first = emit.load_vector(emit.at(source, pair))
        second = emit.load_vector(emit.at(source, b.add(pair, emit.integer(lanes))))
        for side, target in enumerate(targets):
            emit.store_vector(emit.shuffle(first, second, range(side, 2 * lanes, 2)), emit.at(target, column))


def _place(emit: Emitter, channel: Any, image: Any, row: Any, side: str) -> Any:
    b = emit.build
    start = b.add(b.mul(channel, emit.field(f"{side}_plane")), b.mul(image, emit.field(f"{side}_image")))
    return b.add(start, b.mul(row, emit.field(f"{side}_pitch")))


def _emit_pad(emit: Emitter) -> None:
    _emit_images(emit, into_planes=True)


def _emit_unpad(emit: Emitter) -> None:
    _emit_images(emit, into_planes=False)


TRANSPOSE = Kernel("transpose", TRANSPOSE_LAYOUT, _emit_transpose)
PAD = Kernel("pad", IMAGES_LAYOUT, _emit_pad)
UNPAD = Kernel("unpad", IMAGES_LAYOUT, _emit_unpad)
PHASES = Kernel("phases", PHASES_LAYOUT, _emit_phases)
