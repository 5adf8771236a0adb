"""The state of :class:`~lightning_sparse.SparsityMonitor` in a checkpoint: what its fields may be."""

from __future__ import annotations

from typing import Any

from lightning_sparse.masks.schema import any_of, check_fields, mapping_of, nothing, number, record, refuse, whole
from lightning_sparse.metrics.history import HISTORY_FIELDS
from lightning_sparse.metrics.timeline import TIMELINE_FIELDS

__all__ = ["check_monitor"]

_COUNTS = {"step": whole(), "update_step": whole(), "uncounted": whole(), "unrecorded": whole()}
_FLOPS = {
    "total": whole(high=1 << 62),
    "layers": mapping_of(whole(high=1 << 62)),
    "sparsity": mapping_of(number(0.0, 1.0)),
    "spent": number(0.0),
    "steps": whole(),
    "dynamic": whole(high=1 << 62),
}
_OLD_FLOPS = {name: check for name, check in _FLOPS.items() if name != "dynamic"}  # until 0.2


def check_monitor(state: Any) -> None:
    """Refuse what no monitor has written.

    Raises:
        MisconfigurationException: A field is missing, or is none; the message says which, and why.
    """
    whose = "The checkpoint's state of SparsityMonitor"
    parts = {"history": record(HISTORY_FIELDS), "timeline": record(TIMELINE_FIELDS, closed=False)}
    check_fields(state, {**_COUNTS, **parts, "flops": any_of(nothing, record(_FLOPS), record(_OLD_FLOPS))}, whose)
    timeline, flops = state["timeline"], state["flops"]
    widths = {len(timeline["layers"])} ^ {len(column) for column in timeline["sparsity"]}
    if len(timeline["steps"]) != len(timeline["sparsity"]) or (timeline["steps"] and widths):
        refuse(f"{whose} is damaged: its timeline has not one sparsity for each layer at each step")
    if flops and flops["layers"].keys() - flops["sparsity"].keys():
        refuse(f"{whose} is damaged: its flops lack the sparsity of a layer")
