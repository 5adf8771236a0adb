"""How alike two masks of a network are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_sparse.functional.topology import count_active, count_shared
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.wrappers import as_named

__all__ = ["MaskOverlap", "compare_masks", "overlap_table"]


@final
@dataclass(frozen=True)
class MaskOverlap:
    """How alike two masks of a layer are.

    Args:
        name: The layer.
        numel: Its weights, active or not.
        active_before: Active weights of the first mask.
        active_after: Active weights of the second.
        shared: Weights that are active in both.

    Example:
        >>> from lightning_sparse.reporting import MaskOverlap
        >>> overlap = MaskOverlap("fc.weight", numel=8, active_before=4, active_after=2, shared=2)
        >>> overlap.jaccard, overlap.kept
        (0.5, 0.5)
    """

    name: str
    numel: int
    active_before: int
    active_after: int
    shared: int

    @property
    def jaccard(self) -> float:
        """Jaccard index in [0, 1], the weights active in both over those active in at least one; 1 if none is."""
        either = self.active_before + self.active_after - self.shared
        return self.shared / either if either else 1.0

    @property
    def kept(self) -> float:
        """Share of the first mask's active weights that are active in the second, in [0, 1]; 1 where there are none."""
        return self.shared / self.active_before if self.active_before else 1.0


def compare_masks(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[MaskOverlap]:
    """Compare two sets of masks, layer by layer.

    Args:
        before: ``bool`` masks by name; prefixes of wrappers are ignored.
        after: Masks of the same layers from another run, or from another time.

    Raises:
        ValueError: Names or shapes differ; the message says which.

    Example:
        >>> import torch
        >>> from lightning_sparse.reporting import compare_masks
        >>> first, second = torch.tensor([True, True, False]), torch.tensor([True, False, True])
        >>> compare_masks({"fc.weight": first}, {"fc.weight": second})
        [MaskOverlap(name='fc.weight', numel=3, active_before=2, active_after=2, shared=1)]
    """
    before, after = as_named(before), as_named(after, as_named(before))
    if before.keys() != after.keys():
        before = as_named(before, after)
    if before.keys() != after.keys():
        only = {"first": before.keys() - after.keys(), "second": after.keys() - before.keys()}
        sides = [
            f"{', '.join(map(printable, sorted(names)))} in the {side} alone" for side, names in only.items() if names
        ]
        raise ValueError(f"The masks are of different layers: {'; '.join(sides)}. Compare masks of one network.")
    for name, mask in before.items():
        if mask.shape != after[name].shape:
            raise ValueError(
                f"The masks of {printable(name)} have the shapes {tuple(mask.shape)} and {tuple(after[name].shape)}."
                " Compare masks of one network."
            )
    return [_overlap(name, mask, after[name]) for name, mask in before.items()]


def overlap_table(overlaps: Iterable[MaskOverlap], title: str | None = None) -> Table:
    """Lay out the overlaps of layers, and of all of them together, for a terminal.

    Args:
        overlaps: What :func:`compare_masks` returned.
        title: Printed above the table.

    Example:
        >>> from lightning_sparse.reporting import MaskOverlap, overlap_table
        >>> overlap_table([MaskOverlap("fc.weight", numel=8, active_before=4, active_after=2, shared=2)]).row_count
        2
    """
    overlaps = list(overlaps)
    table = Table(title=None if title is None else escape(printable(title)))
    table.add_column("layer", overflow="fold")
    for header in ("weights", "sparsity of A", "sparsity of B", "Jaccard", "of A kept in B"):
        table.add_column(header, justify="right")
    total = MaskOverlap(
        "total",
        *(sum(getattr(overlap, key) for overlap in overlaps) for key in ("numel", "active_before", "active_after")),
        shared=sum(overlap.shared for overlap in overlaps),
    )
    for overlap in (*overlaps, total):
        if overlap is total:
            table.add_section()
        table.add_row(
            escape(printable(overlap.name)),
            f"{overlap.numel:,}",
            f"{1 - overlap.active_before / max(1, overlap.numel):.2%}",
            f"{1 - overlap.active_after / max(1, overlap.numel):.2%}",
            f"{overlap.jaccard:.4f}",
            f"{overlap.kept:.2%}",
            style="bold" if overlap is total else None,
        )
    return table


def _overlap(name: str, before: Tensor, after: Tensor) -> MaskOverlap:
    (active_before, numel), (active_after, _) = count_active([before]), count_active([after])
    return MaskOverlap(name, numel, active_before, active_after, count_shared([before], [after])[0])
