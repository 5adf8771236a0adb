"""Record the runs, or tell how they differ from their records: ``python -m tests.recorded [--compare] [NAME ...]``."""

from __future__ import annotations

import os

# Before torch is imported: libgomp hangs in forked children when the parent has used more than one thread.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import logging
import sys
from time import perf_counter

import torch

from tests.recorded.records import PATH, Record, compare, load, perform, save
from tests.recorded.runs import RUNS


def main() -> int:
    """Record, or compare; 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.recorded", description=__doc__)
    parser.add_argument("--compare", action="store_true", help="write nothing; tell in what the runs differ")
    parser.add_argument("names", nargs="*", metavar="NAME", help="runs; all where none is named")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in RUNS]
    if unknown:
        parser.error(f"there is no run {', '.join(unknown)}; there are {', '.join(RUNS)}")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names = arguments.names or list(RUNS)
    return _compare(names) if arguments.compare else _record(names)


def _compare(names: list[str]) -> int:
    differing = 0
    for name in names:
        began = perf_counter()
        said = compare(name)
        differing += bool(said)
        random = " (random scores)" if RUNS[name].uses_random else ""
        print(f"{name}{random}: {'; '.join(said) or 'equal'} [{perf_counter() - began:.1f} s]", flush=True)
    print(f"{differing} of {len(names)} runs differ.")
    return int(differing > 0)


def _record(names: list[str]) -> int:
    records: dict[str, Record] = load() if PATH.exists() else {}
    for name in names:
        began = perf_counter()
        records[name] = perform(RUNS[name])
        print(f"{name} [{perf_counter() - began:.1f} s]", flush=True)
    save({name: records[name] for name in RUNS if name in records}, PATH)
    print(f"{PATH.name}: {len(records)} runs, {PATH.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
