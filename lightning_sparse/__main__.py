"""``python -m lightning_sparse`` is ``lightning-sparse``."""

from __future__ import annotations

import sys

from lightning_sparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
