"""Find the weight decay with which STR ends at a sparsity, since STR has no target: by bisection, with its own seed.

This looks only at the sparsity, and never at the accuracy::

    python -m benchmarks.evidence.calibrate --data data --networks lenet300
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.evidence.contenders import STR_INITIAL
from benchmarks.evidence.networks import NETWORKS
from benchmarks.evidence.training import Run, fit, new_module
from benchmarks.runs import begin
from lightning_sparse import STR

SEED = 100  # not one of the seeds that are reported
CLOSE = 0.05  # the allowed error, as a share of the density


def nearest(reached: Callable[[float], float], sparsity: float, known: dict[float, float]) -> float:
    """Return the decay that ends nearest to a sparsity, among those that are tried.

    Args:
        reached: Returns the sparsity at which a decay ends; it rises with the decay.
        sparsity: The sparsity to reach.
        known: Sparsities by decay, of decays that were tried before. New ones are added.
    """
    for _ in range(8):
        best = min(known, key=lambda decay: abs(known[decay] - sparsity))
        if abs(known[best] - sparsity) <= CLOSE * (1.0 - sparsity):
            break
        below = [decay for decay, its in known.items() if its <= sparsity]
        above = [decay for decay, its in known.items() if its > sparsity]
        low = max(below) if below else min(above) / 4.0
        high = min(above) if above else max(below) * 4.0
        middle = math.sqrt(low * high)
        known[middle] = reached(middle)
    return min(known, key=lambda decay: abs(known[decay] - sparsity))


def main(argv: Sequence[str] | None = None) -> None:
    """Find the decays, and print the entries of ``STR_DECAY``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95, 0.98, 0.99])
    arguments = parser.parse_args(argv)
    for network in arguments.networks:

        def reached(decay: float, name: str = network) -> float:
            begin(SEED)
            run = Run(name, "STR", 0.0, SEED)
            module = new_module(run)
            method = STR(STR_INITIAL, decay=decay)
            fit(run, module, arguments.data, run.setting.epochs, [method])
            sparsity = method.registry.sparsity
            print(f"# {name}: decay {decay:.3g} ends at {sparsity:.4f}", flush=True)
            return sparsity

        known = {0.004: reached(0.004)}
        for sparsity in arguments.sparsities:
            decay = nearest(reached, sparsity, known)
            print(f'("{network}", {sparsity}): {float(f"{decay:.4g}")},', flush=True)


if __name__ == "__main__":
    main()
