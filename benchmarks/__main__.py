"""Run the benchmarks of speed one after the other: ``python -m benchmarks [--smallest]``."""

from __future__ import annotations

import sys

from benchmarks import overhead, update

if __name__ == "__main__":
    overhead.main(sys.argv[1:])
    update.main(sys.argv[1:])
