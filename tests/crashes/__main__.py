"""Kill trainings at random moments, and tell in what their ends differ: ``python -m tests.crashes [--kills 100]``."""

from __future__ import annotations

import os

# Before torch is imported: libgomp hangs in forked children when the parent has used more than one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import platform
import random
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch

from tests.crashes.training import TRAININGS, crash, differences, undisturbed


def main() -> int:
    """Kill so often; 1 where an end differs from that of a training that was never killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.crashes", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance, kills, differing, rounds = random.Random(options.seed), 0, 0, 0
    resumed: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        whole = {name: undisturbed(name, Path(folder) / name) for name in TRAININGS}
        while kills < options.kills:
            name = list(TRAININGS)[rounds % len(TRAININGS)]
            wanted = min(chance.randint(1, 5), options.kills - kills)
            outcome = crash(name, Path(folder) / f"{rounds}", wanted, whole[name].seconds, chance)
            said = differences(whole[name].final, outcome.final)
            kills, rounds, differing = kills + outcome.kills, rounds + 1, differing + bool(said)
            resumed |= set(outcome.resumed_from)
            steps = ", ".join(map(str, outcome.resumed_from)) or "none"
            found = "; ".join(said[:5]) or "equal"
            print(f"{name}: {outcome.kills} kills, gone on from steps {steps}: {found}", flush=True)
    print(
        f"{kills} kills in {rounds} trainings, gone on from {len(resumed)} different steps: {differing} differ"
        f" (torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()})."
    )
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
