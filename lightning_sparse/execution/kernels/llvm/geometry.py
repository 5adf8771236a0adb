"""Where pixels lie in padded planes. There, convolutions are sums over offsets, and a batch of images is one plane.

A plane is one channel of all images, row after row, with zeros in between::

    ............            border rows of zeros
    ....          <- front, the first pixel
        ppppppp.            pixels of a row, then ``border`` zeros: the right border of this row is the left of the next
        ppppppp.
        ........            border rows, the lower border of this image and the upper one of the next
        ppppppp.

The distance from a pixel to each of its neighbours is the same everywhere. So all positions of a plane are computed in
one go, including the border, whose results are cleared. Tensors that are connected by convolutions of stride 1 and by
additions have the same geometry, so that none of them is copied into another layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import numpy as np

from lightning_sparse.execution.kernels.llvm.emitter import LANES_OF_A_LINE
from lightning_sparse.execution.kernels.llvm.offsets import TILE_VECTORS
from lightning_sparse.execution.kernels.steps import ConvStep, MeanStep, PlaneStep

__all__ = ["Geometry", "Shape", "geometries", "shapes_of", "tiles_of"]

Shape = tuple[int, int, int]
"""Channels, height and width."""


@final
@dataclass(frozen=True)
class Geometry:
    """The layout of planes.

    Args:
        images: Images in a plane.
        rows: Rows of an image, including the border below it.
        pitch: Columns of a row, including the border after it.
        border: Rows and columns of zeros around each image, shared with the next.
    """

    images: int
    rows: int
    pitch: int
    border: int

    @property
    def front(self) -> int:
        """Entries before the first pixel: the upper border, rounded up to whole cache lines."""
        return _whole_lines(self.border * (self.pitch + 1))

    @property
    def image(self) -> int:
        """Entries from one image to the next."""
        return self.rows * self.pitch

    @property
    def plane(self) -> int:
        """Entries from one channel to the next: an odd number of cache lines, which spreads channels over the cache."""
        end = self.front + self.images * self.image + self.border * (self.pitch + 1)
        return _odd_lines(end + LANES_OF_A_LINE)

    def mask(self, height: int, width: int, dtype: Any) -> Any:
        """Return a plane that is -1 in pixels and 0 around them."""
        mask = np.zeros(self.plane + TILE_VECTORS * LANES_OF_A_LINE, dtype)
        pixels = mask[self.front : self.front + self.images * self.image].reshape(self.images, self.rows, self.pitch)
        pixels[:, :height, :width] = -1
        return mask


def tiles_of(geometry: Geometry, height: int, width: int, lanes: int) -> list[tuple[int, int]]:
    """Divide the positions of images into tiles.

    Returns:
        For each tile, its first position, counted from the first pixel, and its number of vectors.

    Example:
        >>> tiles_of(Geometry(images=1, rows=9, pitch=9, border=1), 8, 8, lanes=16)
        [(0, 5)]
    """
    one = (height - 1) * geometry.pitch + width
    through = (geometry.images - 1) * geometry.image + one
    if -(-through // lanes) <= geometry.images * -(-one // lanes):
        runs = [(0, through)]
    else:
        runs = [(image * geometry.image, one) for image in range(geometry.images)]
    return [(start + first * lanes, count) for start, length in runs for first, count in _shares(-(-length // lanes))]


def _shares(vectors: int) -> list[tuple[int, int]]:
    """Divide vectors evenly among as few tiles as possible; return each tile's first vector and number of vectors."""
    tiles = -(-vectors // TILE_VECTORS)
    bounds = [vectors * tile // tiles for tile in range(tiles + 1)]
    return [(first, last - first) for first, last in pairwise(bounds)]


def shapes_of(steps: Sequence[PlaneStep], inputs: dict[str, Shape]) -> dict[str, Shape]:
    """Return the shape of every tensor, given those of the inputs.

    Raises:
        ValueError: An image is smaller than a window, or has another number of channels than a layer takes.
    """
    shapes = dict(inputs)
    for step in steps:
        channels, height, width = shapes[step.x]
        if isinstance(step, MeanStep):
            shapes[step.y] = channels, 1, 1
            continue
        if isinstance(step, ConvStep):
            expected = step.weight.shape[1] * step.groups
            if channels != expected:
                raise ValueError(f"A convolution was given {channels} channels; give images with {expected}.")
            channels = step.weight.num_rows
        sizes = [
            (size + 2 * padding - reach - 1) // step.stride + 1
            for size, padding, reach in zip((height, width), step.padding, step.reach, strict=True)
        ]
        if min(sizes) < 1:
            raise ValueError(
                f"Images of {height} x {width} are smaller than a window of the network; give larger ones."
            )
        shapes[step.y] = channels, sizes[0], sizes[1]
    return shapes


def geometries(steps: Sequence[PlaneStep], shapes: dict[str, Shape], images: int) -> dict[str, Geometry]:
    """Return the geometry of every tensor except means, which are not planes."""
    joined = _Classes()
    for step in steps:
        joined.find(step.x)
        if isinstance(step, ConvStep):
            if step.stride == 1:
                joined.join(step.x, step.y)
            if step.residual is not None:
                joined.join(step.y, step.residual)
    border: dict[str, int] = {}
    least: dict[str, tuple[int, int]] = {}
    for step in steps:
        if isinstance(step, MeanStep):
            continue
        kind = joined.find(step.x)
        border[kind] = max(border.get(kind, 0), *step.padding)
        if step.stride == 2 and isinstance(step, ConvStep):
            # A convolution of stride 2 reads halves of its input, which have the rows and pitch of its output.
            kind = joined.find(step.y)
            needed = [size + reach // 2 for size, reach in zip(shapes[step.y][1:], step.reach, strict=True)]
            rows, pitch = least.get(kind, (0, 0))
            least[kind] = max(rows, needed[0]), max(pitch, needed[1])
    means = {step.y for step in steps if isinstance(step, MeanStep)}
    extents: dict[str, tuple[int, int]] = {}
    for name, (_, height, width) in shapes.items():
        kind = joined.find(name)
        rows, pitch = extents.get(kind, least.get(kind, (0, 0)))
        extents[kind] = max(rows, height + border.get(kind, 0)), max(pitch, width + border.get(kind, 0))
    return {
        name: Geometry(images, *extents[joined.find(name)], border.get(joined.find(name), 0))
        for name in shapes
        if name not in means
    }


class _Classes:
    """Sets of names that can be joined."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        """Return the name that represents a set."""
        while (parent := self._parent.setdefault(name, name)) != name:
            name = parent
        return name

    def join(self, first: str, second: str) -> None:
        """Join two sets."""
        self._parent[self.find(first)] = self.find(second)


def _whole_lines(count: int) -> int:
    return -(-count // LANES_OF_A_LINE) * LANES_OF_A_LINE


def _odd_lines(count: int) -> int:
    lines = -(-count // LANES_OF_A_LINE)
    return (lines | 1) * LANES_OF_A_LINE
