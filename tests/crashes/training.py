"""Small trainings of two methods in one Trainer, with an average of the weights, that go on where they were killed."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from lightning_sparse import DST, FGGP, GMP, SET, FixedMask, GraNet, RigL, SparseMethod, SparsityMonitor, TopKAST
from lightning_sparse.testing import OPTIMIZERS, StepIndexedToy, make_trainer, random_masks

__all__ = ["TRAININGS", "Outcome", "crash", "differences", "undisturbed"]

_FIRST, _REST = {"include": ["network.0.*"]}, {"exclude": ["network.0.*"]}
_OFTEN: dict[str, Any] = {"update_every": 3, "stop": 40}


def _fixed() -> FixedMask:
    return FixedMask(
        {name: mask for name, mask in random_masks(StepIndexedToy()).items() if "network.0" not in name}, **_REST
    )


TRAININGS: dict[str, Callable[[], list[SparseMethod]]] = {
    "RigL and GMP": lambda: [RigL(0.8, **_OFTEN, **_FIRST), GMP(0.8, **_OFTEN, **_REST)],
    "DST and FGGP": lambda: [DST(0.03, **_FIRST), FGGP(0.8, **_OFTEN, **_REST)],
    "SET and Top-KAST": lambda: [SET(0.8, **_OFTEN, **_FIRST), TopKAST(0.8, **_REST)],
    "GraNet and FixedMask": lambda: [GraNet(0.8, **_OFTEN, **_FIRST), _fixed()],
}
"""Two methods each, by name."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        final: Its last checkpoint: weights, their average, masks, optimizers, clocks, history.
        kills: How often it was killed.
        resumed_from: The steps of the checkpoints that it went on from.
        seconds: How long its last process took.
    """

    final: dict[str, Any]
    kills: int
    resumed_from: Sequence[int]
    seconds: float


def undisturbed(name: str, root: Path) -> Outcome:
    """Train to the end."""
    began = time.perf_counter()
    if _wait(_begin(name, root)):
        raise RuntimeError(f"The training {name} failed; see {root / 'log.txt'}.")
    return Outcome(_read(root), 0, [], time.perf_counter() - began)


def crash(name: str, root: Path, kills: int, lasts: float, chance: random.Random) -> Outcome:
    """Train to the end, killed by SIGKILL at random moments of ``lasts`` seconds, ``kills`` times at the most."""
    done, resumed_from = 0, list[int]()
    while True:
        last = _last(root)
        if last is not None:
            resumed_from.append(_step(last))
        began = time.perf_counter()
        child = _begin(name, root)
        if done < kills:
            time.sleep(chance.uniform(0.0, lasts))
            os.kill(child, signal.SIGKILL)
        status = _wait(child)
        if os.WIFSIGNALED(status):
            done += 1
        elif status:
            raise RuntimeError(f"The training {name} failed; see {root / 'log.txt'}.")
        else:
            return Outcome(_read(root), done, resumed_from, time.perf_counter() - began)


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """In what two checkpoints differ, bit for bit, but for where their files lie."""
    if where in ("callbacks:ModelCheckpoint", "loops", "pytorch-lightning_version"):
        return []  # paths, and counters of what was done in this process
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        same = expected.dtype == found.dtype and torch.equal(expected, found)
        return [] if same else [where]
    if isinstance(expected, dict) and isinstance(found, dict):
        if expected.keys() != found.keys():
            return [f"{where} has other keys"]
        parts = [(key, expected[key], found[key]) for key in expected]
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        if len(expected) != len(found):
            return [f"{where} has another length"]
        parts = list(zip(range(len(expected)), expected, found, strict=True))
    else:
        return [] if expected == found or (expected != expected and found != found) else [where]
    faults: list[str] = []
    for key, one, other in parts:
        name = f"{where}:{str(key).split('{')[0]}" if where == "callbacks" else f"{where}.{key}".strip(".")
        faults += differences(one, other, name)
    return faults


def _begin(name: str, root: Path) -> int:
    """Fork a process that trains, from the last checkpoint if there is one; a fork is quicker than an import."""
    child = os.fork()
    if child:
        return child
    try:
        root.mkdir(parents=True, exist_ok=True)
        log = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _train(name, root)
    except BaseException:
        traceback.print_exc()  # the parent reads the status, a person the log
        os._exit(1)
    os._exit(0)


def _train(name: str, root: Path) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    # Never at the end of an epoch: Lightning 2.6 itself, with no callback of ours, takes too many steps when it goes on
    # from one, and again from within the next epoch. Nor at the last step, after which there is nothing left to record.
    keeps = ModelCheckpoint(root, "{step}", every_n_train_steps=3, save_top_k=-1, save_last=False)
    callbacks = [*TRAININGS[name](), SparsityMonitor(), EMAWeightAveraging(decay=0.9), keeps]
    trainer = make_trainer(root, callbacks=callbacks, enable_checkpointing=True)
    model = StepIndexedToy(optimizer=OPTIMIZERS["adamw"], samples=37 * 8)  # steps of an epoch
    trainer.fit(model, ckpt_path=_last(root))
    trainer.save_checkpoint(root / "final")


def _last(root: Path) -> Path | None:
    return max(root.glob("step=*.ckpt"), key=_step, default=None)


def _step(path: Path) -> int:
    return int(path.stem.split("=")[1].split("-")[0])


def _wait(child: int) -> int:
    return os.waitpid(child, 0)[1]


def _read(root: Path) -> dict[str, Any]:
    final: dict[str, Any] = torch.load(root / "final", weights_only=True)
    return final
