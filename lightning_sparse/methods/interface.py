"""The interface of a method: the questions that it answers, and its public attributes; no hook of Lightning's."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar, final

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_sparse.arguments import check_flag
from lightning_sparse.functional.hashing import content_hash
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.moments import all_finite
from lightning_sparse.masks.plan import Candidate, as_patterns
from lightning_sparse.masks.registry import ELSEWHERE, MaskRegistry
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.masks.schema import Check
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.run import Loaded, Run
from lightning_sparse.schedules import Timetable, as_number
from lightning_sparse.trainer import TrainerCallback

__all__ = ["Method"]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

# Steps in a row without a finite gradient, after which training has diverged.
_PATIENCE = 100


@method
class Method(TrainerCallback, ABC):
    """A method of sparse training: the questions that it answers, and its public attributes.

    :class:`~lightning_sparse.methods.base.SparseMethod` adds Lightning's hooks, which ask these questions.

    Attributes:
        paper: Where the method is defined.
        needs_dense_gradients: Whether an update reads the gradients of pruned weights, and so needs a dense backward.
        clears_gradients: Whether the gradients of pruned weights are zero when the optimizer steps.
        masks_new_weights: Whether the method can mask a layer that takes the place of another while it trains.
        step: Optimizer steps taken so far.
        last_run: The training that is running, or the last one.
        loaded: What has been loaded from a checkpoint since then.
        brought: The :meth:`companions` that it has added to the Trainer, until training begins.
    """

    include: Sequence[str] | None = field(
        default=None,
        metadata=doc("Patterns of the weights to mask; see :func:`~lightning_sparse.masks.select_weights`."),
    )
    exclude: Sequence[str] | None = field(default=None, metadata=doc("Patterns of the weights that stay dense."))

    paper: ClassVar[Paper]
    needs_dense_gradients: ClassVar[bool] = False
    clears_gradients: ClassVar[bool] = True
    masks_new_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # numbers of numpy are numbers
            value = as_number(getattr(self, item.name))
            setattr(self, item.name, check_flag(item.name, value) if item.type in (bool, "bool") else value)
        self.include, self.exclude = as_patterns("include", self.include), as_patterns("exclude", self.exclude)
        # Lightning asks for it at every hook.
        self._state_key = self._generate_state_key(include=self.include, exclude=self.exclude)
        self.step = 0
        self.last_run: Run | None = None
        self.loaded: Loaded | None = None
        self.is_set_up = False  # for a fit that has not begun to train
        self.had_no_state = False  # when it was asked for one since then, as finders do
        self.brought: list[pl.Callback] = []

    # What a method implements.

    @abstractmethod
    def initialize_masks(self, group: MaskGroup) -> None:
        """Write the initial masks into ``group.mask``, which is all active.

        If ``self.inherited`` has masks, begin with them as far as the method can. Do not change weights here.
        """

    @abstractmethod
    def before_step(self, trainer: pl.Trainer, group: MaskGroup) -> None:
        """Act on the final gradients of ``group``, before its optimizer steps. Autograd is off."""

    @abstractmethod
    def after_step(self, group: MaskGroup) -> None:
        """Act on the weights of ``group``, after its optimizer has stepped."""

    @abstractmethod
    def step_skipped(self, group: MaskGroup) -> None:
        """The optimizer skipped the step that :meth:`before_step` prepared."""

    @abstractmethod
    def weights_written(self, weights: Sequence[MaskedWeight]) -> None:
        """Other code has written to weights between two steps: zero the pruned ones again."""

    @abstractmethod
    def target_sparsity(self, name: str | None = None) -> float:
        """The current target sparsity of the method's weights together, or of the weight ``name``."""

    @abstractmethod
    def method_state(self) -> dict[str, Any]:
        """The method's own state besides its masks, for checkpoints: only tensors and primitives."""

    @abstractmethod
    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Load a state from :meth:`method_state`, after :meth:`prepare`, with the masks loaded already."""

    # What a method may add.

    def state_fields(self) -> Mapping[str, Check]:
        """The check for each field of :meth:`method_state`; a checkpoint that fails one is refused."""
        return {}

    def timetable(self, total_steps: float) -> Timetable | None:
        """The update times in a run of ``total_steps`` (``inf`` if unknown); None means at every step.

        Raises:
            ValueError: No times can be found for such a training.
        """
        return None

    def refuses(self, candidate: Candidate, *, is_last: bool) -> str:
        """Why the method cannot mask a weight; empty if it can.

        Args:
            candidate: The weight.
            is_last: Whether it is the last that would be masked.
        """
        return ""

    def prepare(self) -> None:
        """Create the method's own data for one run, before masks are loaded or made."""

    def clock_starts(self, group: MaskGroup) -> None:
        """A new run begins with the masks of an earlier one; set when ``group`` was last updated."""
        group.updated_at = self.step - 1

    def updates_now(self, group: MaskGroup) -> bool:
        """Whether the weights of ``group`` are about to be ranked, so that they must be correct."""
        return False

    def on_batch(self, batch: Any) -> None:
        """Read a batch before ``training_step`` gets it; it is on the module's device."""

    def on_loss(self, group: MaskGroup, loss: Tensor) -> None:
        """Read the loss of a batch before its backward pass; autograd is on."""

    def masks_are_on(self) -> None:
        """The initial masks have been applied."""

    def group_changed(self, group: MaskGroup) -> None:
        """The weights of ``group`` now belong to its optimizer; some of them may be new."""

    def weights_added(self, group: MaskGroup, weights: Sequence[MaskedWeight]) -> None:
        """New weights of the module have joined ``group``, all active."""

    def mask_of_thawed(self, name: str) -> Tensor | None:
        """The mask of a weight that was frozen when masks were made and is trainable now; None leaves it dense."""
        return None

    @property
    def masks_what_thaws(self) -> bool:
        """Whether the method has masks for frozen weights, so that it may begin with all weights frozen."""
        return type(self).mask_of_thawed is not Method.mask_of_thawed

    def companions(self) -> Sequence[pl.Callback]:
        """Callbacks that belong to the method; they are inserted right behind it in the Trainer's list."""
        return ()

    def extra_metrics(self) -> dict[str, float]:
        """Metrics to log at the end of an epoch besides sparsity; equal on every rank."""
        return {}

    def training_ended(self) -> None:
        """Training has ended; warn the user if something went wrong."""

    # What a user reads.

    @property
    def run(self) -> Run:
        """The training that is running, or the last one.

        Raises:
            RuntimeError: There was none.
        """
        if self.last_run is None:
            raise RuntimeError(
                f"{type(self).__name__} has not trained a module in this process; call fit first. {ELSEWHERE}."
            )
        return self.last_run

    @property
    def registry(self) -> MaskRegistry:
        """The masks of the module, by parameter name, including those of other methods.

        Empty before training, and in a process that only started those that train, as under ``ddp_fork``.
        """
        return MaskRegistry() if self.last_run is None else self.last_run.registry

    @property
    def groups(self) -> Sequence[MaskGroup]:
        """The weights of this method, one group for each optimizer that steps some of them."""
        return () if self.last_run is None else self.last_run.groups

    @property
    def weights(self) -> list[MaskedWeight]:
        """The weights of this method."""
        return [weight for group in self.groups for weight in group]

    @property
    def dense(self) -> Sequence[Candidate]:
        """The parameters of the module that this method leaves dense, each with its reason."""
        return () if self.last_run is None else self.last_run.plan.dense

    @property
    def inherited(self) -> Mapping[str, Tensor]:
        """The masks that this training began with because another method had left them, by parameter name."""
        return {} if self.last_run is None else self.last_run.beginning.inherited

    @property
    def progress(self) -> float:
        """The progress from the first update to the last or, without update times, through training, in [0, 1]."""
        if self.last_run is None:
            return 0.0
        times = self.last_run.timetable
        return self.last_run.progress(self.step) if times is None else times.progress(self.step)

    @property
    @override
    def state_key(self) -> str:
        return self._state_key

    def settings(self) -> str:
        """All arguments of the method; two methods with equal settings do the same."""
        return ", ".join(f"{item.name}={_in_full(getattr(self, item.name))}" for item in dataclasses.fields(self))

    def __repr__(self) -> str:
        shown = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in dataclasses.fields(self)
            if getattr(self, item.name, None) != item.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    # Shared by the families.

    @final
    def be_patient(self, group: MaskGroup) -> None:
        """Call this if gradients of ``group``, or what a method derives from them, are not finite.

        It raises after 100 such steps in a row.

        Raises:
            RuntimeError: It has.
        """
        group.not_finite_for += 1
        if group.not_finite_for >= _PATIENCE:
            names = [weight.name for weight in group if not all_finite([weight.grad])]
            whose = f"The gradients of {enumerated(names)}"
            if not names:  # all that this process has are finite
                whose = f"Gradients of another process, or what {type(self).__name__} computes from gradients,"
            raise RuntimeError(
                f"{whose} were inf or NaN at {_PATIENCE} steps in a row, and masks never change on such gradients."
                " Training has diverged: lower the learning rate, clip gradients (gradient_clip_val), or look for the"
                " loss that is not finite with Trainer(detect_anomaly=True)."
            )

    @final
    def warn_once(self, message: str) -> None:
        """Warn, once per run; ``message`` is a sentence without its full stop."""
        if message not in self.run.warned:
            self.run.warned.add(message)
            rank_zero_warn(f"{type(self).__name__} at step {self.step}: {message}.")


def _in_full(value: object) -> str:
    """A setting as text, without parts that may differ between two processes with equal settings."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {int(content_hash(value)):x}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_in_full(item)}" for name, item in value.items())
    if isinstance(value, pl.Callback) or type(value).__repr__ is object.__repr__:  # as a schedule of a user's own
        public = {
            name: item
            for name, item in getattr(value, "__dict__", {}).items()
            if isinstance(item, str | int | float | tuple | None)
        }
        return f"{type(value).__name__}({_in_full({k: v for k, v in public.items() if not k.startswith('_')})})"
    return without_addresses(repr(value))


def without_addresses(text: str) -> str:
    """A representation without addresses in memory, as that of a function has: the same in every process."""
    return _ADDRESS.sub("", text)
