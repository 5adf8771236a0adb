"""Reading what others have written: checkpoints and weights, which may be damaged, hostile, or none at all."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_sparse.masks.places import printable

__all__ = ["CheckpointError", "as_path", "is_archive", "load_checkpoint", "looks_like_safetensors", "metadata_of"]

_AT_ONCE = 1 << 20
_LONGEST_HEADER = 100_000_000  # safetensors reads none that is longer

_OF_OURS = {
    "lightning_sparse.masks": "like a file of masks, and is not a checkpoint. load_masks reads the masks of such a"
    " file, and `lightning-sparse masks compare A B` compares those of two files; it also"
    " takes checkpoints.",
    "lightning_sparse.sparse": "like a sparse file, and is not a checkpoint. load_sparse reads the weights of such a"
    " file.",
}


class CheckpointError(ValueError):
    """A file cannot be read as a checkpoint or as masks; the message says why, and what to do.

    Control characters in names that come from the file are escaped in the message.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def load_checkpoint(path: str | Path) -> Any:
    """What :func:`torch.save` wrote, or the weights of a safetensors file, on the CPU; no code in it is ever run.

    A record of a checkpoint that is not what was written, by its checksum, is refused.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, or unsafe to load.

    Example:
        >>> torch.save({"weight": torch.eye(2)}, "eye.pt")
        >>> load_checkpoint("eye.pt")
        {'weight': tensor([[1., 0.],
                [0., 1.]])}
    """
    path = _existing(path)
    if looks_like_safetensors(path):
        return _load_safetensors(path)
    if is_archive(path):
        _check_records(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint lead torch to any exception
        if isinstance(error, pickle.UnpicklingError) and is_archive(path):
            raise CheckpointError(
                f"{path} holds Python objects besides tensors and plain values. They are not loaded, because they "
                "could run code. If you trust the file, save its tensors on their own: "
                "torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')."
            ) from error
        raise _damaged(path, error) from error


def is_archive(path: str | Path) -> bool:
    """Whether a file is a zip archive, as checkpoints are, if perhaps a damaged one.

    Example:
        >>> torch.save({"weight": torch.eye(2)}, "eye.pt")
        >>> is_archive("eye.pt")
        True
    """
    try:
        return zipfile.is_zipfile(path)
    except (zipfile.BadZipFile, ValueError, OverflowError):  # its end is that of an archive, and damaged
        return True


def looks_like_safetensors(path: str | Path) -> bool:
    """Whether a JSON header follows eight bytes of its length; zip archives and pickles begin otherwise.

    Example:
        >>> torch.save({"weight": torch.eye(2)}, "eye.pt")
        >>> looks_like_safetensors("eye.pt")
        False
    """
    path = as_path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def metadata_of(path: str | Path) -> dict[str, str] | None:
    """The metadata of a safetensors file; None where its header is damaged.

    Example:
        >>> from safetensors.torch import save_file
        >>> save_file({"weight": torch.eye(2)}, "eye.safetensors", {"format": "pt"})
        >>> metadata_of("eye.safetensors")
        {'format': 'pt'}
    """
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else None
    except (OSError, ValueError, RecursionError):
        return None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else None


def as_path(path: object) -> Path:
    """The path that a user has given.

    Raises:
        TypeError: It is none.

    Example:
        >>> as_path("run.ckpt").suffix
        '.ckpt'
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"The path is a {type(path).__name__}; give a str or a pathlib.Path.")
    return Path(path)


def _existing(path: str | Path) -> Path:
    path = as_path(path)
    if not path.exists():
        raise CheckpointError(f"There is no file {path}.")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the file itself (sharded checkpoints cannot be read).")
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _load_safetensors(path: Path) -> Mapping[str, Tensor]:
    kind = (metadata_of(path) or {}).get("format", "")
    if kind in _OF_OURS:
        raise CheckpointError(f"{path} is in the safetensors format, {_OF_OURS[kind]}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: cast("Tensor", file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or is not in the safetensors format: it cannot be read ({_first_line(error)}). If it"
            " should be, copy or download it again."
        ) from error


def _check_records(path: Path) -> None:
    """Refuse an archive whose records are larger than it, or not what was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            total, size = sum(record.file_size for record in records), path.stat().st_size
            if total > size:
                raise CheckpointError(
                    f"{path} would be unpacked from {size:,} bytes to {total:,}. torch.save does not compress: unpack"
                    " the archive, and pack it again without compression."
                )
            for record in records:
                if record.CRC:  # 0 where torch was told to leave it out
                    _read_through(archive, record)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile's, zlib's, lzma's and struct's errors have no common class
        raise _damaged(path, error) from error


def _read_through(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    """Read a record to its end, where its checksum is looked at."""
    with archive.open(record) as file:
        while file.read(_AT_ONCE):
            pass


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or is not a checkpoint: torch cannot read it{_reason(error)}. "
        "If it should be one, copy or download it again."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason(error: Exception) -> str:
    """What torch says in brackets, but for its advice to load with ``weights_only=False``, which may run code."""
    line = _first_line(error)
    return "" if "weights_only" in line else f" ({line})"
