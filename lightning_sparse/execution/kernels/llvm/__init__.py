"""Kernels in LLVM IR, written from Python and compiled for this machine at first use; needs the extra ``fast``."""

from __future__ import annotations

__all__: list[str] = []
