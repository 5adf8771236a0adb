"""The IDX format in which MNIST is published: a magic number, the shape, and the bytes.

Reference: LeCun, Cortes, Burges, "The MNIST database of handwritten digits", http://yann.lecun.com/exdb/mnist/
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["find_idx", "read_idx"]

UNSIGNED_BYTE = 0x08


def find_idx(root: Path, name: str) -> Path | None:
    """Find an IDX file, compressed or not, in ``<root>/MNIST/raw`` or in ``root`` itself.

    Args:
        root: Folder to look in.
        name: Name of the file without ``.gz``.

    Returns:
        The first that is there, or None.

    Example:
        >>> from pathlib import Path
        >>> from lightning_sparse.zoo.idx import find_idx
        >>> find_idx(Path("nowhere"), "train-images-idx3-ubyte") is None
        True
    """
    folders = (root / "MNIST" / "raw", root)
    candidates = (folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes, compressed if its name ends in ``.gz``.

    Two zero bytes, the type of the values, the number of dimensions; each dimension as 4 bytes, most significant first;
    then the values in row-major order.

    Args:
        path: The file.

    Returns:
        A uint8 tensor of the shape that the file states.

    Raises:
        ValueError: If the file is not in this format, is damaged, or is shorter than it states.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from lightning_sparse.zoo.idx import read_idx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels")
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        ...     read_idx(path)
        tensor([7, 2, 1], dtype=torch.uint8)
    """
    try:
        data = _read_bytes(path)
        zeros, kind, num_dims = struct.unpack_from(">HBB", data)
        if zeros != 0 or kind != UNSIGNED_BYTE:
            raise ValueError(f"its first bytes are {data[:4].hex(' ')}, not 00 00 08 (unsigned bytes)")
        shape = struct.unpack_from(f">{num_dims}I", data, 4)
        return torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * num_dims).reshape(shape)
    except (EOFError, gzip.BadGzipFile, struct.error, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a whole IDX file of unsigned bytes: {error}. Delete it and download it again."
        ) from error


def _read_bytes(path: Path) -> bytearray:
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as file:
            return bytearray(file.read())
    return bytearray(path.read_bytes())
