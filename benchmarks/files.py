"""Size and loading time of a ResNet-18's state dict, as a sparse file and in other formats.

Weights are normal, with zeros at random places, the same share in every matrix. The tensors of norms are random too, as
after training: their initial zeros and ones would compress. Every format loads dense tensors into memory. All formats
take turns. Each load has a process of its own and must ask the system for memory, like a program that loads once::

    OMP_NUM_THREADS=1 python -m benchmarks.files --cpu-time
"""

from __future__ import annotations

import gzip
import io
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models import resnet18

from benchmarks.harness import Ratio, argument_parser, report
from lightning_sparse.execution import load_sparse, save_sparse
from lightning_sparse.zoo import LeNet300100

TITLE = "Sparse files of a ResNet-18"
SPARSITIES = (0.9, 0.95, 0.99, 0.999)
GOALS = {0.9: 7.8, 0.95: 15, 0.99: 60, 0.999: 280}
BASELINE = "torch.save"

State = Mapping[str, Tensor]
Writer = Callable[[State, Path], Any]
Reader = Callable[[Path], State]


def _with_torch(compress: Callable[[bytes], bytes], decompress: Callable[[bytes], bytes]) -> tuple[Writer, Reader]:
    """A writer that compresses what ``torch.save`` writes, and its reader."""

    def write(state: State, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path.write_bytes(compress(buffer.getvalue()))

    return write, lambda path: torch.load(io.BytesIO(decompress(path.read_bytes())))


def ways() -> Iterator[tuple[str, Writer, Reader]]:
    """Names, writers and readers; zstd only if it is installed."""
    yield BASELINE, torch.save, torch.load
    yield "torch.save, load with mmap", torch.save, lambda path: torch.load(path, mmap=True)
    yield "gzip -6", *_with_torch(lambda data: gzip.compress(data, 6), gzip.decompress)
    if find_spec("zstandard"):
        import zstandard  # pyright: ignore[reportMissingImports]

        for level in (3, 19):
            compress = zstandard.ZstdCompressor(level=level).compress
            yield f"zstd -{level}", *_with_torch(compress, zstandard.ZstdDecompressor().decompress)
    yield "safetensors", lambda state, path: save_file(dict(state), path), load_file
    yield "save_sparse", save_sparse, load_sparse
    yield "save_sparse, float16", lambda state, path: save_sparse(state, path, values="float16"), load_sparse


def in_a_process(work: Callable[[], float]) -> float:
    """Return the result of ``work`` in a child process, so that its effects on memory end with the process."""
    ours, theirs = os.pipe()
    if not os.fork():
        os.write(theirs, struct.pack("d", work()))
        os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        result = pipe.read()
    os.wait()
    return struct.unpack("d", result)[0]


def sparse_state(sparsity: float, *, smallest: bool) -> dict[str, Tensor]:
    """A state dict like one after sparse training."""
    generator = torch.Generator().manual_seed(0)
    state = (LeNet300100() if smallest else resnet18()).state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
        if tensor.ndim > 1:
            tensor.masked_fill_(torch.rand(tensor.shape, generator=generator) < sparsity, 0.0)
    return state


def measure(
    sparsity: float, folder: Path, rounds: int, clock: Callable[[], float], *, smallest: bool
) -> list[dict[str, Any]]:
    """The rows of the table: the size and loading time of each format."""
    state = sparse_state(sparsity, smallest=smallest)
    paths: dict[str, Path] = {}
    readers: dict[str, Reader] = {}
    for index, (name, write, read) in enumerate(ways()):
        paths[name], readers[name] = folder / f"{sparsity}-{index}", read

        def is_right(name: str = name, write: Writer = write) -> bool:
            write(state, paths[name])
            loaded = readers[name](paths[name])
            return all("16" in name or torch.equal(tensor, state[key]) for key, tensor in loaded.items())

        if not in_a_process(is_right):
            raise RuntimeError(f"{name} gives back something else.")
    seconds: dict[str, list[float]] = {name: [] for name in readers}

    def load(name: str) -> float:
        start = clock()
        loaded = readers[name](paths[name])
        end = clock()
        del loaded
        return end - start

    for _ in range(rounds):
        for name in readers:
            seconds[name].append(in_a_process(partial(load, name)))
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    return [
        {
            "sparsity": sparsity,
            "file": name,
            "MB": sizes[name] / 1e6,
            "times smaller": sizes[BASELINE] / sizes[name],
            "goal": GOALS[sparsity] if name == "save_sparse" and not smallest else "",
            "load, ms": 1e3 * median(seconds[name]),
            "load / torch.load": str(Ratio.of(seconds[name], seconds[BASELINE])),
        }
        for name in readers
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for sparsity in SPARSITIES[:1] if arguments.smallest else SPARSITIES:
            rounds = 2 if arguments.smallest else arguments.rounds
            rows += measure(sparsity, Path(folder), rounds, arguments.clock, smallest=arguments.smallest)
    report(TITLE, rows, arguments.json)


if __name__ == "__main__":
    main()
