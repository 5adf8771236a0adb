r"""DST: dynamic sparse training with trainable thresholds.

Paper:  Liu et al., "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers",
        ICLR 2020, https://arxiv.org/abs/2005.06870
Code:   https://github.com/junjieliu2910/DynamicSparseTraining
Differs from the paper and the authors' code:
    - No layer is replaced: gradients are rewritten in closed form, equal to autograd's through the masked layers.
    - The reset of thresholds, which guards against collapse, is only in the authors' code, in the forward pass of
      linear and convolutional layers. Here it happens when masks are renewed, never in evaluation; resets are counted
      and reported.
    - A weight of exactly 0 gets no gradient and stays pruned for good. A layer that is all zero, as LoRA's B is at
      first, has thresholds just below 0 here until its weights change, so that its gradient reaches it.
    - Thresholds take no step on a gradient that is inf or NaN (the authors' issue 2 reports NaN late in VGG training),
      and their gradients are not clipped.
    - If other code writes into a masked weight between steps, the dense copy overwrites that at the next step.
    - ``sparsity=`` is not in the paper. It adjusts alpha, and limits the gradient of the loss with respect to a
      threshold to the largest alpha that it may give, so that a strong pull of the loss cannot undo the pruning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast, final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_sparse.functional.thresholds import threshold_gradients_, threshold_mask, threshold_penalty
from lightning_sparse.masks.candidate import Candidate
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.layout import Layout, is_sharded
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.masks.schema import Check, any_of, mapping_of, names, record, refuse, whole, wrong_names
from lightning_sparse.masks.weight import MaskedWeight
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.latent import LatentMethod
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.steering import STEERING_FIELDS, Steering
from lightning_sparse.schedules import as_number

__all__ = ["DST"]

_TOLERANCE = 0.005  # of a sparsity that is asked for
_LARGEST_ALPHA = 0.1  # what is larger was probably meant to be a sparsity


@final
@method
class DST(LatentMethod):
    r"""Dynamic sparse training: each neuron, filter or gate row learns its own pruning threshold.

    With thresholds :math:`t` and masks :math:`M_{ij} = [\,|W_{ij}| > t_i\,]`, the loss :math:`L(W \odot M)` is trained
    together with

    .. math:: J = L + \alpha \sum_{\text{layers}} \sum_i e^{-t_i}

    where :func:`~lightning_sparse.functional.thresholds.long_tailed_estimator` replaces the derivative of the step
    function. A pruned weight keeps its value, receives the structure gradient, and can become active again. Thresholds
    begin at 0, so the network begins dense. A second optimizer, of the same class and settings as the weights', steps
    the thresholds, including weight decay.

    The masks are renewed at every step. If at most one hundredth of a layer's weights is active, its thresholds are
    reset, unless the layer is recurrent (``reset_sparsity``).

    Measured with LeNet-300-100 on MNIST at 90, 95, 98 and 99 % (4 epochs, mean of three seeds): 97.7, 97.5, 97.1 and
    96.3 %; dense 98.0 %. It loses to no baseline. These runs use ``sparsity=``. ``python -m benchmarks.evidence --only
    lenet300 DST`` trains it. On a small CNN it loses to a baseline at 99 % with BatchNorm.

    Raises:
        ValueError: Neither or both of alpha and sparsity are given, or one is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_sparse import DST
        >>> from lightning_sparse.zoo import Classifier, DigitsDataModule, LeNet300100
        >>> dst = DST(alpha=5e-4)
        >>> trainer = L.Trainer(max_steps=20, callbacks=[dst], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(Classifier(LeNet300100(in_features=64)), DigitsDataModule())
        >>> dst.thresholds["network.fc1.weight"].shape
        torch.Size([300])

    References:
        Liu et al., `Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers
        <https://arxiv.org/abs/2005.06870>`_, ICLR 2020.

    Warning:
        Without ``sparsity=`` the method has no target: the sparsity reached depends on alpha, the number of neurons,
        the learning rate and the length of training.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Liu et al.",
        title="Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers",
        venue="ICLR 2020",
        url="https://arxiv.org/abs/2005.06870",
    )
    needs_dense_gradients: ClassVar[bool] = True

    alpha: float | None = field(
        default=None,
        kw_only=False,
        metadata=doc(
            "Strength of the regulariser, at least 0; it alone decides how sparse the network becomes. The authors'"
            " values: 5e-4 for the LeNets, 5e-6 for VGG-16 on CIFAR-10."
        ),
    )
    sparsity: float | None = field(
        default=None,
        metadata=doc(
            "Instead of alpha, the final sparsity, in [0, 1). Alpha is then adjusted during training, so that sparsity"
            " follows a cubic for the first 70 % of training and then stays; what the loss adds to a threshold's"
            " gradient is limited to the largest alpha at that time."
        ),
    )
    reset_sparsity: float | None = field(
        default=None,
        metadata=doc(
            "A layer's thresholds are reset once its sparsity reaches this value, in (0, 1]; a value above 1 means"
            " never. The default is that of the authors' code, 0.99, and never in recurrent layers. If ``sparsity`` is"
            " above 0.9, the default is ``1 - 0.1 * (1 - sparsity)``."
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.alpha is None) == (self.sparsity is None):
            raise ValueError(
                f"alpha is {self.alpha} and sparsity is {self.sparsity}; give one of them: alpha (the paper, for"
                " example 5e-4), or the sparsity to end with (for example 0.95)."
            )
        self.alpha = 0.0 if self.alpha is None else _checked_alpha(self.alpha)
        self.sparsity = None if self.sparsity is None else Steering(self.sparsity).sparsity
        given = self.reset_sparsity
        if given is not None and not (_is_number(given) and given > 0.0):
            raise ValueError(
                f"reset_sparsity is {self.reset_sparsity!r}; give a number above 0; above 1 means no resets."
            )

    @property
    def thresholds(self) -> Mapping[str, nn.Parameter]:
        """The thresholds of each weight, one for each of its rows, by name; empty before training."""
        return self.parameters

    @property
    def resets(self) -> Mapping[str, int]:
        """How often the thresholds of each weight were reset, by name."""
        return {} if self.last_run is None else self._own.resets

    @property
    def _own(self) -> _Own:
        return cast("_Own", self._kept.own)

    @override
    def prepare(self) -> None:
        super().prepare()
        self._kept.own = _Own(None if self.sparsity is None else Steering(self.sparsity))

    @override
    def refuses(self, candidate: Candidate, *, is_last: bool) -> str:
        if candidate.input_first and is_sharded(candidate.parameter):
            return (
                "sharded: it stores its inputs first, and DST has a threshold for each output; leave it out of"
                " fully_shard, or use another method for it"
            )
        return super().refuses(candidate, is_last=is_last)

    @override
    def learned(self, weight: MaskedWeight) -> Tensor:
        self._own.resets[weight.name] = 0
        dtype = torch.promote_types(weight.value.dtype, torch.float32)  # steps of 1e-5 vanish in a half
        return torch.zeros(weight.rows(weight.value).shape[0], dtype=dtype, device=weight.value.device)

    @override
    def layout_of_learned(self, weight: MaskedWeight) -> Layout:
        return weight.rows_layout

    @override
    def new_mask(self, weight: MaskedWeight, latent: Tensor) -> Tensor:
        return weight.from_rows(threshold_mask(weight.rows(latent), self.thresholds[weight.name]))

    @override
    def rewrite_gradient(self, weight: MaskedWeight, latent: Tensor, scale: float) -> None:
        grad, threshold = weight.grad, self.thresholds[weight.name]
        assert self.alpha is not None
        rows, alpha = weight.rows(grad), self.alpha * scale
        steering = self._own.steering
        if steering or weight.cuts_rows:
            pull = threshold_gradients_(rows, weight.rows(latent), threshold, alpha=0.0)
            pull = weight.sum_rows(pull) if weight.cuts_rows else pull  # the regulariser's part is added once
            if steering:  # so that full strength prevails: BatchNorm multiplies the pull on an empty neuron by hundreds
                pull = pull.clamp(-steering.scale * scale, steering.scale * scale)
            threshold_grad = pull - alpha * torch.exp(-threshold.detach())
        else:
            threshold_grad = threshold_gradients_(rows, weight.rows(latent), threshold, alpha)
        if rows.data_ptr() != grad.data_ptr():  # its rows do not lie in order in memory
            grad.copy_(weight.from_rows(rows))
        self._give_gradient(weight, threshold_grad.to(threshold.dtype) / scale)

    @override
    def without_gradient(self, weight: MaskedWeight, scale: float) -> None:
        assert self.alpha is not None
        self._give_gradient(weight, -self.alpha * torch.exp(-self.thresholds[weight.name]))  # the regulariser's

    def _give_gradient(self, weight: MaskedWeight, grad: Tensor) -> None:
        self.thresholds[weight.name].grad = torch.zeros_like(grad) if weight.name in self._own.unmoved else grad

    @override
    def masks_renewed(self, group: MaskGroup) -> None:
        group.each(self._keep_alive)
        self._tell_of_resets(ended=False)
        steering, total = self._own.steering, self.run.total_steps
        if steering and group is self.groups[-1]:
            steering.observe(self.actual_sparsity(), self.progress, 1.0 / total)
            self.alpha = steering.alpha

    def _keep_alive(self, weight: MaskedWeight) -> None:
        if weight.num_active == 0 or weight.name in self._own.unmoved:
            self._let_wake(weight)
        if weight.sparsity >= self._resets_from(weight):
            self._reset(weight)

    def _resets_from(self, weight: MaskedWeight) -> float:
        """The sparsity of a layer from which on its thresholds are reset."""
        if self.reset_sparsity is not None:
            return self.reset_sparsity
        if isinstance(weight.candidate.owner, nn.RNNBase | nn.RNNCellBase):
            return math.inf
        # A network that is asked to be sparser than 90 % may have layers of more than 99 %.
        return max(0.99, 1.0 - (1.0 - (self.sparsity or 0.0)) / 10.0)

    def _let_wake(self, weight: MaskedWeight) -> None:
        """Let the next gradient reach a layer that is all zero: thresholds of 0 would keep it so."""
        if weight.count(self.latent(weight) != 0):
            self._own.unmoved.discard(weight.name)
        else:
            self._own.unmoved.add(weight.name)
            threshold = self.thresholds[weight.name]
            threshold.fill_(-torch.finfo(threshold.dtype).tiny)
            self.renew(weight)

    def _reset(self, weight: MaskedWeight) -> None:
        if not weight.count_rows(self.thresholds[weight.name].detach() != 0):
            return  # nothing to undo: the weights themselves are zero
        if self.resets[weight.name] == 0:
            zeros = 1.0 - weight.count(self.latent(weight) != 0) / weight.numel
            if zeros < self._resets_from(weight):
                self._own.collapsed[weight.name] = weight.sparsity
            else:
                self._own.zeros[weight.name] = zeros
        self._own.resets[weight.name] += 1
        self.thresholds[weight.name].zero_()
        self.renew(weight)

    def _tell_of_resets(self, *, ended: bool) -> None:
        """Name the layers that were reset for the first time: the first of them at once, the others at the end."""
        own = self._own
        collapsed, zeros = own.collapsed, own.zeros
        if collapsed and (ended or not own.is_told):
            have = "has" if len(collapsed) == 1 else "have"
            least = min(collapsed.values())
            rank_zero_warn(
                f"DST: {enumerated(collapsed)} {have} collapsed to sparsity {least:.4f}{' and more' * (have != 'has')}"
                f" {'by' if ended else 'at'} step {self.step}; thresholds are reset to 0."
                f" {'A lower alpha' if self.sparsity is None else 'Longer training, or a lower sparsity=,'} avoids"
                " this. Later resets are counted in masks/threshold_resets."
            )
            collapsed.clear()
            own.is_told = True
        if zeros:
            shown = enumerated(f"{share:.4f} of {name}" for name, share in zeros.items())
            limit = min(self._resets_from(weight) for weight in self.weights if weight.name in zeros)
            rank_zero_warn(
                f"DST: {shown} is zero already, whatever its thresholds, so at reset_sparsity {limit:g} they are reset"
                " to 0 at every step and learn nothing; a lower alpha does not help. Give a larger reset_sparsity, or"
                " leave the layer out with exclude= and give it to FixedMask."
            )
            zeros.clear()

    @override
    def timetable(self, total_steps: float) -> None:
        if self.sparsity is not None and math.isinf(total_steps):
            raise ValueError(
                f"DST(sparsity={self.sparsity}) steers towards the end of training, but the Trainer has no"
                " known end (max_epochs=-1 without max_steps, or a data loader without length). Set max_epochs or"
                " max_steps, or give alpha instead."
            )

    @override
    def target_sparsity(self, name: str | None = None) -> float:
        if name is None and self.sparsity is not None:
            return Steering(self.sparsity).target(self.progress) if self.last_run is None else self._target()
        return super().target_sparsity(name)

    def _target(self) -> float:
        assert self._own.steering is not None
        return self._own.steering.target(self.progress)

    @override
    def extra_metrics(self) -> dict[str, float]:
        penalty = sum(
            float(weight.rows_layout.sum(threshold_penalty(self.thresholds[weight.name].detach())))
            for weight in self.weights
        )
        alpha = self.alpha or 0.0
        return {
            "dst/alpha": alpha,
            "dst/penalty": alpha * penalty,
            "masks/threshold_resets": float(sum(self.resets.values())),
        }

    @override
    def training_ended(self) -> None:
        self._tell_of_resets(ended=True)
        actual = self.actual_sparsity()
        if self.sparsity is not None and abs(self.sparsity - actual) > _TOLERANCE:
            end = self.run.origin + self.run.total_steps
            rank_zero_warn(
                f"DST: training ended at sparsity {actual:.4f} instead of {self.sparsity}, at step {self.step} of"
                f" {end:g}. Train {'to the end, longer,' if self.step < end else 'longer'} or with a larger learning"
                " rate, which the thresholds share with the weights."
            )

    @override
    def own_state(self) -> dict[str, Any]:
        steering = self._own.steering
        return {
            "resets": dict(self.resets),
            "unmoved": sorted(self._own.unmoved),
            "steering": {} if steering is None else steering.state(),
        }

    @override
    def own_fields(self) -> Mapping[str, Check]:
        steering = any_of(record({}), record(STEERING_FIELDS))
        return {"resets": mapping_of(whole()), "unmoved": names, "steering": steering}

    @override
    def load_own_state(self, state: Mapping[str, Any]) -> None:
        if fault := wrong_names(state["resets"], self._own.resets):
            refuse(f"The checkpoint is damaged: its record of resets {fault}")
        self._own.resets |= state["resets"]
        self._own.unmoved |= set(state["unmoved"])
        steering = self._own.steering
        if steering is None:
            return
        if self.run.beginning.goes_on and state["steering"]:
            steering.load(state["steering"])
        else:
            steering.begin_at(self.actual_sparsity())
        self.alpha = steering.alpha


@dataclass
class _Own:
    """What DST keeps for one training.

    Attributes:
        steering: How alpha is steered.
        resets: How often the thresholds of each weight were reset.
        unmoved: Weights that have been all zero since training began; their thresholds wait.
        collapsed: The sparsity at their first reset of those that are yet to be told of.
        zeros: The share of zeros in those, yet to be told of, that are reset because of it.
        is_told: Whether layers that have collapsed were told of before.
    """

    steering: Steering | None
    resets: dict[str, int] = field(default_factory=dict[str, int])
    unmoved: set[str] = field(default_factory=set[str])
    collapsed: dict[str, float] = field(default_factory=dict[str, float])
    zeros: dict[str, float] = field(default_factory=dict[str, float])
    is_told: bool = False


def _checked_alpha(alpha: Any) -> float:
    if not (_is_number(alpha) and alpha >= 0.0 and math.isfinite(alpha)):
        raise ValueError(
            f"alpha is {alpha!r}; give the strength of a regulariser, a number of at least 0, such as 5e-4."
        )
    if alpha > _LARGEST_ALPHA:
        hint = f" For a sparsity, DST(sparsity={alpha:g})." if alpha < 1.0 else ""
        rank_zero_warn(f"DST: alpha is {alpha:g}; the authors use 5e-4.{hint}")
    return float(as_number(alpha))


def _is_number(value: object) -> bool:
    plain = as_number(value)
    return isinstance(plain, int | float) and not isinstance(plain, bool)
