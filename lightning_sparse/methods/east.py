"""EAST: extreme adaptive sparse training.

Paper:  Li et al., "Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning", TMLR 2025,
        https://arxiv.org/abs/2411.13545
Code:   https://github.com/TensorStrike/ES2
Differs from the authors' code, or is chosen where paper and code say nothing certain:
    - The paper's cycles are not known: their number, length and height are the defaults of the code. So is the interval
      of updates within a cycle (100 steps of some 88 000 there, a thousandth of training here).
    - Masks are updated before the optimizer's step, on its gradients; there after it.
    - Erdős–Rényi–Kernel budgets are solved exactly: what a full layer cannot hold goes to the others. There it is lost,
      and no layer is sparser than a hundredth of the density asks for.
    - Weights that sharing saves are counted by the modules that use them; the code's current density counts copies and
      its target does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, final

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_sparse.masks.registry import MaskedWeight
from lightning_sparse.methods.budgets import LayerAllocation
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.prune_and_grow import PruneAndGrow
from lightning_sparse.modules import DyReLUPhasing, WeightSharing
from lightning_sparse.schedules import Constant, Cosine, CycleShape, Cyclic, Duration, Schedule, UpdateTimes

__all__ = ["EAST"]


@final
class EAST(PruneAndGrow):
    r"""Extreme adaptive sparse training: RigL that explores for long, with three helps for 99.9 % and more.

    - **DyReLU phasing**: activations begin as Dynamic ReLUs and end as ReLUs; see
      :class:`~lightning_sparse.modules.DyReLUPhasing`.
    - **Weight sharing**: in residual stages later blocks reuse an earlier block's convolutions, so that the same number
      of weights is spread over fewer places; see :class:`~lightning_sparse.modules.WeightSharing`.
    - **Cyclic sparsity**: before the usual exchange begins, density rises to ``multiplier`` times its value and falls
      back, ``cycles`` times; see :class:`~lightning_sparse.schedules.Cyclic`. Weights are grown by the dense gradient
      and pruned by magnitude, to exact budgets for each layer.

    The parts are callbacks and a schedule of their own and work with the other methods too: for example
    ``[FGGP(0.99), DyReLUPhasing()]`` or ``RigL(Cyclic(0.99))``.

    The authors train with SGD (Nesterov 0.9, learning rate 0.1, a tenth of it after 1/2 and 3/4, weight decay 1e-4),
    batch 128, 250 epochs, and clip the gradients' norm to 1.

    To find the channels of each ReLU, phasing takes a first training batch, which a data set that can be iterated over
    only once has lost when training begins; a module's ``example_input_array`` avoids this.

    Args:
        sparsity: Sparsity, in [0, 1), of the masked weights together, each use of a shared one counted; between cycles
            and at the end it is exact.
        cycles: Number of cycles; 0 for none.
        cycle_length: Length of the first, as a fraction of the time to ``stop``.
        cycle_growth: How many times longer each cycle is than the one before.
        multiplier: How many times as many weights are active in the middle of a cycle, at least 1.
        cycle_shape: ``"cosine"`` or ``"triangular"``.
        cycle_update_every: Time between updates while cycles last; ``int`` = optimizer steps, ``float`` = fraction of
            training, 10 steps at least.
        phasing: Whether ReLUs are phased; or the callback, to set its arguments.
        sharing: Whether weights are shared; or the callback, to set its arguments.
        allocation: How the budget is shared among layers.
        drop_fraction: Fraction of a layer's active weights that an exchange drops, or a schedule of it.
        update_every: Time between exchanges after the cycles: 4000 steps of some 88 000 in the code.
        stop: Time after which the masks stay; ``int`` = optimizer steps, ``float`` = fraction of training.
        regrow: Whether a weight that the update has just pruned may be grown by it; its value is then kept.
        min_active: Weights that every layer holds at least.
        include: Patterns of what is masked; see :func:`~lightning_sparse.masks.select_weights`.
        exclude: Patterns of what stays dense.
        seed: Seed of the initial masks.

    Raises:
        ValueError: An argument is out of its range, or a part is neither a ``bool`` nor its callback.

    Example:
        >>> import lightning as L
        >>> from lightning_sparse import EAST
        >>> from lightning_sparse.zoo import Classifier, DigitsDataModule, LeNet300100
        >>> east = EAST(sparsity=0.99, sharing=False)
        >>> trainer = L.Trainer(max_steps=40, callbacks=[east], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Classifier(LeNet300100(in_features=64)), DigitsDataModule())
        >>> east.registry
        MaskRegistry(3 weights, sparsity=0.9900)

    References:
        Li et al., `Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning
        <https://arxiv.org/abs/2411.13545>`_, TMLR 2025.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Li et al.",
        title="Pushing the Limits of Sparsity: A Bag of Tricks for Extreme Pruning",
        venue="TMLR 2025",
        url="https://arxiv.org/abs/2411.13545",
    )
    needs_dense_gradients: ClassVar[bool] = True

    def __init__(
        self,
        sparsity: float,
        *,
        cycles: int = 2,
        cycle_length: float = 0.2,
        cycle_growth: float = 1.0,
        multiplier: float = 3.0,
        cycle_shape: CycleShape = "cosine",
        cycle_update_every: Duration = 0.001,
        phasing: bool | DyReLUPhasing = True,
        sharing: bool | WeightSharing = True,
        allocation: LayerAllocation = "erk",
        drop_fraction: float | Schedule = Cosine(0.5, 0.005),  # noqa: B008  # frozen
        update_every: Duration = 0.045,
        stop: Duration = 1.0,
        regrow: bool = True,
        min_active: int = 1,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        _check_part("phasing", phasing, DyReLUPhasing)
        _check_part("sharing", sharing, WeightSharing)
        cyclic = before = None
        UpdateTimes(every=update_every, stop=stop)  # refuses what are no durations
        if cycles:
            _check_number("sparsity", sparsity)
            cyclic = Cyclic(sparsity, cycles, cycle_length, cycle_growth, multiplier, cycle_shape)
            end = min(1.0, cyclic.end) * stop  # a sum of fractions may be a little above 1, or above a whole step
            if isinstance(stop, int):
                end = math.ceil(end - 1e-6)  # the first step at which the last cycle is over
            before = UpdateTimes(every=cycle_update_every, stop=end, least=10)
        super().__init__(
            sparsity if cyclic is None else cyclic,
            allocation=allocation,
            drop_fraction=drop_fraction,
            update_every=update_every,
            stop=stop,
            regrow=regrow,
            update_replaces_step=False,
            min_active=min_active,
            include=include,
            exclude=exclude,
            seed=seed,
            before=before,
        )
        self.phasing = DyReLUPhasing(seed=seed) if phasing is True else phasing or None
        self.sharing = WeightSharing(seed=seed) if sharing is True else sharing or None

    @override
    def companions(self) -> list[pl.Callback]:
        return [part for part in (self.sharing, self.phasing) if part is not None]

    @override
    def grow_scores(self, weight: MaskedWeight) -> Tensor:
        return weight.grad.abs()


def _check_number(name: str, value: object) -> None:
    plain: object = Constant(value).value  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        hint = " The cycles are its schedule; a schedule of your own needs cycles=0." if callable(value) else ""
        raise ValueError(f"{name} is {value!r}; give a number, a fraction in [0, 1).{hint}")


def _check_part(name: str, value: object, kind: type[pl.Callback]) -> None:
    if not isinstance(value, bool | kind):
        shown = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise ValueError(f"{name} is {shown}; give True, False, or the callback, such as {kind.__name__}().")
