"""A reader of sparse files written from their documentation, by nothing but safetensors, NumPy and torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor


def read_sparse(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        notes = json.loads(file.metadata()["sparse"])

    def positions(piece: str) -> NDArray[np.int64]:
        if f"{piece}bitmask" in stored:
            return np.flatnonzero(np.unpackbits(stored.pop(f"{piece}bitmask").numpy(), bitorder="little"))
        gaps = stored.pop(f"{piece}gaps").numpy()
        bridge = gaps == np.iinfo(gaps.dtype).max
        places = np.cumsum(gaps.astype(np.int64) + ~bridge) - 1
        return places[~bridge][:-1]

    for name, note in notes.items():
        if "same_as" in note:
            continue
        dtype = getattr(torch, note["dtype"])
        values = stored.pop(f"{name}.values" if "positions" in note else name)
        values = values.view(dtype).squeeze(-1) if values.dtype == torch.uint8 != dtype else values.to(dtype)
        if "positions" in note:
            dense = torch.zeros(note["shape"], dtype=dtype).flatten()
            dense[positions(f"{name}.")] = values
            if "minus" in note:
                dense[positions(f"{name}.minus.")] = -0.0
            values = dense
        stored[name] = values.view(note["shape"])
    return stored | {name: stored[note["same_as"]] for name, note in notes.items() if "same_as" in note}
