"""Run the benchmarks of speed one after the other: ``python -m benchmarks [--smallest]``."""

from __future__ import annotations

import sys

from benchmarks import files, guard, inference, memory, overhead, scaling, sync, update, whole_runs

if __name__ == "__main__":
    for benchmark in (overhead, whole_runs, update, memory, sync, scaling, inference, files, guard):
        benchmark.main(sys.argv[1:])
