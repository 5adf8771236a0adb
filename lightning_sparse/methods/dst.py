r"""DST: dynamic sparse training with trainable thresholds.

Paper:  Liu et al., "Dynamic Sparse Training: Find Efficient Sparse Network From Scratch With Trainable Masked Layers",
        ICLR 2020, https://arxiv.org/abs/2005.06870
Code:   https://github.com/junjieliu2910/DynamicSparseTraining
Differs from the paper and the authors' code:
    - No layer is replaced: gradients are rewritten in closed form, equal to autograd's through the masked layers.
    - The guard against collapse stands in the code alone, within the forward of linear and convolution layers. Here it
      acts when masks are renewed, never in evaluation, on recurrent layers too, and it is counted and named.
    - Thresholds take no step on a gradient that is inf or NaN (the authors' issue 2 tells of NaN late in VGG training),
      and their gradients are not clipped.
    - What other code writes into a masked weight between steps is overwritten by the dense copy at the next step.
    - ``sparsity=``, which steers alpha, is not the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_sparse.functional.masks import count_true
from lightning_sparse.functional.thresholds import threshold_gradients_, threshold_mask, threshold_penalty
from lightning_sparse.masks.registry import MaskedWeight, MaskGroup
from lightning_sparse.methods.latent import LatentMethod
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.steering import Steering
from lightning_sparse.schedules import Constant

__all__ = ["DST"]

_TOLERANCE = 0.005  # of a sparsity that is asked for
_LARGEST_ALPHA = 0.1  # what is larger was probably meant to be a sparsity


@final
class DST(LatentMethod):
    r"""Dynamic sparse training: each neuron, filter or gate row learns the threshold below which its weights sleep.

    With thresholds :math:`t` and masks :math:`M_{ij} = [\,|W_{ij}| > t_i\,]`, the loss :math:`L(W \odot M)` is trained
    together with

    .. math:: J = L + \alpha \sum_{\text{layers}} \sum_i e^{-t_i}

    where :func:`~lightning_sparse.functional.thresholds.long_tailed_estimator` stands in for the step's derivative.
    A sleeping weight keeps its value, receives the structure gradient, and can wake. Thresholds begin at 0, the network
    dense; an optimizer of the class and the settings of the weights' own steps them, weight decay included.

    Acts at every step. A layer of which at most one hundredth is left has its thresholds reset (``reset_sparsity``).

    Args:
        alpha: Strength of the regulariser, at least 0; it alone decides how sparse the network becomes. The authors'
            values: 5e-4 for the LeNets, 5e-6 for VGG-16 on CIFAR-10.
        sparsity: Instead of alpha, the sparsity to end with, in [0, 1): alpha is steered while training, so that
            sparsity follows a cubic until seven tenths of it and then stays.
        reset_sparsity: The sparsity of a layer, in (0, 1], from which on its thresholds are reset; above 1 never. By
            default 0.99, as in the authors' code, or, where ``sparsity`` is above 0.9, a tenth of its density.
        include: Patterns of what is masked; see :func:`~lightning_sparse.masks.select_weights`.
        exclude: Patterns of what stays dense.

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

    def __init__(
        self,
        alpha: float | None = None,
        *,
        sparsity: float | None = None,
        reset_sparsity: float | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        if (alpha is None) == (sparsity is None):
            raise ValueError(
                f"alpha is {alpha} and sparsity is {sparsity}; give one of them: alpha (the paper, for example 5e-4),"
                " or the sparsity to end with (for example 0.95)."
            )
        if alpha is not None and not (_is_number(alpha) and alpha >= 0.0 and math.isfinite(alpha)):
            raise ValueError(
                f"alpha is {alpha!r}; give the strength of a regulariser, a number of at least 0, such as 5e-4."
            )
        if reset_sparsity is not None and not (_is_number(reset_sparsity) and reset_sparsity > 0.0):
            raise ValueError(f"reset_sparsity is {reset_sparsity!r}; give a number above 0, or above 1 for none.")
        if alpha is not None and alpha > _LARGEST_ALPHA:
            hint = f" For a sparsity, DST(sparsity={alpha:g})." if alpha < 1.0 else ""
            rank_zero_warn(f"DST: alpha is {alpha:g}; the authors use 5e-4.{hint}")
        super().__init__(include=include, exclude=exclude, seed=0)
        self._fixed_alpha = alpha
        self._steering = None if sparsity is None else Steering(sparsity)
        self.sparsity = self._steering.sparsity if self._steering else None
        # A network that is asked to be sparser than 90 % may have layers of more than 99 %.
        self.reset_sparsity = (
            max(0.99, 1 - (1 - (self.sparsity or 0.0)) / 10) if reset_sparsity is None else reset_sparsity
        )
        self.thresholds: dict[str, nn.Parameter] = {}
        self.resets: dict[str, int] = {}
        self._optimizers: list[Optimizer] = []
        self._total_steps = math.inf

    @property
    def alpha(self) -> float:
        """The strength of the regulariser now."""
        return self._steering.alpha if self._steering else float(self._fixed_alpha or 0.0)

    @override
    def begin(self, group: MaskGroup) -> None:
        if group is self.groups[0]:
            self.thresholds, self.resets, self._optimizers = {}, {}, []
            self._steering = None if self.sparsity is None else Steering(self.sparsity)
            self._total_steps = math.inf  # until resolve_times knows those of this training
        for weight in group:
            rows = weight.rows(weight.parameter).shape[0]
            dtype = torch.promote_types(weight.parameter.dtype, torch.float32)  # steps of 1e-5 vanish in a half
            zeros = torch.zeros(rows, dtype=dtype, device=weight.parameter.device)
            self.thresholds[weight.name] = nn.Parameter(zeros)
            if not self.latent(weight).any():
                rank_zero_warn(
                    f"DST: {weight.name} is all zero, and DST cannot wake what has no magnitude. Initialize it, or"
                    " leave it out with exclude=."
                )
            self.resets[weight.name] = 0
        self._optimizers.append(_twin_optimizer(group, self.thresholds))

    @override
    def rewrite_gradient(self, weight: MaskedWeight, latent: Tensor, scale: float) -> None:
        grad = weight.parameter.grad
        assert grad is not None
        threshold = self.thresholds[weight.name]
        rows = weight.rows(grad)
        threshold_grad = threshold_gradients_(rows, weight.rows(latent), threshold, self.alpha * scale)
        if rows.data_ptr() != grad.data_ptr():  # its rows do not lie in order in memory
            grad.copy_(weight.from_rows(rows))
        threshold.grad = threshold_grad.to(threshold.dtype) / scale

    @override
    def learn(self, group: MaskGroup) -> None:
        optimizer = self._optimizers[self.groups.index(group)]
        for own, user in zip(optimizer.param_groups, _masked_param_groups(group), strict=True):
            own.update({key: value for key, value in user.items() if key != "params"})  # lr follows the schedule
        with torch.enable_grad():  # differentiable optimizers ask for it
            optimizer.step()
        optimizer.zero_grad()

    @override
    def new_mask(self, weight: MaskedWeight, latent: Tensor) -> Tensor:
        return weight.from_rows(threshold_mask(weight.rows(latent), self.thresholds[weight.name]))

    @override
    def masks_renewed(self, group: MaskGroup) -> None:
        for weight in group:
            if weight.sparsity >= self.reset_sparsity:
                self._reset(weight)
        if self._steering and group is self.groups[-1]:
            self._steering.observe(self._sparsity(), self.step / self._total_steps, 1.0 / self._total_steps)

    def _reset(self, weight: MaskedWeight) -> None:
        if not self.thresholds[weight.name].any():
            return  # nothing to undo: the weights themselves are zero
        if self.resets[weight.name] == 0:
            self._name_collapsed(weight)
        self.resets[weight.name] += 1
        self.thresholds[weight.name].zero_()
        self.renew(weight)

    def _name_collapsed(self, weight: MaskedWeight) -> None:
        zeros = 1.0 - count_true(self.latent(weight) != 0) / weight.numel
        if zeros < self.reset_sparsity:
            rank_zero_warn(
                f"DST: {weight.name} has collapsed to sparsity {weight.sparsity:.4f} at step {self.step}; its"
                " thresholds are reset to 0. A lower alpha avoids this. Later resets are counted in"
                " masks/threshold_resets."
            )
        elif zeros < 1.0:  # one that is all zero was named as training began
            rank_zero_warn(
                f"DST: {zeros:.4f} of {weight.name} is zero already, whatever its thresholds, so at reset_sparsity"
                f" {self.reset_sparsity:g} they are reset to 0 at every step and learn nothing; a lower alpha does not"
                " help. Give a larger reset_sparsity, or leave the layer out with exclude= and give it to FixedMask."
            )

    @override
    def resolve_times(self, total_steps: float) -> None:
        if self._steering and math.isinf(total_steps):
            raise ValueError(
                f"DST(sparsity={self._steering.sparsity}) steers towards the end of training, but the Trainer has no"
                " known end (max_epochs=-1 without max_steps, or a data loader without length). Set max_epochs or"
                " max_steps, or give alpha instead."
            )
        self._total_steps = total_steps

    @override
    def target_sparsity(self, name: str | None = None) -> float:
        if name is not None:
            return self.registry[name].sparsity
        if self._steering:
            return self._steering.target(self.step / self._total_steps)
        return self._sparsity()

    def _sparsity(self) -> float:
        """That of the weights of this method, together."""
        numel = sum(group.unshared_numel for group in self.groups)
        return 1.0 - sum(group.num_active for group in self.groups) / numel if numel else 0.0

    @override
    def extra_metrics(self) -> dict[str, float]:
        penalty = sum(float(threshold_penalty(threshold.detach())) for threshold in self.thresholds.values())
        return {
            "dst/alpha": self.alpha,
            "dst/penalty": self.alpha * penalty,
            "masks/threshold_resets": float(sum(self.resets.values())),
        }

    @override
    def training_ended(self) -> None:
        actual = self._sparsity()
        if self._steering and abs(self._steering.sparsity - actual) > _TOLERANCE:
            rank_zero_warn(
                f"DST: training ended at sparsity {actual:.4f} instead of {self._steering.sparsity}, at step"
                f" {self.step} of {self._total_steps:g}. Train to the end, longer, or with a larger learning rate:"
                " thresholds move at that of the weights."
            )

    @override
    def learned_state(self) -> dict[str, Any]:
        return {
            "thresholds": {name: threshold.detach().cpu().clone() for name, threshold in self.thresholds.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "resets": dict(self.resets),
            "steering": self._steering.state() if self._steering else {},
        }

    @override
    def load_learned_state(self, state: Mapping[str, Any]) -> None:
        saved_thresholds = state.get("thresholds", {})
        damaged = [
            name
            for name, threshold in self.thresholds.items()
            if name not in saved_thresholds or saved_thresholds[name].shape != threshold.shape
        ]
        if damaged or len(state.get("optimizers", ())) != len(self._optimizers):
            raise MisconfigurationException(
                f"The checkpoint is cut short: it lacks the thresholds of {', '.join(damaged) or 'no weight'} or the"
                " state of their optimizers. Resume with the module that wrote it, or from an earlier checkpoint."
            )
        with torch.no_grad():
            for name, threshold in self.thresholds.items():
                threshold.copy_(state["thresholds"][name])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.resets = dict(state["resets"])
        if self._steering and state["steering"]:
            self._steering.load(state["steering"])


def _is_number(value: object) -> bool:
    plain: object = Constant(value).value  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    return isinstance(plain, int | float) and not isinstance(plain, bool)


def _twin_optimizer(group: MaskGroup, thresholds: Mapping[str, nn.Parameter]) -> Optimizer:
    """An optimizer of the class and the settings of the group's own, over the thresholds of its weights."""
    threshold_of = {id(weight.parameter): thresholds[weight.name] for weight in group}
    param_groups = [
        {**user, "params": [threshold_of[id(weight)] for weight in user["params"] if id(weight) in threshold_of]}
        for user in _masked_param_groups(group)
    ]
    kind = type(group.optimizer)
    try:
        return kind(param_groups, lr=param_groups[0]["lr"])  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(
            f"DST steps its thresholds, which are vectors, with an optimizer like that of the weights, but"
            f" {kind.__name__} does not take them: {error} Give the masked weights to SGD or Adam, for example."
        ) from error


def _masked_param_groups(group: MaskGroup) -> list[dict[str, Any]]:
    """The parameter groups of the optimizer that hold masked weights; those that a finetuning callback adds do not."""
    masked = {id(weight.parameter) for weight in group}
    return [user for user in group.optimizer.param_groups if any(id(weight) in masked for weight in user["params"])]
