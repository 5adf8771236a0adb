"""States that are damaged or made by hand: each is refused with a sentence, or changes nothing of the training."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparse import DST, EAST, FGGP, GMP, FixedMask, RigL, SparsityMonitor, WeightSharing, apply_masks
from lightning_sparse.masks import CheckpointError, read_masks
from lightning_sparse.methods.state import sealed
from tests.helpers import ToyModel, make_trainer
from tests.methods.cases import CASES, Case
from tests.methods.mutations import Mutation, mutations_of, sample
from tests.methods.spies import masks_of

pytestmark = [pytest.mark.filterwarnings("ignore")]

_SENTENCE = re.compile(r"[A-Z].{30,}[.!)]$", re.DOTALL)


@dataclass
class Resumable:
    """A training that can be gone on from a checkpoint, mutated or not."""

    root: Path
    callbacks: Callable[[], Sequence[L.Callback]]
    checkpoint: dict[str, Any]
    model: Callable[[], L.LightningModule] = ToyModel

    @classmethod
    def of(
        cls,
        root: Path,
        callbacks: Callable[[], Sequence[L.Callback]],
        model: Callable[[], L.LightningModule] = ToyModel,
    ) -> Resumable:
        """Train for an epoch, and keep the checkpoint."""
        trainer = make_trainer(root, callbacks=list(callbacks()), max_epochs=1)
        trainer.fit(model())
        trainer.save_checkpoint(root / "whole.ckpt")
        return cls(root, callbacks, torch.load(root / "whole.ckpt", weights_only=True), model)

    def resume(self, key: str, state: Any) -> dict[str, Tensor]:
        """Go on for an epoch, with another state of one callback; the weights and masks at the end."""
        states = {**self.checkpoint["callbacks"], key: state}
        torch.save({**self.checkpoint, "callbacks": states}, self.root / "mutated.ckpt")
        callbacks, model = list(self.callbacks()), self.model()
        make_trainer(self.root, callbacks=callbacks).fit(model, ckpt_path=self.root / "mutated.ckpt")
        masks = masks_of(callbacks[0])  # type: ignore[arg-type]
        return {**model.state_dict(), **{f"mask of {name}": mask for name, mask in masks.items()}}

    def outcome(self, key: str, state: Any, whole: dict[str, Tensor]) -> str:
        """``refused``, ``harmless``, or what is wrong with what happened."""
        try:
            ended = self.resume(key, state)
        except (MisconfigurationException, CheckpointError, ValueError) as error:
            return "refused" if _SENTENCE.match(str(error)) else f"no sentence: {error!r}"
        except Exception as error:
            return f"raw: {type(error).__name__}: {error}"
        same = ended.keys() == whole.keys() and all(torch.equal(value, whole[name]) for name, value in ended.items())
        return "harmless" if same else "accepted, and trained something else"


def resealed(state: Any) -> Any:
    """A state with the digest of what is in it, as of somebody who knows how."""
    if not isinstance(state, dict) or "version" not in state or "digest" not in state:
        return state
    rest = {name: value for name, value in state.items() if name not in ("version", "digest")}
    try:
        return {**sealed(rest), "version": state["version"]}
    except ValueError:  # it has no digest
        return state


def faults(training: Resumable, key: str, mutations: Sequence[Mutation], *, reseal: bool) -> dict[str, str]:
    """What is wrong with the outcome of each mutation, by what was done; empty where all are as they should be.

    A state that has a digest, and is not what was written, is refused, and so is what could not be true with another
    digest. Of a state without one, what is not refused changes nothing of the training.
    """
    state = training.checkpoint["callbacks"][key]
    whole = training.resume(key, state)
    outcomes: dict[str, str] = {}
    assert training.outcome(key, resealed(state) if reseal else state, whole) == "harmless"
    for what, mutate in mutations:
        mutated = mutate(state)
        outcomes[what] = training.outcome(key, resealed(mutated) if reseal else mutated, whole)
    if reseal:  # what could be true is taken for true
        allowed = {"refused", "harmless", "accepted, and trained something else"}
    else:
        allowed = {"refused"} if "digest" in state else {"refused", "harmless"}
    counts = Counter(outcomes.values())
    # `pytest -rA` shows it.
    sys.stdout.write(f"{key}: {len(outcomes)} mutations {'with' if reseal else 'without'} a new digest: {counts}\n")
    return {what: outcome for what, outcome in outcomes.items() if outcome not in allowed}


def of_case(case: Case, root: Path) -> Resumable:
    return Resumable.of(root, lambda: [case.make()])


@pytest.mark.parametrize("reseal", [False, True], ids=["as it is", "with its digest"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("fggp-global", "rigl", "dst-sparsity", "fixedmask")])
def test_some_mutated_states_are_refused_or_harmless(case: Case, reseal: bool, tmp_path: Path) -> None:
    training = of_case(case, tmp_path)
    key = case.make().state_key
    assert faults(training, key, sample(training.checkpoint["callbacks"][key], 6), reseal=reseal) == {}


@pytest.mark.parametrize("case", CASES)
def test_each_field_that_a_method_writes_is_checked(case: Case, tmp_path: Path) -> None:
    training = of_case(case, tmp_path)
    written = training.checkpoint["callbacks"][case.make().state_key]["method"]
    assert case.make().state_fields().keys() == written.keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("reseal", [False, True], ids=["as it is", "with its digest"])
@pytest.mark.parametrize("case", CASES)
def test_mutated_states_are_refused_or_harmless(case: Case, reseal: bool, tmp_path: Path) -> None:
    training = of_case(case, tmp_path)
    key = case.make().state_key
    chosen = sample(training.checkpoint["callbacks"][key], 40, seed=reseal)
    assert faults(training, key, chosen, reseal=reseal) == {}


class Residual(ToyModel):
    """A stage of four equal blocks."""

    @staticmethod
    def build() -> nn.Sequential:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

            def forward(self, inputs: Tensor) -> Tensor:
                return inputs + self.conv(inputs[:, None])[:, 0]

        stage = nn.Sequential(*(Block() for _ in range(4)))
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), stage, nn.Linear(16, 3))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["SparsityMonitor", "WeightSharing", "DyReLUPhasing"])
def test_mutated_states_of_other_callbacks_are_refused_or_harmless(kind: str, tmp_path: Path) -> None:
    def callbacks() -> list[L.Callback]:
        if kind == "SparsityMonitor":
            return [GMP(0.8, update_every=2), SparsityMonitor()]
        return [EAST(0.5, update_every=2, sharing=WeightSharing())]

    training = Resumable.of(tmp_path, callbacks, ToyModel if kind == "SparsityMonitor" else Residual)
    (key,) = [key for key in training.checkpoint["callbacks"] if key.startswith(kind)]
    assert faults(training, key, mutations_of(training.checkpoint["callbacks"][key])[:60], reseal=False) == {}


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("step",), -7, "step is -7, not a whole number from 0 to 10,000,000,000"),
        (("step",), 10**12, "step is 1000000000000, not a whole number"),
        (("step",), True, "step is True, not a whole number"),
        (("origin",), 10**9, "origin is 1,000,000,000, after step 8"),
        (("dense",), ["network.0.weight"], "network.0.weight has a mask, but is listed as dense too"),
        (("dense",), "network.0.weight", "dense is 'network.0.weight', not a list of names"),
        (("not_finite_for",), [-1], "not_finite_for at 0 is -1"),
        (("masks", "network.0.weight", "budget"), 3, r"has \d+ active weights, and its budget is 3"),
        (("masks", "network.0.weight", "uses"), 0, "masks of network.0.weight: uses is 0"),
        (("masks", "network.0.weight", "updated_at"), 99, "was updated at step 99, after step 8"),
        (("masks", "network.0.weight", "bits"), torch.zeros(1).expand(10**6), "stores 1"),
        (("method", "stop"), "late", "stop is 'late'"),
        (("method", "memory"), {"m": {"x": torch.tensor([float("nan")])}}, "of m of x has entries that are inf or NaN"),
        (("method", "memory"), {"m": {"x": torch.zeros(1)}}, "its m of x is not of a weight that it masks"),
        (("settings", "sparsity"), 0.8, "settings of sparsity is 0.8, not a text"),
        (("total_steps",), "late", "total_steps is 'late', not a whole number"),
        (("bogus",), 1, "bogus is an unknown field"),
        (("version",), 3, "has version 3, and this lightning_sparse reads version 2"),
    ],
)
def test_a_field_that_cannot_be_is_told_in_a_sentence(
    path: tuple[str, ...], value: Any, sentence: str, tmp_path: Path
) -> None:
    training = Resumable.of(tmp_path, lambda: [RigL(0.8, update_every=3)])
    ((key, state),) = training.checkpoint["callbacks"].items()
    part = state
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(MisconfigurationException, match=sentence):
        training.resume(key, resealed(state))


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("own", "steering", "scale"), float("nan"), "steering: scale is nan, not a number from 0 to 0.5"),
        (("own", "resets", "network.0.weight"), -1, "resets of network.0.weight is -1"),
        (("learned", "network.0.weight"), torch.full((16,), float("nan")), "inf or NaN"),
        (("asleep", "network.0.weight"), torch.full((3,), float("inf")), "inf or NaN"),
        (("asleep", "bogus"), torch.zeros(3), "pruned values has bogus"),
        (("twins",), [{"state": [], "param_groups": []}], "is not an optimizer"),
    ],
)
def test_a_field_of_a_latent_method_is_told_likewise(
    path: tuple[str, ...], value: Any, sentence: str, tmp_path: Path
) -> None:
    training = Resumable.of(tmp_path, lambda: [DST(sparsity=0.8)])
    ((key, state),) = training.checkpoint["callbacks"].items()
    part = state["method"]
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(MisconfigurationException, match=sentence):
        training.resume(key, resealed(state))


def test_what_dst_is_asked_for_may_change_from_alpha_to_sparsity(tmp_path: Path) -> None:
    training = Resumable.of(tmp_path, lambda: [DST(0.05)])
    ((key, state),) = training.checkpoint["callbacks"].items()
    training.callbacks = lambda: [DST(sparsity=0.5)]
    training.resume(key, state)


def test_a_flipped_bit_in_the_masks_is_refused_wherever_they_are_read(tmp_path: Path) -> None:
    training = Resumable.of(tmp_path, lambda: [FGGP(0.8, update_every=2)])
    ((key, state),) = training.checkpoint["callbacks"].items()
    state["masks"]["network.0.weight"]["bits"][3] ^= 16
    with pytest.raises(MisconfigurationException, match=r"its digest does not match|and its budget is"):
        training.resume(key, state)
    path = tmp_path / "mutated.ckpt"
    for read in (read_masks, lambda path: apply_masks(ToyModel(), path)):
        with pytest.raises(CheckpointError, match=r"mutated\.ckpt is damaged: its digest does not match"):
            read(path)
    with pytest.raises(CheckpointError, match="its digest does not match"):
        make_trainer(tmp_path, callbacks=[FixedMask(path)]).fit(ToyModel())


def test_a_layer_that_was_added_since_is_not_blamed_on_a_checkpoint(tmp_path: Path) -> None:
    method, model = GMP(0.5, update_every=2), ToyModel()
    make_trainer(tmp_path, callbacks=[method], max_epochs=1).fit(model)
    model.network.append(nn.Linear(3, 3))
    with pytest.raises(MisconfigurationException, match="The last training of this module holds no mask of") as refused:
        make_trainer(tmp_path, callbacks=[method], max_epochs=1).fit(model)
    assert "checkpoint" not in str(refused.value)
    make_trainer(tmp_path, callbacks=[GMP(0.6, update_every=2)], max_epochs=1).fit(model)
