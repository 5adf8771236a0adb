"""Sparse files: a state dict without its zeros, in the safetensors format, and nothing in it that could run.

The layout, with a reader of twenty lines that needs nothing from here, is a page of the documentation: Sparse files.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sparse.atomic import write_atomically
from lightning_sparse.execution.notes import DTYPES, TensorNotes, dump_notes, parse_notes, printable
from lightning_sparse.execution.packing import (
    is_inflated,
    pack_dense,
    pack_tensor,
    packed_nbytes,
    unpack_tensor,
    without_minus_zeros,
)

__all__ = ["SparseFileError", "is_sparse_file", "load_sparse", "save_sparse", "sparse_nbytes"]

_FORMAT, _VERSION = "lightning_sparse.sparse", "1"
_HEADER = "__metadata__"
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')
_AT_ONCE = 1 << 18
_CASTS = {"same": None, "float16": torch.float16}
_LARGEST_HALF = torch.finfo(torch.float16).max

_HOW_TO_SAVE = (
    'save_sparse takes what is to be saved and then the file, as in save_sparse(model, "model.sparse"): a module, or a'
    " mapping from names to tensors"
)


class SparseFileError(ValueError):
    """A sparse file cannot be read or written; the message says why, and what to do."""


def save_sparse(
    source: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    values: Literal["same", "float16"] = "same",
    signed_zeros: bool = True,
) -> None:
    """Write a state dict without its zeros; :func:`load_sparse` gives it back bit for bit.

    Each tensor is stored in its smallest form: all values; or the values that are not zero, with the gaps between them
    in one or two bytes each or with a bit for each place. Tied weights are stored once. The file is written whole or
    not at all.

    Args:
        source: A module, whose ``state_dict`` is saved, or a state dict.
        path: The file. An existing file is replaced, and its permissions are kept.
        values: ``"float16"`` stores the values of ``float32`` and ``float64`` tensors with two dimensions or more in
            two bytes each. They come back in their dtype, rounded to 11 bits; what is below 3e-8 comes back as zero.
        signed_zeros: Whether to keep the sign of zeros. Weights that were multiplied by a mask have -0.0 in about half
            of the pruned places; to keep these takes one bit per weight. ``False`` stores them as 0.0.

    Raises:
        TypeError: The source or the path has another type, or something in the state dict is not a tensor.
        ValueError: There is no tensor, one has the name of the format's own notes or no plain memory (sparse, on the
            meta device, quantised, not initialised, sharded), or a value is too large for ``float16``.
        SparseFileError: The file cannot be written.

    Example:
        >>> from lightning_sparse import load_sparse, save_sparse
        >>> module = nn.Linear(100, 100, bias=False)
        >>> _ = module.weight.data.copy_(torch.eye(100))
        >>> save_sparse(module, "eye.sparse")
        >>> Path("eye.sparse").stat().st_size < 1_200  # of 40,000 bytes
        True
        >>> bool((load_sparse("eye.sparse")["weight"] == torch.eye(100)).all())
        True
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{_HOW_TO_SAVE}; the path is a {type(path).__name__}.")
    if values not in _CASTS:
        raise ValueError(f'values is {values!r}; it can be "same" or "float16".')
    stored, notes = _pack_all(_state_of(source), _CASTS[values], signed_zeros)
    metadata = {"format": _FORMAT, "version": _VERSION, "digest": _NO_DIGEST, "sparse": dump_notes(notes)}
    try:
        content = bytearray(save(stored, metadata))
        digits = _digest_in(content)
        content[digits] = hashlib.sha256(content).hexdigest().encode()
        write_atomically(path, content)
    except (OSError, SafetensorError, UnicodeEncodeError) as error:
        raise SparseFileError(str(error)) from error


def load_sparse(path: str | Path, into: nn.Module | None = None) -> dict[str, Tensor]:
    """Read the state dict that :func:`save_sparse` wrote.

    The digest of the whole file is checked before anything is returned or loaded. Tensors are read one by one; a small
    file that claims huge tensors is refused before memory is taken for them.

    Args:
        path: The file.
        into: A module to load the tensors into, by its ``load_state_dict``. It does not change unless all names and
            shapes fit.

    Returns:
        Dense tensors on the CPU, by name in alphabetical order; tied ones are one tensor.

    Raises:
        SparseFileError: The file is missing, damaged, not a sparse file, of a later version, or of another module.

    Example:
        >>> from lightning_sparse import load_sparse, save_sparse
        >>> save_sparse({"weight": torch.eye(2), "bias": torch.zeros(2)}, "eye.sparse")
        >>> module = nn.Linear(2, 2)
        >>> _ = load_sparse("eye.sparse", into=module)
        >>> module.weight.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"load_sparse takes the path of a sparse file; it is a {type(path).__name__}.")
    if into is not None and not isinstance(into, nn.Module):
        raise TypeError(f"into takes a module, as in load_sparse(path, into=model); it is a {type(into).__name__}.")
    state = _read(Path(path))
    if into is not None:
        _check_fit(state, into, path)
        try:
            into.load_state_dict(state)
        except RuntimeError as error:
            raise SparseFileError(f"{path} cannot be loaded into {type(into).__name__}: {error}") from error
    return state


def is_sparse_file(path: str | Path) -> bool:
    """Whether :func:`save_sparse` wrote a file, as far as its header says.

    Example:
        >>> save_sparse({"weight": torch.eye(2)}, "eye.sparse")
        >>> is_sparse_file("eye.sparse")
        True
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return (file.metadata() or {}).get("format") == _FORMAT
    except (SafetensorError, OSError):
        return False


def sparse_nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor will take in a sparse file, about.

    Example:
        >>> sparse_nbytes(torch.eye(100))
        701
    """
    return packed_nbytes(tensor.detach().cpu())


def _state_of(source: Any) -> dict[str, Tensor]:
    """The tensors of a module or of a mapping; all of them can be stored."""
    state = source.state_dict() if isinstance(source, nn.Module) else source
    if not isinstance(state, Mapping):
        raise TypeError(f"{_HOW_TO_SAVE}; what is to be saved is a {type(source).__name__}.")
    if not state:
        raise ValueError(f"There is nothing to save: the {type(source).__name__} has no tensor in its state dict.")
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise TypeError(f"{_HOW_TO_SAVE}; one of the names is {name!r}, a {type(name).__name__}.")
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{printable(name)} is a {type(tensor).__name__}, and a sparse file holds only tensors. "
                + (
                    "Save a quantised module with torch.save, or save it here before it is quantised."
                    if isinstance(source, nn.Module)
                    else 'Of a checkpoint save its state dict, as in checkpoint["state_dict"].'
                )
            )
        if name == _HEADER:
            raise ValueError(
                f"{_HEADER} cannot be saved in a sparse file: there the safetensors format has its own notes. Give the"
                " tensor another name."
            )
        obstacle = _obstacle(tensor)
        if obstacle:
            raise ValueError(f"{printable(name)} cannot be saved in a sparse file: it {obstacle}.")
    return {name: tensor.detach() for name, tensor in state.items()}


def _obstacle(tensor: Tensor) -> str:
    """Why a tensor has no plain memory that could be stored; empty if it has."""
    if is_lazy(tensor):
        return "is not initialised yet; run the module once before"
    if tensor.is_quantized:
        return "is quantised; save tensor.int_repr() and its scales, or tensor.dequantize()"
    if tensor.layout != torch.strided:
        return f"has the layout {tensor.layout}; save tensor.to_dense()"
    if tensor.is_meta:
        return "is on the meta device, which holds no values; load the weights before"
    if type(tensor.detach()) is not Tensor:
        return f"is a {type(tensor).__name__}, not a plain tensor; save the whole of it, as in tensor.full_tensor()"
    if is_inflated(tensor):
        memory = tensor.untyped_storage().nbytes()
        return (
            f"is expanded, {tensor.nbytes:,} bytes of tensor on {memory:,} bytes of memory; save the tensor that it"
            " was expanded from"
        )
    if tensor.dtype not in DTYPES.values():
        return f"has the type {tensor.dtype}; save tensor.view(torch.uint8)"
    return ""


def _pack_all(
    state: Mapping[str, Tensor], dtype: torch.dtype | None, signed_zeros: bool
) -> tuple[dict[str, Tensor], dict[str, TensorNotes | str]]:
    """What is stored, and the notes on the tensors that need some; a name for one that is tied to that."""
    stored: dict[str, Tensor] = {}
    notes: dict[str, TensorNotes | str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        same = first.setdefault(_memory_of(tensor), name) if tensor.numel() else name
        if same != name:
            notes[name] = same
            continue
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        cast_to = _cast_of(name, tensor, dtype)
        packed = pack_tensor(tensor if signed_zeros else without_minus_zeros(tensor), cast_to)
        if any(f"{name}{suffix}" in {**state, **stored} for suffix in packed.pieces if suffix):
            packed = pack_dense(tensor, cast_to)
        stored |= {f"{name}{suffix}": _owned(piece, tensor) for suffix, piece in packed.pieces.items()}
        if packed.notes is not None:
            notes[name] = packed.notes
    return stored, notes


def _memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are one."""
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _owned(piece: Tensor, tensor: Tensor) -> Tensor:
    """In memory of its own, since safetensors refuses tensors that share some, as views of one weight do."""
    is_shared = piece.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return piece.clone() if is_shared else piece


def _cast_of(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype in which values are stored, where it is not their own."""
    if dtype is None or tensor.ndim < 2 or tensor.dtype not in {torch.float32, torch.float64}:
        return None
    finite = tensor[tensor.isfinite()].abs()
    if finite.numel() and (largest := finite.max().item()) > _LARGEST_HALF:
        raise ValueError(
            f"{printable(name)} has the value {largest:g}, and the largest float16 is {_LARGEST_HALF:g}. Save it with"
            ' values="same".'
        )
    return dtype


def _digest_in(content: bytes | bytearray) -> slice:
    """Where the digits of the digest are: in the header, once, after an unescaped key."""
    size = 8 + int.from_bytes(content[:8], "little")
    found = [match.span(1) for match in _DIGEST.finditer(content, 8, size)]
    if len(found) != 1:
        raise SafetensorError("The header of the file would have more than one digest; rename the tensor.")
    return slice(*found[0])


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SparseFileError(
            f"{path} is a folder; give the file itself." if path.is_dir() else f"There is no file {path}."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
            _check_metadata(metadata, path)
            return _unpack_all(file, metadata, path)
    except (SafetensorError, OSError) as error:
        raise SparseFileError(
            f"{path} is damaged or is not a sparse file: it cannot be read ({printable(str(error))}). Sparse files are"
            " written by save_sparse and by `lightning-sparse export`."
        ) from error


def _check_metadata(metadata: Mapping[str, str], path: Path) -> None:
    if metadata.get("format") != _FORMAT:
        raise SparseFileError(
            f"{path} is in the safetensors format, but is not a sparse file. Sparse files are written by save_sparse or"
            " `lightning-sparse export`; safetensors.torch.load_file reads others."
        )
    if metadata.get("version") != _VERSION:
        version = printable(metadata.get("version", "unknown"))[:40]
        raise SparseFileError(
            f"{path} was written in version {version} of the sparse file format, and this lightning_sparse reads"
            f" version {_VERSION}. Upgrade lightning-sparse."
        )
    if not {"digest", "sparse"} <= metadata.keys() or _digest_of(path) != metadata["digest"]:
        raise SparseFileError(
            f"{path} is damaged: its digest does not match its contents. Copy, download or write it again."
        )


def _digest_of(path: Path) -> str:
    """SHA-256 of the file with zeros for the digits of its digest; empty if it has none."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = bytearray(size.to_bytes(8, "little") + file.read(size))
        found = [match.span(1) for match in _DIGEST.finditer(header)]
        if len(found) != 1:
            return ""
        header[slice(*found[0])] = _NO_DIGEST.encode()
        digest = hashlib.sha256(header)
        chunk = memoryview(bytearray(_AT_ONCE))
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
    return digest.hexdigest()


def _unpack_all(file: Any, metadata: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    try:
        notes = parse_notes(metadata["sparse"])
    except ValueError as error:
        raise SparseFileError(f"The notes on the tensors of {path} are damaged: {error}. Write it again.") from error
    keys = {*file.keys()}
    of_pieces = [f"{name}{suffix}" for name, note in notes.items() for suffix in _pieces(note)]
    plain = keys.difference(of_pieces)
    tied = {name: note for name, note in notes.items() if isinstance(note, str)}
    missing = {*of_pieces} - keys | ({*tied.values()} - plain - notes.keys())
    if missing or len({*of_pieces}) < len(of_pieces) or plain & notes.keys():
        names = ", ".join(sorted(map(printable, missing))[:4]) or "two tensors have one name"
        raise SparseFileError(f"{path} is damaged: it lacks tensors that its notes list: {names}. Write it again.")
    state: dict[str, Tensor] = {}
    for name in sorted(plain | notes.keys() - tied.keys()):
        note = notes.get(name)
        try:
            pieces = {suffix: file.get_tensor(f"{name}{suffix}") for suffix in _pieces(note)}
            state[name] = unpack_tensor(pieces, note) if isinstance(note, TensorNotes) else pieces[""].clone()
        except ValueError as error:
            raise SparseFileError(
                f"The tensor {printable(name)} of {path} is damaged: {error}. Write it again."
            ) from error
        except MemoryError as error:
            raise SparseFileError(
                f"The tensor {printable(name)} of {path} is damaged, or there is no memory for its {error}."
            ) from error
    return {name: state[tied.get(name, name)] for name in sorted(state.keys() | tied.keys())}


def _pieces(note: TensorNotes | str | None) -> list[str]:
    return [""] if note is None else [] if isinstance(note, str) else note.pieces


def _check_fit(state: Mapping[str, Tensor], module: nn.Module, path: str | Path) -> None:
    """Refuse a file of another module before anything is written into this one."""
    own = module.state_dict()
    for side, names in (("lacks", own.keys() - state.keys()), ("has no place for", state.keys() - own.keys())):
        if names:
            some, more = sorted(map(printable, names))[:4], len(names) - 4
            rest = f" and {more} more" if more > 0 else ""
            raise SparseFileError(
                f"{path} is of another module: {'it' if side == 'lacks' else type(module).__name__} {side}"
                f" {', '.join(some)}{rest}. Load it without `into` to see its names."
            )
    for name, tensor in state.items():
        if isinstance(own[name], Tensor) and not is_lazy(own[name]) and own[name].shape != tensor.shape:
            raise SparseFileError(
                f"{path} is of another module: {printable(name)} has the shape {tuple(tensor.shape)} there, and"
                f" {tuple(own[name].shape)} in {type(module).__name__}."
            )
