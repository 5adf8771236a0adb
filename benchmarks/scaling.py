"""How the cost of an update grows with the number of weights and of layers.

The exponent b comes from a least-squares fit of ``seconds = a · n^b``: it is the slope of a line through the
logarithms, and 1 is linear. Weights grow from one million to a hundred million in ten layers. Layers grow from 10 to
1000 with ten million weights; there, linear growth would be the worst: all work would be done for each layer, none for
each weight::

    python -m benchmarks.scaling --only FGGP RigL
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import log
from statistics import linear_regression, median
from typing import Any

import lightning as L

from benchmarks.harness import argument_parser, report, write
from benchmarks.update import LAYERS, METHODS, ManyWeights, fit

TITLE = "The cost of an update as networks grow"
GOAL = 1.05
WEIGHTS = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)
NUM_LAYERS = (10, 30, 100, 300, 1000)
WEIGHTS_OF_MANY_LAYERS = 10_000_000


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The b of ``seconds = a · sizes^b``.

    Example:
        >>> round(exponent([1, 10, 100], [3, 30, 300]), 6)
        1.0
    """
    return linear_regression([log(size) for size in sizes], [log(second) for second in seconds]).slope


def seconds_of_update(
    name: str, num_weights: int, layers: int, *, updates: int, clock: Callable[[], float], device: str
) -> float:
    """The median time of some updates."""
    L.seed_everything(0, verbose=False)
    steps = updates + 2
    module = ManyWeights(num_weights, steps, layers)
    return median(fit(METHODS[name](steps), module, clock, sort=False, device=device).updates[2:])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*METHODS], default=[*METHODS], help="some of the methods")
    arguments = parser.parse_args(argv)
    updates = 2 if arguments.smallest else arguments.updates
    time_it = partial(seconds_of_update, updates=updates, clock=arguments.clock, device=arguments.device)
    by_weights = [(size, LAYERS) for size in ((10_000, 100_000) if arguments.smallest else WEIGHTS)]
    by_layers = [(10_000, layers) for layers in (4, 9)]
    if not arguments.smallest:
        by_layers = [(WEIGHTS_OF_MANY_LAYERS, layers) for layers in NUM_LAYERS]
    rows: list[dict[str, Any]] = []
    for name in ["RigL"] if arguments.smallest else arguments.only:
        for grows, index, cases in (("weights", 0, by_weights), ("layers", 1, by_layers)):
            seconds = [time_it(name, *case) for case in cases]
            of_update = {f"{case[index]:,}": 1e3 * second for case, second in zip(cases, seconds, strict=True)}
            b = exponent([case[index] for case in cases], seconds)
            rows.append(
                {
                    "method": name,
                    "growing": grows,
                    "ms by number": ", ".join(f"{size}: {float(f'{ms:.3g}'):,g}" for size, ms in of_update.items()),
                    "exponent": b,
                    "goal": GOAL if grows == "weights" else "",
                }
            )
            write(TITLE, rows, arguments.json)
    report(TITLE, rows)


if __name__ == "__main__":
    main()
