"""Everything of a method that lives from the start of training to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import lightning.pytorch as pl

from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.plan import Candidate
from lightning_sparse.masks.registry import Left, MaskRegistry
from lightning_sparse.methods.averages import Averages
from lightning_sparse.methods.guard import Guard
from lightning_sparse.schedules import Timetable

Source = Literal["checkpoint", "module"]
"""Whence a state comes: from a checkpoint, or from the last training of this module in this process."""

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

__all__ = ["Beginning", "LivePlan", "Loaded", "Run", "StepWatch"]


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint has brought.

    Attributes:
        left: What it left in the module, masks of every method; None where it has none.
        resumes: Whether ``fit`` has loaded it, to go on; else it was loaded to be evaluated.
        state: That of the method, if it has one.
    """

    left: Left | None
    resumes: bool
    state: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Beginning:
    """What a training begins with.

    Attributes:
        state: The method's own state; None where it begins.
        goes_on: Whether the state's clock goes on; else a new training begins with the weights and masks of that state.
        inherited: Masks that another method has left, by parameter name.
        source: Whence the state comes.
    """

    state: Mapping[str, Any] | None = None
    goes_on: bool = False
    inherited: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    source: Source = "checkpoint"


@dataclass
class LivePlan:
    """What is masked and what is not, as it changes while a training runs.

    Attributes:
        dense: The parameters that are left dense, each with its reason.
        frozen: Those of them that would be masked if they were trained.
        thawed: Names of those that were frozen when masks were made, are trained now, and stay dense.
    """

    dense: list[Candidate]
    frozen: list[Candidate]
    thawed: list[str] = field(default_factory=list[str])


@dataclass
class StepWatch:
    """Which groups wait for a step, and which have ever been seen to take one.

    Attributes:
        awaiting: Groups whose gradients were prepared, and whose optimizer has not stepped yet.
        seen: Groups that Lightning has ever announced a step of.
        had_gradients: Groups that had gradients without ever being announced.
        given_closures: Groups whose optimizer was given a closure in this batch, by which Lightning announces a step.
        stepped: Whether a step was taken in this batch.
        handles: The hooks on optimizers, by group.
        clip_val: What the Trainer clips gradients to, while it is kept from it in a step that is left out.
        differentiated: Groups whose optimizer may differentiate their gradients in the coming step, as AdaHessian and
            SophiaH do: until then nothing writes to the weights, for autograd would refuse.
    """

    awaiting: set[MaskGroup] = field(default_factory=set[MaskGroup])
    differentiated: set[MaskGroup] = field(default_factory=set[MaskGroup])
    seen: set[MaskGroup] = field(default_factory=set[MaskGroup])
    had_gradients: set[MaskGroup] = field(default_factory=set[MaskGroup])
    given_closures: set[MaskGroup] = field(default_factory=set[MaskGroup])
    stepped: bool = False
    clip_val: float | None = None
    handles: dict[MaskGroup, list[RemovableHandle]] = field(default_factory=dict[MaskGroup, "list[RemovableHandle]"])

    def unhook(self, group: MaskGroup) -> None:
        """Take the hooks of ``group`` off its optimizer."""
        for handle in self.handles.pop(group, ()):
            handle.remove()


@dataclass(eq=False)
class Run:
    """One training of one module by one method.

    Attributes:
        trainer: The Trainer.
        module: The module, as Lightning knows it.
        registry: The masks of the module, other methods' included.
        groups: Those of this method, one group for each optimizer.
        plan: What is masked and what is not.
        beginning: What it began with.
        origin: The method's step at which this training's clock begins.
        began_at: The Trainer's step at that time.
        total_steps: How many steps this training has from there; ``inf`` where it has no known end.
        timetable: When masks are updated; None where they are at every step.
        gradient_scale: The scale of the gradients that are looked at: 1, except for fused optimizers in float16.
        memory: Tensors shaped like weights that the method remembers, by purpose and parameter name.
        own: What else a method keeps for as long as a training lasts.
        steps: Which steps are awaited.
        guards: Whether zeros hold, by group.
        averages: Copies of the weights that someone averages.
        watched: The hooks before forward passes, if writes were found there.
        saved: The checkpoint that is being written, until it has been looked at.
        active: Whether the training runs now.
        left: What it has left in the module when it ended.
        warned: The warnings that were given.
    """

    trainer: ref[pl.Trainer]
    module: ref[pl.LightningModule]
    registry: MaskRegistry
    groups: list[MaskGroup]
    plan: LivePlan
    beginning: Beginning
    origin: int
    began_at: int
    total_steps: float
    timetable: Timetable | None = None
    gradient_scale: float = 1.0
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, "dict[str, Tensor]"])
    own: Any = None
    steps: StepWatch = field(default_factory=StepWatch)
    guards: dict[MaskGroup, Guard] = field(default_factory=dict[MaskGroup, Guard])
    averages: Averages = field(default_factory=Averages)
    watched: list[RemovableHandle] = field(default_factory=list["RemovableHandle"])
    saved: Mapping[str, Any] | None = None
    active: bool = False
    left: Left | None = None
    warned: set[str] = field(default_factory=set[str])

    def progress(self, step: int) -> float:
        """How far ``step`` is through this training, in [0, 1]."""
        return min(1.0, max(0.0, (step - self.origin) / self.total_steps))

    def guard(self, group: MaskGroup) -> None:
        """Watch ``group`` from now on."""
        self.guards[group] = Guard(group)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and references cannot go to another process, and what watches a training ends with it.
        gone = {"trainer": _nothing, "module": _nothing, "steps": StepWatch(), "guards": {}, "averages": Averages()}
        return self.__dict__ | gone | {"active": False, "watched": [], "saved": None}

    def watch_no_more(self) -> None:
        """Take the hooks off the module."""
        for handle in self.watched:
            handle.remove()
        self.watched.clear()


def _nothing() -> None:
    """A reference to what is no more."""
    return
