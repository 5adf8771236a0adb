"""Run the benchmarks of speed one after the other: ``python -m benchmarks [--smallest]``."""

from __future__ import annotations

import sys

from benchmarks import files, memory, overhead, scaling, sync, update

if __name__ == "__main__":
    for benchmark in (overhead, update, memory, sync, scaling, files):
        benchmark.main(sys.argv[1:])
