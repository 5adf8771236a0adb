"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sparse import load_masks, save_masks
from lightning_sparse.cli import main

MASKS = {"w": torch.tensor([True, False])}
OTHERS = {"w": torch.tensor([True, True])}


@pytest.mark.parametrize("mode", [0o664, 0o600, 0o444 | 0o200])
def test_a_file_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    save_masks(tmp_path / "masks", MASKS)
    (tmp_path / "masks").chmod(mode)
    save_masks(tmp_path / "masks", OTHERS)
    assert (tmp_path / "masks").stat().st_mode & 0o777 == mode
    assert load_masks(tmp_path / "masks")["w"].all()


def test_a_new_file_has_the_mode_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_masks(tmp_path / "masks", MASKS)
    finally:
        os.umask(before)
    assert (tmp_path / "masks").stat().st_mode & 0o777 == 0o640


def test_a_link_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    save_masks(tmp_path / "folder/masks", MASKS)
    (tmp_path / "link").symlink_to("folder/masks")
    save_masks(tmp_path / "link", OTHERS)
    assert (tmp_path / "link").is_symlink()
    assert load_masks(tmp_path / "folder/masks")["w"].all()


def test_a_missing_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere\. Make it first"):
        save_masks(tmp_path / "nowhere/masks", MASKS)
    save_masks(tmp_path / "masks", MASKS)
    assert main(["masks", "extract", str(tmp_path / "masks"), str(tmp_path / "nowhere/masks")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_full_disk_is_told_and_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_masks(tmp_path / "masks", MASKS)

    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"masks cannot be written: the disk is full\. The old file is unchanged"):
        save_masks(tmp_path / "masks", OTHERS)
    assert not load_masks(tmp_path / "masks")["w"].all()
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_a_device_that_is_full_is_told() -> None:
    with pytest.raises(OSError, match="/dev/full cannot be written: the disk is full"):
        save_masks("/dev/full", MASKS)
