"""AC/DC: alternating compressed and decompressed training.

Paper:  Peste et al., "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks", NeurIPS 2021,
        https://arxiv.org/abs/2106.12379
Code:   https://github.com/IST-DASLab/ACDC
Differs from the authors' code:
    - Phases are counted in optimizer steps; there in epochs. The defaults are those of 100 epochs on ImageNet.
    - When a dense phase begins, the weights that become active have cleared first moments, and second moments at the
      mean of the survivors'. The survivors keep their momentum; the authors' code resets it.
    - Every layer is masked; leave some out with ``exclude``.
"""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, final

from typing_extensions import override

from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.scored import Allocation, ScoredMethod
from lightning_sparse.schedules import Duration, Schedule, UpdateTimes

__all__ = ["ACDC"]


@final
@method
class ACDC(ScoredMethod):
    r"""Alternating compressed and decompressed training: dense and sparse phases take turns, and the last is sparse.

    When a sparse (compressed) phase begins, the :math:`\lfloor (1 - s) N \rfloor` largest :math:`|w|` of all :math:`N`
    weights stay active, and the masks do not change until the phase ends. When a dense phase begins, every weight is
    active again; those that were pruned start at zero.

    ::

        0 ── start ── + update_every ── + 2 update_every ── … ── last_dense ── stop ── end
        dense  │ sparse      │ dense           │ sparse     …        │ dense    │ sparse

    :math:`s` is ``sparsity``. On CIFAR the authors use ``start=0.05, update_every=0.1``.

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 97.2, 96.6, 95.4 and
    93.6 %; dense 98.0 %. It loses to one-shot magnitude pruning with fine-tuning at 90 and 95 %, by 0.3 and 0.4 points,
    and beats it at 99 %. ``python -m benchmarks.evidence --only lenet300 ACDC`` trains it. On a small CNN it loses to a
    baseline at 98 and 99 % with BatchNorm, and at 98 % without.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import ACDC
        >>> acdc = ACDC(sparsity=0.75)
        >>> trainer = L.Trainer(max_steps=40, callbacks=[acdc], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> acdc.registry
        MaskRegistry(1 weights, sparsity=0.7500)

    References:
        Peste et al., `AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks
        <https://arxiv.org/abs/2106.12379>`_, NeurIPS 2021.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Peste et al.",
        title="AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks",
        venue="NeurIPS 2021",
        url="https://arxiv.org/abs/2106.12379",
    )
    begins_dense: ClassVar[bool] = True

    sparsity: float | Schedule = field(
        kw_only=False, metadata=doc("Sparsity of the sparse phases, a number in [0, 1).")
    )
    allocation: Allocation = field(
        default="global", metadata=doc('Which weights are ranked together: all (``"global"``), or those of a layer.')
    )
    update_every: Duration = field(
        default=0.05, metadata=doc("Length of a phase; ``int`` = optimizer steps, ``float`` = fraction of training.")
    )
    start: Duration = field(default=0.1, metadata=doc("Time at which the first sparse phase begins."))
    last_dense: Duration = field(default=0.75, metadata=doc("Time at which the last dense phase begins."))
    stop: Duration = field(default=0.85, metadata=doc("Time of the last sparse phase, which does not end."))

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, Schedule):
            raise ValueError(f"sparsity is {self.sparsity}; AC/DC has phases of its own: give a number in [0, 1).")
        super().__post_init__()
        if type(self.last_dense) is type(self.stop) and self.last_dense > self.stop:
            raise ValueError(
                f"last_dense ({self.last_dense}) comes after stop ({self.stop}), at which the last sparse phase begins."
                " Give an earlier last_dense."
            )

    @property
    @override
    def times(self) -> UpdateTimes:
        phases = UpdateTimes(every=self.update_every, start=self.start, stop=self.last_dense)
        return UpdateTimes(every=self.update_every, start=self.stop, stop=self.stop, before=phases)

    @property
    @override
    def sparsity_now(self) -> float:
        assert isinstance(self.sparsity, Schedule)
        return self.sparsity(1.0) if self.is_compressed else 0.0

    @property
    def is_compressed(self) -> bool:
        """Whether this is a sparse phase."""
        times = None if self.last_run is None else self.last_run.timetable
        latest = None if times is None else times.latest(self.step)
        if times is None or latest is None:
            return False
        phases = times.before
        if phases is None or latest >= times.stop:
            return True
        # Compressions and decompressions take turns, and last_dense is one of the latter.
        return latest < phases.stop and (latest - phases.start) // phases.every % 2 == 0
