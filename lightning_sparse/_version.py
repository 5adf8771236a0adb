"""The version of the package, read by setup.cfg."""

from __future__ import annotations

__version__ = "0.2.0"
