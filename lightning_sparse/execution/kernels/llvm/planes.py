"""Convolutional networks as one program on padded planes. Nothing goes back to torch's layout in between."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lightning_sparse.execution.formats import balanced_blocks
from lightning_sparse.execution.kernels.llvm.compiler import Library
from lightning_sparse.execution.kernels.llvm.emitter import LANES_OF_A_LINE
from lightning_sparse.execution.kernels.llvm.geometry import Geometry, Shape, geometries, shapes_of, tiles_of
from lightning_sparse.execution.kernels.llvm.layouts import PAD, PHASES, UNPAD
from lightning_sparse.execution.kernels.llvm.offsets import OFFSETS, TILE_VECTORS
from lightning_sparse.execution.kernels.llvm.pooling import LARGEST, MEAN
from lightning_sparse.execution.kernels.llvm.program import Program, address_of, aligned, bits_of
from lightning_sparse.execution.kernels.steps import ConvStep, MeanStep, PlaneStep, PoolStep

__all__ = ["PlaneNetwork"]

GROUP_BYTES = 1 << 21
"""Images go through the network in groups whose largest tensors fit into the second- and third-level caches."""

PLANS_KEPT = 6
SLACK = 2 * TILE_VECTORS * LANES_OF_A_LINE
"""Extra entries after a buffer, because whole vectors may be read there."""


@final
class PlaneNetwork:
    """Convolutions, pooling and additions, for images of any size.

    Args:
        library: The kernels.
        steps: In an order in which they can be computed.
        inputs: Names of the input tensors.
        outputs: Names of the tensors to return.
        threads: How many threads compute.
    """

    def __init__(
        self, library: Library, steps: Sequence[PlaneStep], inputs: Sequence[str], outputs: Sequence[str], threads: int
    ) -> None:
        self.library = library
        self.steps = list(steps)
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.threads = threads
        self._lock = threading.Lock()  # one call at a time: a program has only one set of buffers
        self._plans: OrderedDict[tuple[Shape | int, ...], _Plan] = OrderedDict()

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return the outputs for contiguous images (N, C, H, W)."""
        sizes: tuple[Shape, ...] = tuple((t.shape[1], t.shape[2], t.shape[3]) for t in tensors)
        images = tensors[0].shape[0]
        for x in tensors:
            address_of(x, images)  # raises if there is none
        with self._lock:
            whole = self._plan(sizes, 1)
            results = [torch.empty(images, *whole.shapes[name], dtype=tensors[0].dtype) for name in self.outputs]
            group = self._group(sizes, images)
            for start in range(0, images, group):
                plan = self._plan(sizes, min(group, images - start))
                plan.run([tensor[start] for tensor in tensors], [result[start] for result in results])
        return results

    def compute_again(self, x: Tensor) -> None:
        """Compute as a call does, but copy no images in or out: the cost of a layer inside a network."""
        size: Shape = (x.shape[1], x.shape[2], x.shape[3])
        group = self._group([size], x.shape[0])
        for start in range(0, x.shape[0], group):
            program = self._plan((size,), min(group, x.shape[0] - start)).program
            with program.only((OFFSETS, PHASES, LARGEST)):
                program.run()

    def _group(self, sizes: Sequence[Shape], images: int) -> int:
        """How many images go through the network together."""
        return max(1, min(images, GROUP_BYTES // self._plan(tuple(sizes), 1).bytes_of_an_image))

    def _plan(self, sizes: tuple[Shape, ...], images: int) -> _Plan:
        key = (*sizes, images)
        if key not in self._plans:
            self._plans[key] = _Plan(self, dict(zip(self.inputs, sizes, strict=True)), images)
            while len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]


class _Plan:
    """The program for a group of images of one size."""

    def __init__(self, network: PlaneNetwork, inputs: dict[str, Shape], images: int) -> None:
        self.network = network
        self.images = images
        self.shapes = shapes_of(network.steps, inputs)
        self.geometry = geometries(network.steps, self.shapes, images)
        self.program = Program(network.library, network.threads)
        first = next(step for step in network.steps if isinstance(step, ConvStep))
        self.dtype = first.weight.values.dtype
        self.buffers = _Buffers(self)
        self._masks: dict[tuple[Geometry, int, int], int] = {}
        self.ports: dict[str, list[int]] = {name: [] for name in [*network.inputs, *network.outputs]}
        for name in inputs:
            self._copy_images(PAD, name, into_planes=True)
        for number, step in enumerate(network.steps):
            self._add(step, number)
        self.program.seal()

    @property
    def bytes_of_an_image(self) -> int:
        """The most bytes that the input and output of a layer take together."""
        size = self.dtype.itemsize
        planes = {name: self.shapes[name][0] * geometry.image for name, geometry in self.geometry.items()}
        return max(
            1, max(size * (planes[step.x] + planes.get(step.y, 0)) for step in self.network.steps) // self.images
        )

    def run(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Compute a group of images. Each tensor is the first image of the group."""
        for name, tensor in zip([*self.network.inputs, *self.network.outputs], [*inputs, *outputs], strict=True):
            address = tensor.data_ptr()
            for port in self.ports[name]:
                self.program.words[port] = address
        self.program.run()

    def mask(self, name: str) -> int:
        """Return the address of the plane that tells pixels from borders."""
        _, height, width = self.shapes[name]
        key = self.geometry[name], height, width
        if key not in self._masks:
            integers = np.int32 if self.dtype.itemsize == 4 else np.int64
            self._masks[key] = self.program.hold(self.geometry[name].mask(height, width, integers))
        return self._masks[key]

    def pixels(self, name: str) -> int:
        """Return the address of the first pixel."""
        return self.buffers.address(name) + self.geometry[name].front * self.dtype.itemsize

    def _add(self, step: PlaneStep, number: int) -> None:
        if isinstance(step, ConvStep):
            self.buffers.take(step.y, number, in_place_of=step.residual if step.residual != step.x else None)
            self._convolve(step)
        elif isinstance(step, PoolStep):
            self.buffers.take(step.y, number)
            self._pool(step)
        else:
            self._mean(step)
        if step.y in self.network.outputs and not isinstance(step, MeanStep):
            self._copy_images(UNPAD, step.y, into_planes=False)
        self.buffers.release_after(number)

    def _copy_images(self, kernel: Any, name: str, *, into_planes: bool) -> None:
        if into_planes:
            self.buffers.take(name, -1)
        channels, height, width = self.shapes[name]
        geometry, planes = self.geometry[name], self.pixels(name)
        number = self.program.add(
            kernel, channels,
            x=0 if into_planes else planes, y=planes if into_planes else 0, images=self.images, channels=channels,
            height=height, width=width, plane=geometry.plane, image=geometry.image, pitch=geometry.pitch,
        )  # fmt: skip
        self.ports[name].append(self.program.port(number, kernel, "x" if into_planes else "y"))

    def _convolve(self, step: ConvStep) -> None:
        program, threads, target = self.program, self.program.threads, self.geometry[step.y]
        _, height, width = self.shapes[step.y]
        tiles = tiles_of(target, height, width, program.library.lanes)
        if step.stride == 1:
            x, offsets, x_front = self.buffers.address(step.x), self._near_offsets(step), target.front
        else:
            x, offsets = self._halves(step)
            x_front = 0
        places = np.array([(x_front + at, target.front + at, count) for at, count in tiles], np.int64)
        num_blocks = 1 if len(tiles) % threads == 0 else threads
        program.add(
            OFFSETS, len(tiles) * num_blocks,
            x=x, y=self.buffers.address(step.y),
            residual=0 if step.residual is None else self.buffers.address(step.residual),
            rows=program.hold(step.weight.rows), offsets=program.hold(offsets),
            values=program.hold(step.weight.values), bias=program.hold(step.bias), keep=self.mask(step.y),
            tiles=program.hold(places), blocks=program.hold(balanced_blocks(step.weight.rows, num_blocks)),
            num_blocks=num_blocks, plane=target.plane, low=bits_of(step.low), high=bits_of(step.high),
        )  # fmt: skip

    def _near_offsets(self, step: ConvStep) -> Any:
        """Return the offsets of weights from the pixel of the output."""
        channel, row, column = _taps(step)
        geometry = self.geometry[step.x]
        offsets = channel * geometry.plane + (row - step.padding[0]) * geometry.pitch + column - step.padding[1]
        return _narrow(offsets)

    def _halves(self, step: ConvStep) -> tuple[int, Any]:
        """Split the input into every other row and column; return their address, and the offsets of weights."""
        source, target, size = self.geometry[step.x], self.geometry[step.y], self.dtype.itemsize
        channel, row, column = _taps(step)
        phases = (row % 2) * 2 + column % 2
        wanted = int(np.bitwise_or.reduce(1 << phases)) if len(phases) else 0
        _, out_height, out_width = self.shapes[step.y]
        height, width = out_height + step.reach[0] // 2, out_width + step.reach[1] // 2
        channels = self.shapes[step.x][0]
        y_plane = _padded_plane(self.images * target.image)
        x = self.buffers.scratch(channels * 4 * y_plane)
        corner = self.pixels(step.x) - size * (step.padding[0] * source.pitch + step.padding[1])
        self.program.add(
            PHASES, channels,
            x=corner, y=x, images=self.images, height=height, width=width, x_plane=source.plane, x_image=source.image,
            x_pitch=source.pitch, y_plane=y_plane, y_image=target.image, y_pitch=target.pitch, wanted=wanted,
        )  # fmt: skip
        offsets = (channel * 4 + phases) * y_plane + (row // 2) * target.pitch + column // 2
        return x, _narrow(offsets)

    def _pool(self, step: PoolStep) -> None:
        source, target, size = self.geometry[step.x], self.geometry[step.y], self.dtype.itemsize
        channels, height, width = self.shapes[step.y]
        corner = self.pixels(step.x) - size * (step.padding[0] * source.pitch + step.padding[1])
        self.program.add(
            LARGEST, channels,
            x=corner, y=self.pixels(step.y), keep=self.mask(step.y) + target.front * size, images=self.images,
            height=height, width=width, stride=step.stride, kernel_height=step.kernel[0], kernel_width=step.kernel[1],
            x_plane=source.plane, x_image=source.image, x_pitch=source.pitch,
            y_plane=target.plane, y_image=target.image, y_pitch=target.pitch,
        )  # fmt: skip

    def _mean(self, step: MeanStep) -> None:
        channels, height, width = self.shapes[step.x]
        geometry = self.geometry[step.x]
        positions = (height - 1) * geometry.pitch + width
        number = self.program.add(
            MEAN, channels,
            x=self.pixels(step.x), y=0, images=self.images, channels=channels, positions=positions,
            plane=geometry.plane, image=geometry.image, scale=bits_of(1 / (height * width)),
        )  # fmt: skip
        self.ports[step.y].append(self.program.port(number, MEAN, "y"))


class _Buffers:
    """Memory for the tensors of a plan. A buffer is used again when its tensor is not read any more.

    Only a tensor of the same geometry and size uses a buffer again: its borders are then zero.
    """

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._last_use: dict[str, int] = {}
        for number, step in enumerate(plan.network.steps):
            self._last_use[step.x] = number
            if isinstance(step, ConvStep) and step.residual is not None:
                self._last_use[step.residual] = number
        self._held: dict[str, tuple[int, int]] = {}
        self._free: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
        self._overwritten: set[str] = set()
        self._scratch = (0, 0)

    def address(self, name: str) -> int:
        """Return the address of a tensor's first plane."""
        return self._held[name][0]

    def take(self, name: str, number: int, in_place_of: str | None = None) -> None:
        """Find memory for a tensor: that of a residual that is not needed afterwards, a free buffer, or a new one."""
        channels = self._plan.shapes[name][0]
        if in_place_of is not None and self._last_use[in_place_of] == number and in_place_of in self._held:
            self._held[name] = self._held[in_place_of]
            self._overwritten.add(in_place_of)
            return
        free = self._free.setdefault(self._kind(name), [])
        fitting = [buffer for buffer in free if buffer[1] >= channels]
        if fitting:
            self._held[name] = min(fitting, key=lambda buffer: buffer[1])
            free.remove(self._held[name])
        else:
            # If the number of rows is odd, the kernel that halves them reads one row more.
            entries = channels * self._plan.geometry[name].plane + 2 * self._plan.geometry[name].pitch + SLACK
            array = aligned((entries,), self._plan.dtype)
            self._held[name] = self._plan.program.hold(array), channels

    def release_after(self, number: int) -> None:
        """Free the buffers that no later step reads."""
        for name in [name for name in self._held if self._last_use.get(name, -1) <= number]:
            buffer = self._held.pop(name)
            if name not in self._overwritten:
                self._free.setdefault(self._kind(name), []).append(buffer)

    def scratch(self, entries: int) -> int:
        """Return memory that lasts until the next call."""
        if entries > self._scratch[1]:
            array = aligned((entries + SLACK,), self._plan.dtype)
            self._scratch = self._plan.program.hold(array), entries
        return self._scratch[0]

    def _kind(self, name: str) -> tuple[Any, ...]:
        return (self._plan.geometry[name], *self._plan.shapes[name][1:])


def _taps(step: ConvStep) -> tuple[Any, Any, Any]:
    """Return channel, row and column, in the padded input, of what each weight multiplies."""
    outputs, channels, height, width = step.weight.shape
    channel, place = np.divmod(step.weight.columns.astype(np.int64), height * width)
    row, column = np.divmod(place, width)
    if step.groups > 1:
        group = np.arange(outputs) // (outputs // step.groups)
        channel = channel + np.repeat(group * channels, np.diff(step.weight.rows))
    return channel, row * step.dilation[0], column * step.dilation[1]


def _narrow(offsets: Any) -> Any:
    """Return offsets as 32-bit integers."""
    if len(offsets) and offsets.max() > np.iinfo(np.int32).max:
        raise ValueError(
            "A layer's input has over 2**31 entries, too many for sparse convolutions; give smaller images."
        )
    return offsets.astype(np.int32)


def _padded_plane(count: int) -> int:
    lines = -(-(count + TILE_VECTORS * LANES_OF_A_LINE) // LANES_OF_A_LINE)
    return (lines | 1) * LANES_OF_A_LINE
