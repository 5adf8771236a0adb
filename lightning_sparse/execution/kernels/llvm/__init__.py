"""Kernels in LLVM IR, generated in Python and compiled for this machine at first use; needs the extra ``fast``."""

from __future__ import annotations

__all__: list[str] = []
