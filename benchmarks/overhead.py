"""What a sparse method adds to a training step, compared with dense training and with other tools, in the same run.

Each contender has a Trainer of its own, and they take turns of a few steps. A step lasts from one
``on_train_batch_start`` to the next, so the start and end of a fit do not count. 90 % of the weights are pruned. Masks
are made before the steps that count, and then only kept. :mod:`benchmarks.contenders` says who takes part, and
:mod:`benchmarks.update` measures what updates add.

    python -m benchmarks.overhead --cases resnet18 vit --optimizers SGD --precisions fp32 --rivals
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import lightning as L

from benchmarks.cases import CASES, OPTIMIZERS, PRECISIONS, SMALLEST, Case, Optimizer, Timed
from benchmarks.contenders import METHODS, RIVALS, Contender
from benchmarks.harness import Ratio, alternate, argument_parser, quiet_trainer, report, write

TITLE = "A training step, sparse over dense"
DENSE = "dense"
GOAL_OVER_RIVALS = 0.97
HARD = ("GMP", "FGGP", "SET", "RigL", "EAST", "FixedMask")
GOALS: dict[str, dict[str, float]] = {
    "lenet": dict.fromkeys(HARD, 1.08),
    "resnet18": dict.fromkeys(HARD, 1.02) | {"DST": 1.10},
    "resnet50": {},
    "vit": dict.fromkeys(HARD, 1.02),
}
"""Goals for a step over dense, in fp32."""
# Left out where the network has no ReLUs on (batch, channel, ...), which Dynamic ReLUs replace.
NOT_IN = {
    "lenet": {"EAST, Dynamic ReLUs"},
    "resnet18": set[str](),
    "resnet50": set[str](),
    "vit": {"EAST, Dynamic ReLUs"},
}


def fit(
    case: Case, turns: L.Callback, *, contender: Contender, optimizer: Optimizer, precision: str, device: str
) -> None:
    """Train for the steps of ``case``."""
    network = case.network()
    contender.prepare(network)
    module = Timed(network, case.batch, case.steps, optimizer)
    callbacks = [turns, *contender.callbacks()]
    quiet_trainer(max_epochs=1, callbacks=callbacks, accelerator=device, precision=precision).fit(module)


def measure(
    case: Case,
    contenders: Mapping[str, Contender],
    clock: Callable[[], float],
    *,
    optimizer: str = "SGD",
    precision: str = "fp32",
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Time the steps of ``case``; return the seconds of each step by contender, dense first."""
    settings = {"optimizer": OPTIMIZERS[optimizer], "precision": PRECISIONS[precision], "device": device}
    everyone = {DENSE: Contender(), **contenders}
    fits = {name: partial(fit, case, contender=contender, **settings) for name, contender in everyone.items()}
    return alternate(fits, rounds=case.rounds, every=case.every, skip=case.skip, clock=clock)


def rows(
    seconds: Mapping[str, Sequence[float]], conditions: Mapping[str, Any], goals: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Make a row for each contender, from its steps and those of comparable rivals."""
    table: list[dict[str, Any]] = []
    for name, its_seconds in seconds.items():
        of_parametrize = "thresholds by parametrize" if name == "DST" else "parametrize"
        rivals = {"prune": "torch.nn.utils.prune", "parametrize": of_parametrize}
        table.append(
            {
                **conditions,
                "contender": name,
                "step, ms": 1e3 * median(its_seconds),
                "over dense (quartiles)": Ratio.of(its_seconds, seconds[DENSE]),
                "goal": goals.get(name, ""),
            }
            | {
                f"over {short} (goal {GOAL_OVER_RIVALS})": Ratio.of(its_seconds, seconds[rival]).value
                for short, rival in rivals.items()
                if rival in seconds
            }
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table for each network, optimizer and precision."""
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--optimizers", nargs="+", choices=[*OPTIMIZERS], default=[*OPTIMIZERS])
    parser.add_argument("--precisions", nargs="+", choices=[*PRECISIONS], default=[*PRECISIONS])
    parser.add_argument("--only", nargs="+", choices=[*METHODS, *RIVALS], help="some of the contenders")
    parser.add_argument("--rivals", action="store_true", help="others' ways too")
    parser.add_argument("--rounds", type=int, help="how often each trains, instead of the case's number")
    parser.add_argument("--batch", type=int, help="images of a batch, instead of the case's number")
    arguments = parser.parse_args(argv)
    everyone = METHODS | (RIVALS if arguments.rivals or arguments.only else {})
    contenders = {name: everyone[name] for name in arguments.only or everyone}
    tables: list[dict[str, Any]] = []
    if arguments.smallest:
        cells = [("lenet", SMALLEST, "AdamW", "bf16")]
        contenders = METHODS | RIVALS
    else:
        cells = [
            (key, resized(CASES[key], arguments.rounds, arguments.batch), optimizer, precision)
            for key in arguments.cases
            for optimizer in arguments.optimizers
            for precision in arguments.precisions
        ]
    for key, case, optimizer, precision in cells:
        seconds = measure(
            case,
            {name: contender for name, contender in contenders.items() if name not in NOT_IN[key]},
            arguments.clock,
            optimizer=optimizer,
            precision=precision,
            device=arguments.device,
        )
        conditions = {"network": f"{case.name}, batch {case.batch[0]}", "optimizer": optimizer, "precision": precision}
        tables += rows(seconds, conditions, GOALS[key] if precision == "fp32" else {})
        report(TITLE, tables[-len(seconds) :])
        write(TITLE, tables, arguments.json)


def resized(case: Case, rounds: int | None, batch: int | None) -> Case:
    """Change the rounds and the batch size of ``case``, if they are given."""
    return replace(case, rounds=rounds or case.rounds, batch=(batch or case.batch[0], *case.batch[1:]))


if __name__ == "__main__":
    main()
