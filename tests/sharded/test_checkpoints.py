"""What is saved in one layout goes on in every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_sparse.cli import main
from lightning_sparse.masks.layout import local_part
from lightning_sparse.methods import SparseMethod
from tests.methods.cases import CASES
from tests.sharded.processes import (
    ONE,
    Mesh,
    ShardedToy,
    assert_same,
    fit,
    forked,
    make_trainer,
    processes_of,
    recorded,
)

HALF = 8
Saved = tuple[Mesh | str, str]
LAYOUTS: list[Mesh | str] = [ONE, "ddp", (2, 1), (1, 2), (2, 2)]


class SaveAtHalf(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == HALF:
            trainer.save_checkpoint(self.path)


def method_of(case: str) -> SparseMethod:
    return next(each for each in CASES if each.name == case).make()


def save(mesh: Mesh | str, kind: str, cases: list[str], root: Path) -> None:
    """Train each method to its end, and write its checkpoint at half of it, a folder or a file."""
    for case in cases:
        more: dict[str, Any] = {} if mesh in (ONE, "ddp") else {"save_distributed_checkpoint": kind == "folder"}
        fit(mesh, method_of(case), root / f"{case}.pt", callbacks=[SaveAtHalf(root / f"{case}.ckpt")], **more)


def resume(mesh: Mesh | str, cases: list[str], root: Path, to: Path) -> None:
    for case in cases:
        fit(mesh, method_of(case), to / f"{case}.pt", ckpt_path=root / f"{case}.ckpt")


def second_half(record: Any) -> Any:
    """What a record has of the steps after the checkpoint."""
    return {**record, "masks": [(step, masks) for step, masks in record["masks"] if step > HALF]}


def check(saved: Saved, resumed: list[Mesh | str], cases: list[str], tmp_path: Path) -> None:
    root = tmp_path / "saved"
    root.mkdir()
    forked(processes_of(saved[0]), save, *saved, cases, root)
    for number, mesh in enumerate(resumed):
        to, source = tmp_path / f"resumed{number}", root
        to.mkdir()
        if saved[1] == "folder" and mesh in (ONE, "ddp"):  # which load files alone
            source = to
            for case in cases:
                assert main(["consolidate", str(root / f"{case}.ckpt"), str(to / f"{case}.ckpt")]) == 0
        forked(processes_of(mesh), resume, mesh, cases, source, to)
        for case in cases:
            found, expected = recorded(to / f"{case}.pt"), recorded(root / f"{case}.pt")
            assert_same(second_half(found), second_half(expected), bitwise=mesh == saved[0])


OFTEN = ["rigl", "dst-sparsity"]


@pytest.mark.parametrize("saved", [((2, 1), "folder"), ((1, 2), "file")], ids=str)
def test_a_training_goes_on_in_another_layout(saved: Saved, tmp_path: Path) -> None:
    check(saved, [saved[0], ONE], OFTEN, tmp_path)


EVERY = ["snfs", "srste", "str", "topkast", "feather", "fixedmask", "snip-batches", *OFTEN]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "saved",
    [(ONE, "file"), ("ddp", "file"), ((2, 1), "folder"), ((2, 1), "file"), ((1, 2), "folder"), ((2, 2), "file")],
    ids=str,
)
def test_every_method_goes_on_in_every_other_layout(saved: Saved, tmp_path: Path) -> None:
    check(saved, LAYOUTS, EVERY, tmp_path)


def test_what_is_no_folder_of_a_sharded_training_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    assert main(["consolidate", str(folder), str(file)]) == 2
    assert "is no checkpoint of a sharded training: it has no .metadata and no meta.pt" in capsys.readouterr().err
    for name in (".metadata", "meta.pt"):
        (folder / name).write_bytes(b"of something else")
    assert main(["consolidate", str(folder), str(file)]) == 2
    assert f"{folder} cannot be read" in capsys.readouterr().err
    assert not file.exists()
    file.touch()
    assert main(["consolidate", str(folder), str(file)]) == 2
    assert "exists already" in capsys.readouterr().err


class Wider(ShardedToy):
    """Of other shapes than the toy."""

    @staticmethod
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8), nn.LayerNorm(8), nn.Linear(8, 3))


class LeftAlone(L.Callback):
    """Looks whether weights are as they were before a checkpoint was refused."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = [local_part(parameter).clone() for parameter in pl_module.parameters()]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        pairs = zip(self.weights, map(local_part, pl_module.parameters()), strict=True)
        if not all(torch.equal(before, now) for before, now in pairs):
            raise AssertionError("some weights were loaded")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_checkpoint_of_other_shapes_is_refused_before_it_is_loaded(kind: str, tmp_path: Path) -> None:
    forked(2, save, (2, 1), kind, ["rigl"], tmp_path)

    def run() -> None:
        callbacks = [LeftAlone(), method_of("rigl")]
        make_trainer((2, 1), callbacks=callbacks).fit(Wider(), ckpt_path=tmp_path / "rigl.ckpt")

    refusal = r"not of this Wider: .*network\.0\.weight \(16, 12\) and \(20, 12\); .*Nothing was loaded"
    with pytest.raises(Exception, match=refusal):
        forked(2, run)
