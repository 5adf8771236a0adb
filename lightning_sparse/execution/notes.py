"""Notes of a sparse file on its tensors, as JSON; every note is checked before it is used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast, final

import torch

__all__ = ["DTYPES", "TensorNotes", "dump_notes", "parse_notes", "printable"]

_NAMES_OF_DTYPES = (
    *("float64", "float32", "float16", "bfloat16"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    *("complex128", "complex64", "complex32"),
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES_OF_DTYPES if hasattr(torch, name)}
"""The dtypes that can be stored, by name; which there are depends on torch."""

_FORMS = ("gaps", "bitmask")
_MOST_PLACES = 2**62


@final
@dataclass(frozen=True)
class TensorNotes:
    """What a reader must know of a tensor beside what is stored.

    Args:
        dtype: Name of the dtype, without ``torch.``.
        shape: Shape of the dense tensor.
        positions: How the positions of its values are stored, ``"gaps"`` or ``"bitmask"``; ``None`` if it is dense.
        minus: Likewise those of its zeros with a minus sign; ``None`` if they are among the values, or there are none.

    Example:
        >>> TensorNotes("float32", (10, 10), positions="gaps").pieces
        ['.gaps', '.values']
    """

    dtype: str
    shape: tuple[int, ...]
    positions: str | None = None
    minus: str | None = None

    @property
    def pieces(self) -> list[str]:
        """Suffixes that follow the tensor's name in those of what is stored of it; an empty one where it is dense."""
        if self.positions is None:
            return [""]
        return [f".{self.positions}", ".values", *([f".minus.{self.minus}"] if self.minus else [])]


def dump_notes(notes: dict[str, TensorNotes | str]) -> str:
    """Notes as JSON.

    Args:
        notes: By the name of the tensor; a name stands for a tensor that is tied to the one of that name.

    Example:
        >>> dump_notes({"a": TensorNotes("float32", (2,), positions="gaps"), "b": "a"})
        '{"a":{"dtype":"float32","shape":[2],"positions":"gaps"},"b":{"same_as":"a"}}'
    """
    return json.dumps({name: _as_plain(note) for name, note in notes.items()}, separators=(",", ":"))


def parse_notes(text: str) -> dict[str, TensorNotes | str]:
    """Notes from JSON.

    Raises:
        ValueError: They are no notes; the message goes on after "The notes on its tensors are damaged: ".

    Example:
        >>> parse_notes('{"a":{"dtype":"float32","shape":[2],"positions":"gaps"},"b":{"same_as":"a"}}')
        {'a': TensorNotes(dtype='float32', shape=(2,), positions='gaps', minus=None), 'b': 'a'}
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"they are not JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(plain, dict):
        raise ValueError("they are no table of names")
    notes = {name: _note(name, note) for name, note in cast("dict[str, Any]", plain).items()}
    for name, note in notes.items():
        if isinstance(note, str) and isinstance(notes.get(note), str):
            raise ValueError(f"{printable(name)} is tied to {printable(note)}, which is tied itself")
    return notes


def printable(name: str) -> str:
    r"""A name as a terminal may show it: without what would move its cursor or change its colours.

    Example:
        >>> printable("fc.weight"), printable("fc\x1b[2J")
        ('fc.weight', 'fc\\x1b[2J')
    """
    return name if name.isprintable() else ascii(name)[1:-1]


def _as_plain(note: TensorNotes | str) -> dict[str, Any]:
    if isinstance(note, str):
        return {"same_as": note}
    forms = {key: form for key, form in (("positions", note.positions), ("minus", note.minus)) if form}
    return {"dtype": note.dtype, "shape": list(note.shape), **forms}


def _note(name: str, note: Any) -> TensorNotes | str:
    if isinstance(note, dict) and note.keys() == {"same_as"} and isinstance(note["same_as"], str):
        return note["same_as"]
    if not isinstance(note, dict) or not {"dtype", "shape"} <= note.keys() <= {"dtype", "shape", "positions", "minus"}:
        raise ValueError(f"those on {printable(name)} have missing or unknown fields")
    if note["dtype"] not in [*DTYPES]:
        raise ValueError(f"{printable(name)} has the type {note['dtype']!r}, which torch {torch.__version__} lacks")
    shape = note["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{printable(name)} has the shape {str(shape)[:80]}, but a shape is a list of sizes")
    if _places(shape) > _MOST_PLACES:
        raise ValueError(f"{printable(name)} has the shape {str(shape)[:80]}, more than there is memory for")
    positions, minus = note.get("positions"), note.get("minus")
    if positions not in (None, *_FORMS) or minus not in (None, *_FORMS) or (minus and not positions):
        raise ValueError(f"{printable(name)} has positions of an unknown form, {positions!r} and {minus!r}")
    return TensorNotes(note["dtype"], tuple(shape), positions, minus)


def _places(shape: list[int]) -> int:
    """The product of the sizes, those of zero left out, since torch multiplies strides so; soon too large."""
    product = 1
    for size in shape:
        product *= max(size, 1)
        if product > _MOST_PLACES:
            break
    return product
