"""``python -m lightning_sparse`` is ``lightning-sparse``."""

from __future__ import annotations

import sys

from lightning_sparse.cli import main

sys.exit(main())
