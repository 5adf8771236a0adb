"""The sparsity of every layer over training, and its picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from lightning_sparse.masks.schema import Check, any_of, list_of, names, nan, number, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TIMELINE_FIELDS", "SparsityTimeline", "TimelineState"]

# A picture has no more columns than this; where a training has more, every second one is dropped.
_MAX_COLUMNS = 1024


TIMELINE_FIELDS: Mapping[str, Check] = {
    "layers": names,
    "steps": list_of(whole()),
    "sparsity": list_of(list_of(any_of(nan, number(0.0, 1.0)))),
}
"""What the fields of a saved :class:`SparsityTimeline` may be."""


class TimelineState(TypedDict):
    """A :class:`SparsityTimeline` in a checkpoint."""

    layers: list[str]
    steps: list[int]
    sparsity: list[list[float]]


class SparsityTimeline:
    """The sparsity of each layer at some steps. It keeps at most 1024 steps, evenly spaced.

    Args:
        layers: Names of the layers, from the input of the network to its output.

    Attributes:
        layers: Names of the layers.
        steps: The steps that are kept.
        sparsity: For each of them the sparsity of each layer, in [0, 1]; NaN while a layer had no mask.

    Example:
        >>> timeline = SparsityTimeline(["0.weight", "2.weight"])
        >>> timeline.record(0, [0.0, 0.0])
        >>> timeline.record(10, [0.5, 0.9])
        >>> timeline.steps, timeline.sparsity
        ([0, 10], [[0.0, 0.0], [0.5, 0.9]])
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = list(layers)
        self.steps: list[int] = []
        self.sparsity: list[list[float]] = []

    def add(self, layers: Sequence[str]) -> None:
        """Take in layers that had no mask until now; those that are here already stay as they are."""
        known, self.layers = self.layers, list(dict.fromkeys([*self.layers, *layers]))
        self.sparsity = _of_layers(self.layers, known, self.sparsity)

    def record(self, step: int, sparsity: Sequence[float]) -> None:
        """Keep the sparsity of each layer from ``step`` on; a second record of a step replaces the first."""
        if self.steps and self.steps[-1] == step:
            self.sparsity[-1] = list(sparsity)
            return
        self.steps.append(step)
        self.sparsity.append(list(sparsity))
        if len(self.steps) > _MAX_COLUMNS:
            self.steps, self.sparsity = self.steps[::2], self.sparsity[::2]

    def state_dict(self) -> TimelineState:
        """What a checkpoint must hold."""
        return {
            "layers": list(self.layers),
            "steps": list(self.steps),
            "sparsity": [list(column) for column in self.sparsity],
        }

    def load_state_dict(self, state: TimelineState) -> None:
        """Take what :meth:`state_dict` gave, of the layers that are there today."""
        self.steps, self.sparsity = list(state["steps"]), _of_layers(self.layers, state["layers"], state["sparsity"])

    def draw(self, end: int) -> Figure:
        """The heat map: layers from top to bottom, steps from left to right, up to ``end``; needs matplotlib.

        On the right stands each layer's last sparsity. What is NaN stays blank.
        """
        from matplotlib.figure import Figure

        rows = list(zip(*self.sparsity, strict=True))
        figure = Figure(figsize=(10, 1.4 + 0.24 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        edges = [*self.steps, max(end, self.steps[-1] + 1)]
        image = axes.pcolormesh(edges, range(len(rows) + 1), rows, vmin=0.0, vmax=1.0, cmap="viridis")
        axes.set_title("Sparsity of each layer")
        axes.set_xlabel("optimizer steps")
        axes.set_ylim(len(rows), 0)
        axes.set_yticks([row + 0.5 for row in range(len(rows))], self.layers, fontsize="small")
        last = axes.secondary_yaxis("right")
        last.set_yticks([row + 0.5 for row in range(len(rows))], [f"{row[-1]:.3f}" for row in rows], fontsize="small")
        for side in (axes, last):
            side.tick_params(axis="y", length=0)
        width = max(20.0, 1.5 * len(rows))  # of the colour bar: its height over this
        figure.colorbar(image, ax=axes, label="sparsity", ticks=[0.0, 0.25, 0.5, 0.75, 1.0], aspect=width)
        return figure


def _of_layers(layers: Sequence[str], known: Sequence[str], columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """``columns``, which are of the layers ``known``, as columns of ``layers``."""
    by_name = [dict(zip(known, column, strict=False)) for column in columns]
    return [[column.get(name, math.nan) for name in layers] for column in by_name]
