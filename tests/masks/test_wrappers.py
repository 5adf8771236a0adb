"""Prefixes of wrappers are understood wherever weights or masks are read or written; a module's own names stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_sparse import FixedMask, apply_masks, load_masks, report, save_masks
from lightning_sparse.masks import read_masks, select_weights
from lightning_sparse.reporting import compare_masks
from tests.helpers import ToyModel, make_trainer

NAMES = ["network.0.weight", "network.2.weight", "network.4.weight"]


def fabric(module: nn.Module) -> nn.Module:
    return L.Fabric(accelerator="cpu", devices=1).setup_module(module)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "averaged parallel": lambda module: AveragedModel(nn.DataParallel(module)),
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "fabric": fabric,
}


def half_zero(module: nn.Module) -> dict[str, Tensor]:
    """Zero some weights of a module; the masks."""
    masks: dict[str, Tensor] = {}
    for name, value in module.named_parameters():
        if value.dim() > 1:
            masks[name] = torch.rand(value.shape, generator=torch.Generator().manual_seed(value.numel())) < 0.4
            value.data *= masks[name]
    return masks


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(mask, second[name]) for name, mask in first.items())


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_masks_of_a_wrapped_module_are_written_under_its_own_names(wrap: str, tmp_path: Path) -> None:
    model = ToyModel()
    masks = half_zero(model)
    save_masks(tmp_path / "masks", WRAPPERS[wrap](model))
    assert same(load_masks(tmp_path / "masks"), masks)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_module_is_looked_at_without_its_wrapper(wrap: str, tmp_path: Path) -> None:
    model = ToyModel()
    masks = half_zero(model)
    wrapped = WRAPPERS[wrap](model)
    assert [candidate.name for candidate in select_weights(wrapped).masked] == list(masks)
    assert [layer.name for layer in report(wrapped).layers] == list(masks)
    other = WRAPPERS[wrap](ToyModel(seed=4))
    apply_masks(other, masks)
    assert report(other).num_active == sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_forward_module.", "_orig_mod.", "_orig_mod.module."])
def test_weights_of_a_wrapped_module_are_understood(prefix: str, tmp_path: Path) -> None:
    model = ToyModel()
    masks = half_zero(model)
    path = tmp_path / "wrapped.pt"
    torch.save({f"{prefix}{name}": value for name, value in model.state_dict().items()}, path)
    assert same(read_masks(path, names=NAMES), {name: masks[name] for name in NAMES if name in masks})
    other, fixed = ToyModel(seed=5), FixedMask(path)
    apply_masks(other, path)
    make_trainer(tmp_path, callbacks=[fixed], max_epochs=1).fit(ToyModel(seed=6))
    for name, mask in masks.items():
        assert torch.equal(other.get_parameter(name) != 0, mask)
        assert torch.equal(fixed.registry[name].mask, mask)
    save_masks(tmp_path / "wrapped.masks", {f"{prefix}{name}": mask for name, mask in masks.items()})
    apply_masks(other, tmp_path / "wrapped.masks")
    apply_masks(other, {f"{prefix}{name}": mask for name, mask in masks.items()})
    assert [overlap.jaccard for overlap in compare_masks(masks, read_masks(path))] == [1.0] * len(masks)


class Named(L.LightningModule):
    """A module whose own attribute is called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def test_a_module_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    model = Named()
    masks = half_zero(model)
    assert list(masks) == ["module.0.weight", "module.1.weight"]
    save_masks(tmp_path / "masks", model)
    assert same(load_masks(tmp_path / "masks"), masks)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert same(read_masks(tmp_path / "model.pt"), masks)
    for source in ("masks", "model.pt"):
        other = Named()
        apply_masks(other, tmp_path / source)
        assert report(other).num_active == sum(int(mask.sum()) for mask in masks.values())
    torch.save(AveragedModel(model).state_dict(), tmp_path / "averaged.pt")
    assert same(read_masks(tmp_path / "averaged.pt"), masks)
