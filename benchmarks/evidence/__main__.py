"""Every method of the package at 90, 95, 98 and 99 %, with three seeds and simple baselines, on four small networks.

The networks are LeNet-300-100 and a small CNN with and without BatchNorm on MNIST, and ResNet-8 on CIFAR-10. The
schedule is short and the same for all, so that a run takes ten seconds to some minutes of one core: four epochs (1,200
steps of 200 images on MNIST, 1,564 of 128 on CIFAR-10), SGD with momentum 0.9 and a learning rate that falls from 0.05
(CIFAR-10: 0.1, weight decay 1e-4) to 0 along a cosine. Every method has its defaults and nothing is tuned, except where
a method has no target sparsity: STR has the decay that ends nearest to the sparsity, as found by
``python -m benchmarks.evidence.calibrate``, and SRSTE has, for each layer, the nearest N of M. The accuracy is that of
the test set after the last epoch: no epoch is chosen by it.

Baselines: the dense network; a narrower dense network with as many weights; random masks (ERK) from start to end; half
of training dense, one-shot magnitude pruning over all layers, and the other half with these masks.

Each run is a process of its own with one thread, and appends one line to ``--out``. Runs that are already there are not
repeated. They run seed by seed, so that a stop leaves out whole seeds::

    python -m benchmarks.evidence --data data
    python -m benchmarks.evidence --table
    python -m benchmarks.evidence --docs
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.contenders import BASELINES, METHODS, ONLY_ON, STR_DECAY, VARIANTS
from benchmarks.evidence.figure import draw
from benchmarks.evidence.networks import NETWORKS
from benchmarks.evidence.tables import RESULTS, Evidence, markdown
from benchmarks.evidence.training import Run, train
from benchmarks.pages import put_into
from benchmarks.runs import train_missing

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
SPARSITIES = (0.95, 0.99, 0.9, 0.98)
SEEDS = (0, 1, 2)
STAGES = (("lenet300",), ("cnn-bn", "cnn"), ("resnet8",))
"""The order of training: stage by stage, and in a stage by seed, by network, by sparsity and by method."""


def all_runs(
    networks: Sequence[str] = (), methods: Sequence[str] = (), seeds: Sequence[int] = SEEDS, **shorter: int
) -> list[Run]:
    """Return the runs of the evidence, in the order in which they are trained.

    Args:
        networks: Names of networks; all if empty.
        methods: Names of methods, variants and baselines; all if empty.
        seeds: Seeds of each.
        shorter: ``train_images`` and ``epochs``, for a trial that is not part of the evidence.
    """
    runs = [
        Run(network, method, sparsity, seed, **shorter)
        for stage in STAGES
        for seed in seeds
        for network in stage
        for sparsity in (0.0, *SPARSITIES)
        for method in (("dense",) if sparsity == 0.0 else (*BASELINES[1:], *METHODS, *VARIANTS))
        if network in ONLY_ON.get(method, NETWORKS) and (method != "STR" or (network, sparsity) in STR_DECAY)
    ]
    return [run for run in runs if (not networks or run.network in networks) and (not methods or run.method in methods)]


def main(argv: Sequence[str] | None = None) -> None:
    """Train the missing runs, or write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of MNIST's and CIFAR-10's files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file that runs are appended to")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="+", default=[], help="names of networks and methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--train-images", type=int, default=0, help="a trial on the first so many")
    parser.add_argument("--epochs", type=int, default=0, help="a trial of so many")
    parser.add_argument("--table", action="store_true", help="train nothing; print the tables of what is in --out")
    parser.add_argument("--docs", action="store_true", help="train nothing; write tables and figure into docs")
    arguments = parser.parse_args(argv)
    if arguments.table or arguments.docs:
        evidence = Evidence.read(arguments.out, arguments.train_images, arguments.epochs)
        if arguments.docs:
            put_into(PAGE, "evidence", markdown(evidence))
            draw(evidence, PAGE.with_name("evidence.svg"))
        else:
            print(markdown(evidence))
        return
    networks = [name for name in arguments.only if name in NETWORKS]
    methods = [name for name in arguments.only if name not in NETWORKS]
    shorter = {"train_images": arguments.train_images, "epochs": arguments.epochs}
    runs = [
        run
        for run in all_runs(networks, methods, arguments.seeds, **shorter)
        if run.sparsity in (0.0, *arguments.sparsities)
    ]
    train_missing(runs, train, arguments.out, arguments.jobs, data=arguments.data)


if __name__ == "__main__":
    main()
