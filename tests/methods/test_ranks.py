"""Processes that differ: an error within seconds on each, which names the difference, and no waiting for the others."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_sparse import DST, FGGP, GMP, SNIP, FixedMask, GraSP, RigL, SparseMethod, report, save_masks
from lightning_sparse.masks import read_masks
from lightning_sparse.testing import ToyModel, fit_two_processes, random_masks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OFTEN: dict[str, Any] = {"update_every": 2, "stop": 7}
METHODS: dict[str, Callable[..., SparseMethod]] = {
    "gmp": lambda **kw: GMP(0.8, **(OFTEN | kw)),
    "rigl": lambda **kw: RigL(0.8, **(OFTEN | kw)),
    "dst": lambda **kw: DST(0.03, **kw),
}
SECONDS = 60  # of a busy machine; the process groups wait for 30 minutes


def test_after_a_training_in_other_processes_an_empty_registry_says_where_masks_are(tmp_path: Path) -> None:
    method, model = GMP(0.75, update_every=2), ToyModel()
    (dump, _) = fit_two_processes(model, tmp_path, [method], max_epochs=1)
    said = repr(method.registry)
    assert "0 weights" not in said
    assert "masks stay in the processes that trained" in said
    for ask in (lambda: method.run, lambda: save_masks(tmp_path / "file.masks", method)):
        with pytest.raises((RuntimeError, ValueError), match="masks stay in the processes that trained"):
            ask()
    # what it advises helps
    torch.save({"state_dict": dump["weights"], "callbacks": dump["callbacks"]}, tmp_path / "file.ckpt")
    masks = read_masks(tmp_path / "file.ckpt")
    pruned = sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert report(model).sparsity == pytest.approx(pruned) == pytest.approx(0.75)


class OtherwiseOnRank1(L.Callback):
    """Gives the method of rank 1 the arguments of another, as a script does that reads them from its environment."""

    def __init__(self, method: SparseMethod, other: SparseMethod) -> None:
        self.method, self.other = method, other

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.global_rank == 1:
            vars(self.method).update(vars(self.other))


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("gmp", {"update_every": 3}),
        ("rigl", {"update_every": 3}),
        ("rigl", {"seed": 7}),
        ("gmp", {"include": ["network.0.*"]}),
        ("dst", {"exclude": ["network.0.*"]}),
    ],
)
def test_arguments_that_differ_are_an_error_that_names_them(name: str, differs: dict[str, Any], tmp_path: Path) -> None:
    method = METHODS[name]()
    began = time.monotonic()
    # of an argument that changes the key of the state, the key is named
    with pytest.raises(Exception, match=rf"The processes differ in the \w+ of {type(method).__name__}"):
        fit_two_processes(ToyModel(), tmp_path, [OtherwiseOnRank1(method, METHODS[name](**differs)), method])
    assert time.monotonic() - began < SECONDS


def test_a_sparsity_that_differs_is_an_error(tmp_path: Path) -> None:
    method = GMP(0.8)
    with pytest.raises(Exception, match=r"The processes differ in the arguments of GMP"):
        fit_two_processes(ToyModel(), tmp_path, [OtherwiseOnRank1(method, GMP(0.5)), method])


def test_a_module_that_differs_in_what_is_trained_is_an_error(tmp_path: Path) -> None:
    class Frozen(ToyModel):
        def on_train_start(self) -> None:
            """After DDP has looked at the parameters."""
            if self.global_rank == 1:
                self.network[0].requires_grad_(False)  # type: ignore[index]

    class Early(L.Callback):  # module hooks come after those of callbacks
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.on_train_start()

    with pytest.raises(Exception, match=r"The processes differ in the weights of GMP"):
        fit_two_processes(Frozen(), tmp_path, [Early(), GMP(0.8)])


class NoGradientOnRank1(L.Callback):
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: nn.Module, optimizer: Any) -> None:
        if trainer.global_rank == 1:
            for name, parameter in pl_module.named_parameters():
                if self.pattern in name:
                    parameter.grad = None


@pytest.mark.parametrize("pattern", ["network.2.weight", "network"])
@pytest.mark.parametrize(
    "method",
    [
        lambda: GMP(0.8, update_every=2, stop=7),
        lambda: FGGP(0.8, update_every=2, stop=7),
        lambda: RigL(0.8, update_every=2, stop=7),
        lambda: SNIP(0.8),
        lambda: GraSP(0.8),
    ],
    ids=["gmp", "fggp", "rigl", "snip", "grasp"],
)
def test_gradients_that_one_process_lacks_are_an_error_that_names_them(
    method: Callable[[], SparseMethod], pattern: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(Exception, match=r"Some processes have no gradient of .*network\.2\.weight"):
        fit_two_processes(ToyModel(), tmp_path, [NoGradientOnRank1(pattern), method()])
    assert time.monotonic() - began < SECONDS


def test_a_latent_method_finds_them_by_masks_that_differ(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"The masks of network\.2\.weight differ between the processes"):
        fit_two_processes(ToyModel(), tmp_path, [NoGradientOnRank1("network.2.weight"), DST(0.03)])


def test_fixed_masks_find_them_by_weights_that_differ(tmp_path: Path) -> None:
    """No mask depends on a gradient here, so nobody votes: weights are compared as each epoch ends."""
    fixed = FixedMask(random_masks(ToyModel()))
    with pytest.raises(Exception, match=r"the weights of network\.2\.weight differ between the processes"):  # a warning
        fit_two_processes(ToyModel(), tmp_path, [NoGradientOnRank1("network.2.weight"), fixed])


@pytest.mark.parametrize("freezes", [False, True])
def test_fixed_masks_that_differ_are_an_error(freezes: bool, tmp_path: Path) -> None:
    """Those of frozen layers too, which no update of masks makes equal."""
    model = ToyModel()
    masks, others = random_masks(model), random_masks(model)
    others["network.0.weight"] = ~others["network.0.weight"]
    model.network[0].requires_grad_(not freezes)
    method = FixedMask(masks)
    with pytest.raises(Exception, match=r"The processes differ in the arguments of FixedMask"):
        fit_two_processes(model, tmp_path, [OtherwiseOnRank1(method, FixedMask(others)), method])
