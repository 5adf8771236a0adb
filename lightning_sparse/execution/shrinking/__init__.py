"""What shrinking knows of a network: its operations, its units, and its layers."""

from __future__ import annotations

__all__: list[str] = []
