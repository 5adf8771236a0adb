"""Tests of lightning_sparse; the folders mirror the package."""
