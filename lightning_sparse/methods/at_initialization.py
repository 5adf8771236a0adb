"""Methods that prune at initialization: once, before the first step, on real batches; then training begins."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.budgets import budget_of
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.schema import Check, mapping_of, number, whole
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.scored import Allocation, ScoredMethod
from lightning_sparse.schedules import Duration, Schedule, UpdateTimes

__all__ = ["AtInitialization", "Watched"]


@dataclass
class Watched:
    """What the method collects until it prunes.

    Attributes:
        seen: How many steps with finite gradients there were, by parameter name.
        batch: The latest batch.
        tensors: Tensors by parameter name; they are not kept in checkpoints.
        share: The share of the loss's scale at which they are computed, in (0, 1].
    """

    seen: dict[str, int] = field(default_factory=dict[str, int])
    batch: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    share: float = 1.0


@method
class AtInitialization(ScoredMethod, ABC):
    """A scored method that prunes once, as training begins.

    The gradients come from the Trainer's first batches and the module's own loss. The optimizer takes no step on these
    batches; then the only update happens. If another method has left masks, their active weights are pruned further.
    """

    sparsity: float | Schedule = field(
        kw_only=False, metadata=doc("Sparsity of all masked weights together, a number in [0, 1).")
    )
    allocation: Allocation = field(
        default="global", metadata=doc('Which weights are ranked together: all (``"global"``), or those of a layer.')
    )
    batches: int = field(
        default=1,
        metadata=doc(
            "Number of optimizer steps whose gradients are summed, at least 1; the optimizer skips these steps."
        ),
    )
    # The only update comes as training begins, so these are no arguments.
    update_every: Duration = field(default=1, init=False)
    start: Duration = field(default=0, init=False)
    stop: Duration = field(default=0, init=False)

    grows: ClassVar[bool] = False
    begins_dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, Schedule):
            raise ValueError(
                f"sparsity is {self.sparsity}, but {type(self).__name__} prunes once: give a number in [0, 1)."
            )
        if isinstance(self.batches, bool) or not isinstance(self.batches, int) or self.batches < 1:
            raise ValueError(f"batches is {self.batches!r}; give a number of optimizer steps, an int of at least 1.")
        super().__post_init__()

    @property
    def watched(self) -> Watched:
        """What was seen in this training."""
        return cast("Watched", self.run.own)

    @override
    def prepare(self) -> None:
        self.run.own = Watched()

    @property
    def steps_watched(self) -> int:
        """How many steps are looked at before weights are pruned."""
        return self.batches

    @property
    @override
    def times(self) -> UpdateTimes:
        return UpdateTimes(every=1, start=self.steps_watched - 1, stop=self.steps_watched - 1)

    @property
    @override
    def replaces_step(self) -> bool:
        return True

    def is_pending(self, group: MaskGroup) -> bool:
        """Whether the weights of ``group`` are still to be pruned."""
        assert isinstance(self.sparsity, Schedule)
        times = self.run.timetable
        pending = times is not None and group.updated_at < times.stop
        return pending and group.num_active > budget_of(group, self.sparsity(1.0))

    @override
    def observe(self, weight: MaskedWeight) -> None:
        self.watched.seen[weight.name] = self.watched.seen.get(weight.name, 0) + 1

    @override
    def is_ready(self, group: MaskGroup) -> bool:
        seen = self.watched.seen
        return not self.is_pending(group) or all(seen.get(w.name, 0) + 1 >= self.steps_watched for w in group)

    @override
    def waits(self, group: MaskGroup) -> bool:
        if not self.is_pending(group):
            return False
        if all(weight.parameter.grad is None for weight in group):
            self.warn_once(
                "no masked weight got a gradient, so neither pruning nor the optimizer has begun. Let training_step"
                " return a loss that depends on the weights"
            )
        return True

    @override
    def observes(self, group: MaskGroup) -> bool:
        return super().observes(group) and self.is_pending(group)

    @override
    def after_update(self, group: MaskGroup) -> None:
        for tensors in (*self.run.memory.values(), self.watched.tensors):
            for weight in group:
                tensors.pop(weight.name, None)

    @override
    def training_ended(self) -> None:
        if any(self.is_pending(group) for group in self.groups):
            rank_zero_warn(
                f"{type(self).__name__} has pruned nothing: training ended at step {self.step} before every masked"
                f" weight had a finite gradient in {self.steps_watched} optimizer step(s). Look at the loss, and at the"
                " number of batches."
            )
        else:
            super().training_ended()

    @override
    def method_state(self) -> dict[str, Any]:
        return super().method_state() | {"seen": dict(self.watched.seen), "share": self.watched.share}

    @override
    def state_fields(self) -> Mapping[str, Check]:
        return {**super().state_fields(), "seen": mapping_of(whole()), "share": number(2.0**-128, 1.0)}

    @override
    def load_method_state(self, state: Mapping[str, Any]) -> None:
        super().load_method_state(state)
        self.watched.seen, self.watched.share = dict(state["seen"]), state["share"]
