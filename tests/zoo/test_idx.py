from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch
from torchvision.datasets.mnist import read_image_file

from lightning_sparse.zoo.idx import find_idx, read_idx
from tests.zoo.idx_files import idx_bytes, mnist_tensors, write_mnist


@pytest.mark.parametrize("shape", [(5,), (2, 3), (4, 3, 2)])
def test_what_is_written_is_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = torch.arange(torch.Size(shape).numel()).reshape(shape)
    path = tmp_path / "values"
    path.write_bytes(idx_bytes(values))
    torch.testing.assert_close(read_idx(path), values.to(torch.uint8))


def test_compressed_files_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "values.gz"
    path.write_bytes(gzip.compress(idx_bytes(torch.tensor([3, 1, 2]))))
    assert read_idx(path).tolist() == [3, 1, 2]


def test_torchvision_reads_the_same_images(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    torch.testing.assert_close(read_idx(path), read_image_file(str(path)))


WHOLE = idx_bytes(torch.arange(9))


@pytest.mark.parametrize(
    "damaged",
    [b"", b"\0\0", WHOLE[:6], WHOLE[:-2], WHOLE + b"\1", b"PK" + WHOLE[2:], WHOLE[:2] + b"\x0d" + WHOLE[3:]],
    ids=["empty", "no magic", "no shape", "cut", "too long", "other format", "floats"],
)
def test_damaged_files_are_named_in_the_error(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "labels"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"labels is not a whole IDX file .* download it again"):
        read_idx(path)


@pytest.mark.parametrize("damaged", [gzip.compress(WHOLE)[:-9], WHOLE], ids=["cut", "not compressed"])
def test_damaged_compressed_files_are_named_in_the_error(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"labels\.gz is not a whole IDX file"):
        read_idx(path)


def test_torchvisions_folder_goes_before_the_plain_one(tmp_path: Path) -> None:
    name = next(iter(mnist_tensors()))
    write_mnist(tmp_path, compressed=True)
    assert find_idx(tmp_path, name) == tmp_path / f"{name}.gz"
    write_mnist(tmp_path / "MNIST" / "raw")
    assert find_idx(tmp_path, name) == tmp_path / "MNIST" / "raw" / name
