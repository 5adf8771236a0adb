"""The pooling kernels on padded planes: the largest value of a window, and the mean of an image."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lightning_sparse.execution.kernels.llvm.emitter import I32, I64, Emitter, Kernel, Layout

__all__ = ["LARGEST", "MEAN"]

# y[i][j] = max x[stride * i + a][stride * j + b] for a < kernel_height, b < kernel_width, with stride 1 or 2. Items:
# channels. ``x`` is the address of the first window, which may begin in the padding. Padding counts as zero, which is
# right if no input is negative. Whole vectors are written: ``keep`` clears what is not a pixel, and a row that spills
# into the next is written before it.
LARGEST_LAYOUT = Layout(
    (
        "x",
        "y",  # the address of the first pixel
        "keep",  # as in the offset kernel, from the first pixel on
        "images",
        "height",
        "width",
        "stride",
        "kernel_height",
        "kernel_width",
        "x_plane",
        "x_image",
        "x_pitch",
        "y_plane",
        "y_image",
        "y_pitch",
    )
)


def _emit_largest(emit: Emitter) -> None:
    b, lanes = emit.build, emit.elements.lanes
    zero, stride = emit.integer(0), emit.field("stride")
    last = b.add(emit.field("width"), emit.integer(lanes - 1))
    with (
        emit.loop(emit.begin, emit.end) as channel,
        emit.loop(zero, emit.field("images")) as image,
        emit.loop(zero, emit.field("height")) as row,
        emit.loop(zero, last, lanes) as column,
    ):
        x = b.add(b.mul(channel, emit.field("x_plane")), b.mul(image, emit.field("x_image")))
        x = b.add(x, b.mul(b.mul(row, stride), emit.field("x_pitch")))
        x = emit.at(emit.address("x"), b.add(x, b.mul(column, stride)))
        largest = _emit_window(emit, x, stride)
        place = b.add(b.mul(image, emit.field("y_image")), b.mul(row, emit.field("y_pitch")))
        place = b.add(place, column)
        mask = ir.VectorType(I32 if emit.elements.size == 4 else I64, lanes)
        kept = b.load(emit.at(emit.address("keep"), place, mask.element), typ=mask, align=emit.elements.size)
        bits = b.bitcast(b.and_(b.bitcast(largest, mask), kept), emit.elements.vector)
        target = b.add(b.mul(channel, emit.field("y_plane")), place)
        emit.store_vector(bits, emit.at(emit.address("y"), target))
    b.ret_void()


def _emit_window(emit: Emitter, x: Any, stride: Any) -> Any:
    """Return the largest value of each window, for a vector of neighbouring windows."""
    b, kind = emit.build, emit.elements.vector
    found = emit.variable(emit.broadcast(ir.Constant(emit.elements.scalar, float("-inf"))))
    with (
        emit.loop(emit.integer(0), emit.field("kernel_height")) as i,
        emit.loop(emit.integer(0), emit.field("kernel_width")) as j,
    ):
        address = emit.at(x, b.add(b.mul(i, emit.field("x_pitch")), j))
        first = emit.load_vector(address)
        value = emit.variable(first)
        with b.if_then(b.icmp_signed("==", stride, emit.integer(2))):
            second = emit.load_vector(emit.at(address, emit.integer(emit.elements.lanes)))
            b.store(emit.shuffle(first, second, range(0, 2 * emit.elements.lanes, 2)), value)
        new, old = emit.get(value, kind), emit.get(found, kind)
        # NaN counts as larger than any number, as in torch. Nothing is larger than NaN, so it stays.
        larger = b.or_(b.fcmp_ordered(">", new, old), b.fcmp_unordered("uno", new, new))
        b.store(b.select(larger, new, old), found)
    return emit.get(found, kind)


# y[image * channels + channel] = scale * sum of an image: of whole rows, with the zeros beside them. Items: channels.
MEAN_LAYOUT = Layout(("x", "y", "images", "channels", "positions", "plane", "image", "scale"))


def _emit_mean(emit: Emitter) -> None:
    b, lanes = emit.build, emit.elements.lanes
    positions = emit.field("positions")
    with emit.loop(emit.begin, emit.end) as channel, emit.loop(emit.integer(0), emit.field("images")) as image:
        start = b.add(b.mul(channel, emit.field("plane")), b.mul(image, emit.field("image")))
        x = emit.at(emit.address("x"), start)
        sums = emit.variable(ir.Constant(emit.elements.vector, None))
        total = emit.variable(ir.Constant(emit.elements.scalar, 0.0))
        with emit.counting(emit.integer(0), positions, lanes) as (place, counter):
            b.store(b.fadd(emit.get(sums, emit.elements.vector), emit.load_vector(emit.at(x, place))), sums)
        with emit.loop(emit.get(counter, I64), positions) as place:
            b.store(b.fadd(emit.get(total, emit.elements.scalar), emit.load(x, place)), total)
        vector = emit.get(sums, emit.elements.vector)
        single = emit.sum_of([b.extract_element(vector, ir.Constant(I32, lane)) for lane in range(lanes)])
        mean = b.fmul(b.fadd(single, emit.get(total, emit.elements.scalar)), emit.element_field("scale"))
        b.store(mean, emit.at(emit.address("y"), b.add(b.mul(image, emit.field("channels")), channel)))
    b.ret_void()


LARGEST = Kernel("largest", LARGEST_LAYOUT, _emit_largest)
MEAN = Kernel("mean", MEAN_LAYOUT, _emit_mean)
