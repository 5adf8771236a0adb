"""What the benchmarks share: runs that alternate, ratios of medians, and how they are printed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning as L
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import lightning_sparse


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": L.__version__,
        "lightning_sparse": lightning_sparse.__version__,
    }


def quiet_trainer(**overrides: Any) -> L.Trainer:
    """Make a Trainer on the CPU that writes and shows nothing; ``overrides`` are its arguments."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(settings | overrides))


def print_table(table: Table) -> None:
    """Print a table in Markdown, as wide as it needs."""
    table.box = box.MARKDOWN
    Console(width=200).print(table)
