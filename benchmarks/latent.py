"""What DST costs a training step, over dense training and over the same network written with ``parametrize``.

The rival is what one writes without a callback: each weight is computed in the forward from itself and a threshold that
is a parameter of the module (``torch.nn.utils.parametrize``), and autograd finds the gradients of both, with the same
estimator in the place of the step's derivative. All three train ResNet-18 with a 3 x 3 stem, batch 32, in turns of a
few steps. Peak memory is that of a process of its own that takes a few steps, less that of dense training.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from benchmarks.harness import Ratio, alternate, argument_parser, quiet_trainer, report, silence_lightning
from benchmarks.overhead import LENET, RESNET, Case, Fixed
from lightning_sparse import DST
from lightning_sparse.functional.thresholds import long_tailed_estimator

ALPHA = 1e-6
GOAL_OVER_DENSE, GOAL_OVER_PARAMETRIZE = 1.15, 1.0


class _Step(torch.autograd.Function):
    """The unit step with the long-tailed estimator as its derivative."""

    @staticmethod
    @override
    def forward(ctx: Any, margin: Tensor) -> Tensor:
        ctx.save_for_backward(margin)
        return (margin > 0).to(margin.dtype)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (margin,) = ctx.saved_tensors
        return grad * long_tailed_estimator(margin)


class Thresholded(nn.Module):
    """The weight with what lies below its row's threshold masked."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(rows))

    @override
    def forward(self, weight: Tensor) -> Tensor:
        """Return W ⊙ M."""
        threshold = self.threshold.view(-1, *(1 for _ in weight.shape[1:]))
        return weight * _Step.apply(weight.abs() - threshold)  # type: ignore[no-untyped-call]


class Parametrized(Fixed):
    """The module with thresholds of its own, and the regulariser in its loss."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        for module in list(self.network.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                parametrize.register_parametrization(module, "weight", Thresholded(len(module.weight)))

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy and the regulariser."""
        penalty = sum(torch.exp(-m.threshold).sum() for m in self.modules() if isinstance(m, Thresholded))
        return super().training_step(batch, batch_idx) + ALPHA * penalty


def fit(case: Case, *turns: L.Callback, kind: str) -> None:
    """Train for the steps of ``case``."""
    callbacks = [*turns, DST(ALPHA)] if kind == "DST" else list(turns)
    module = Parametrized(case) if kind == "parametrize" else Fixed(case)
    quiet_trainer(max_epochs=1, callbacks=callbacks).fit(module)


def peak_bytes(case: Case, kind: str) -> int:
    """Return the most memory that a process of its own has held."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of_this_process, (replace(case, steps=4), kind))


def _peak_of_this_process(case: Case, kind: str) -> int:
    torch.set_num_threads(1)
    silence_lightning()
    fit(case, kind=kind)
    status = Path("/proc/self/status")
    if status.exists():  # elsewhere, what the parent held may count
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(case: Case, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Time the steps of ``case``; return a row for DST and one for its rival."""
    kinds = ("dense", "DST", "parametrize")
    fits = {kind: partial(fit, case, kind=kind) for kind in kinds}
    seconds = alternate(fits, rounds=case.rounds, every=case.every, skip=case.skip, clock=clock)
    peaks = {kind: peak_bytes(case, kind) for kind in kinds}
    weights = sum(parameter.numel() for parameter in case.network().parameters() if parameter.dim() > 1)
    return [
        {
            "case": case.name,
            "kind": kind,
            "dense step, ms": 1e3 * median(seconds["dense"]),
            "over dense (quartiles)": Ratio.of(seconds[kind], seconds["dense"]),
            "goal": GOAL_OVER_DENSE if kind == "DST" else "",
            "over parametrize (quartiles)": Ratio.of(seconds[kind], seconds["parametrize"]),
            "goal ": GOAL_OVER_PARAMETRIZE if kind == "DST" else "",
            "peak memory, MB": peaks[kind] / 1e6,
            "more bytes / weight": (peaks[kind] - peaks["dense"]) / weights,
        }
        for kind in kinds[1:]
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    arguments = argument_parser(__doc__).parse_args(argv)
    silence_lightning()
    case = replace(LENET, rounds=1, steps=8, every=2, skip=1) if arguments.smallest else RESNET
    report("DST's step", measure(case, arguments.clock), arguments.json)


if __name__ == "__main__":
    main()
