"""The state of a method in a checkpoint: what is in it, and whether it is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_sparse.functional.masks import tensor_bytes

__all__ = ["VERSION", "check_digest", "check_state", "digest", "sealed"]

VERSION = 2

_FIELDS: Mapping[str, type] = {
    "step": int,
    "origin": int,
    "began_at": int,
    "masks": dict,
    "dense": list,
    "frozen": list,
    "not_finite_for": list,
    "method": dict,
}


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the version of its format, and a digest by which damage is found."""
    return {"version": VERSION, **state, "digest": digest(state)}


def check_state(state: Mapping[str, Any], owner: str) -> Mapping[str, Any]:
    """Refuse a state that is of another version, cut short or damaged.

    Args:
        state: What a checkpoint holds.
        owner: Of which method, for the message.

    Returns:
        The state.

    Raises:
        MisconfigurationException: It cannot be gone on from; the message says why.
    """
    whose = f"The checkpoint's state of {owner}"
    missing = _FIELDS.keys() - state.keys()
    if "version" in state and state["version"] != VERSION:
        raise MisconfigurationException(
            f"{whose} has version {state['version']!r}, and this lightning_sparse reads version {VERSION}. Resume with"
            " the version that wrote it, or go on from its masks: apply_masks(module, path)."
        )
    if missing or "version" not in state:
        lacks = ", ".join(sorted(missing or {"version"}))
        raise MisconfigurationException(f"{whose} is cut short: it lacks {lacks}. Resume from an earlier checkpoint.")
    for name, kind in _FIELDS.items():
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise MisconfigurationException(
                f"{whose} is damaged: {name} is {type(state[name]).__name__}, not {kind.__name__}. Resume from an"
                " earlier checkpoint."
            )
    return state


def check_digest(state: Mapping[str, Any], owner: str) -> None:
    """Refuse a state that is not what was written.

    Raises:
        MisconfigurationException: Its digest is another.
    """
    rest = {name: value for name, value in state.items() if name not in ("version", "digest")}
    if state.get("digest") != digest(rest):
        raise MisconfigurationException(
            f"The checkpoint's state of {owner} is damaged: it is not what was written (its digest differs). Copy the"
            " file again, or resume from an earlier checkpoint."
        )


def digest(value: Any) -> str:
    """A digest of nested primitives and tensors, as in a checkpoint."""
    total = hashlib.blake2b(digest_size=16)
    _feed(total, value)
    return total.hexdigest()


def _feed(total: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        total.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        total.update(tensor_bytes(value))
    elif isinstance(value, Mapping):
        total.update(f"mapping {len(value)}".encode())
        for key in sorted(value, key=repr):
            _feed(total, key)
            _feed(total, value[key])
    elif isinstance(value, list | tuple):
        total.update(f"list {len(value)}".encode())
        for item in value:
            _feed(total, item)
    else:
        total.update(f"{type(value).__name__} {value!r}".encode())
