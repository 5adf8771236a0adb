"""A data set in MNIST's format, small enough to write in every test."""

from __future__ import annotations

import gzip
import struct
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

NUM_TRAIN, NUM_TEST = 96, 32


def idx_bytes(values: Tensor) -> bytes:
    """Encode unsigned bytes as LeCun describes the format."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 0x08, values.ndim, *values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


def mnist_tensors() -> dict[str, Tensor]:
    """Make random images and labels under the names of MNIST's four files."""
    generator = torch.Generator().manual_seed(0)

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    return {
        "train-images-idx3-ubyte": random(256, NUM_TRAIN, 28, 28),
        "train-labels-idx1-ubyte": random(10, NUM_TRAIN),
        "t10k-images-idx3-ubyte": random(256, NUM_TEST, 28, 28),
        "t10k-labels-idx1-ubyte": random(10, NUM_TEST),
    }


def write_mnist(folder: Path, *, compressed: bool = False) -> None:
    """Write the four files into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in mnist_tensors().items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(values)))
        else:
            (folder / name).write_bytes(idx_bytes(values))
