"""FixedMask: fine-tuning with a topology that does not move.

Paper:  Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
        https://arxiv.org/abs/1506.02626 (the third of its three steps: train, prune, retrain the remaining weights)
Code:   none was published
Differs from the paper:
    - Masks may come from any method, or from another run on other weights.
    - The paper retrains with less dropout and a lower learning rate; here you choose both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar, cast, final

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_sparse.functional.masks import pack, unpack, zero_pruned_
from lightning_sparse.masks.distributed import broadcast_
from lightning_sparse.masks.files import read_masks
from lightning_sparse.masks.given import check_bool, wrong_shapes
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.inheritance import looks_pruned
from lightning_sparse.masks.layout import count_of_whole, is_sharded, layout_of, local_part
from lightning_sparse.masks.places import printable
from lightning_sparse.masks.plan import names_near
from lightning_sparse.masks.remarks import enumerated
from lightning_sparse.masks.schema import Check, mapping_of, packed_mask, whole
from lightning_sparse.masks.wrappers import as_named
from lightning_sparse.methods.card import doc, method
from lightning_sparse.methods.hard_mask import HardMaskMethod
from lightning_sparse.methods.paper import Paper
from lightning_sparse.methods.state import check_budgets
from lightning_sparse.schedules import UpdateTimes

__all__ = ["FixedMask"]

# Why a weight stays dense though there is a mask for it: the user has said so, or another name of it has the mask.
_LEFT_OUT = ("excluded", "not included", "frozen", "tied", "dense in the run", "not floating")


@final
@method
class FixedMask(HardMaskMethod):
    r"""Fixed masks: trains the remaining weights, and keeps the zeros where they are.

    With masks :math:`M`, each step trains only the active weights:

    .. math:: W \leftarrow M \odot \bigl(W - \eta\, (M \odot \nabla L)\bigr) .

    The masks determine the sparsity and its target; you cannot choose them. Masks are read when training begins. A run
    that is resumed with ``ckpt_path`` continues with the masks in its checkpoint. Layers that are frozen when training
    begins, such as a backbone that a callback unfreezes later, are masked when an optimizer first steps them.

    ``masks`` says where the masks come from:

    - ``None``: from the earlier method, in the checkpoint that is resumed or from the module's last training. If there
      are none, as after ``load_from_checkpoint``, from the zeros of the weights when training begins.
    - a path: a checkpoint of any method, a file that :func:`~lightning_sparse.masks.save_masks` wrote, or any other
      checkpoint or safetensors file, whose zeros then become the masks.
    - a mapping of parameter names to ``bool`` tensors with the weights' shapes, ``True`` = active.

    A path or a mapping must have a mask for every weight that is masked here. Its masks replace those of a checkpoint.

    Raises:
        MisconfigurationException: When training begins: no weight has a zero, or the masks' names or shapes are not
            those of the module.
        CheckpointError: When training begins: the file is missing, damaged, or holds no masks.
        ValueError: A mask in a mapping is not ``bool``.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_sparse import FixedMask
        >>> fixed = FixedMask(masks={"layer.weight": torch.eye(2, 32, dtype=torch.bool)})
        >>> trainer = L.Trainer(max_steps=20, callbacks=[fixed], logger=False, enable_checkpointing=False,
        ...                     enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> fixed.registry
        MaskRegistry(1 weights, sparsity=0.9688)

    References:
        Han et al., `Learning both Weights and Connections for Efficient Neural Networks
        <https://arxiv.org/abs/1506.02626>`_, NeurIPS 2015.
    """

    paper: ClassVar[Paper] = Paper(
        authors="Han et al.",
        title="Learning both Weights and Connections for Efficient Neural Networks",
        venue="NeurIPS 2015",
        url="https://arxiv.org/abs/1506.02626",
    )

    masks_new_weights: ClassVar[bool] = False

    masks: str | Path | Mapping[str, Tensor] | None = field(
        default=None, kw_only=False, metadata=doc("Where the masks come from; see above.", at_first=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masks is not None and not isinstance(self.masks, str | Path | Mapping):
            raise ValueError(
                f"masks is {self.masks!r}; give a path, a mapping of names to masks, or nothing. FixedMask takes no"
                " sparsity, because it keeps the zeros that are there. To prune, use GMP or FGGP."
            )
        if isinstance(self.masks, Mapping):
            check_bool(self.masks)

    @property
    @override
    def times(self) -> UpdateTimes:
        return UpdateTimes(every=1, start=0, stop=0)  # the one update is over before training begins

    @property
    def _asleep(self) -> dict[str, Tensor]:
        """The masks of what is frozen, by name."""
        return cast("dict[str, Tensor]", self.run.own)

    @override
    def prepare(self) -> None:
        self.run.own = {}
        state = self.run.beginning.state
        if state is not None:
            self._admit(state["masks"])
        elif self.masks is None:
            self.run.own |= self._masks_in_module()
        else:
            given, source = self._read(self.masks)
            self._admit(given)
            self.run.own |= self._taken(self._checked(given, source))

    def _taken(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process holds of masks of whole weights."""
        weights = (*self.weights, *self.run.plan.frozen)
        layouts = {weight.name: layout_of(weight.parameter) for weight in weights}
        return {name: layouts[name].take(mask) if name in layouts else mask for name, mask in masks.items()}

    def _admit(self, masks: Mapping[str, Any]) -> None:
        """Mask what the rules leave dense and a mask is there for: it is held, or the fit is refused."""
        run, trainer = self.run, self.run.trainer()
        wanted = [c for c in run.plan.dense if c.name in masks and not c.reason.startswith(_LEFT_OUT)]
        trained = [replace(candidate, reason="") for candidate in wanted if candidate.parameter.requires_grad]
        run.plan.frozen += [candidate for candidate in wanted if not candidate.parameter.requires_grad]
        if trained and trainer is not None:
            run.groups += run.registry.claim_more(self.state_key, trained, trainer.optimizers)
            names = {candidate.name for candidate in trained}
            run.plan.dense = [candidate for candidate in run.plan.dense if candidate.name not in names]

    @override
    def initialize_masks(self, group: MaskGroup) -> None:
        for weight in group:
            weight.mask.copy_(self._asleep.pop(weight.name))
            weight.budget = weight.count(weight.mask)
        self.clock_starts(group)

    @override
    def clock_starts(self, group: MaskGroup) -> None:
        group.updated_at = self.step

    @override
    def masks_are_on(self) -> None:
        frozen = {candidate.name: candidate for candidate in self.run.plan.frozen}
        self.run.own = {name: mask for name, mask in self._asleep.items() if name in frozen}
        for name, mask in self._asleep.items():
            mask = mask.to(frozen[name].parameter.device)
            if not is_sharded(frozen[name].parameter):
                broadcast_(mask)
            self._asleep[name] = mask
            zero_pruned_(local_part(frozen[name].parameter), mask)

    @override
    def mask_of_thawed(self, name: str) -> Tensor | None:
        return self._asleep.pop(name, None)

    @override
    def method_state(self) -> dict[str, Any]:
        layouts = {candidate.name: layout_of(candidate.parameter) for candidate in self.run.plan.frozen}
        whole = {name: layouts[name].saved(mask) for name, mask in self._asleep.items()}
        packed = {name: {"shape": list(layouts[name].shape), "bits": pack(mask)} for name, mask in whole.items()}
        return super().method_state() | {"asleep": packed}

    @override
    def state_fields(self) -> Mapping[str, Check]:
        return {**super().state_fields(), "stop": whole(0, 0), "asleep": mapping_of(packed_mask({}))}

    @override
    def load_method_state(self, state: Mapping[str, Any]) -> None:
        super().load_method_state(state)
        check_budgets(self.groups, self.state_key)
        packed = state.get("asleep", {})
        masks = {name: unpack(its["bits"], its["shape"]) for name, its in packed.items()}
        if wrong := wrong_shapes(masks, self.run.plan.frozen, "The checkpoint"):
            raise MisconfigurationException(wrong)
        self.run.own = self._taken(masks)

    def _masks_in_module(self) -> Mapping[str, Tensor]:
        zeros = {weight.name: weight.value != 0 for weight in self.weights}
        masks = zeros | dict(self.inherited)  # a weight that was just grown is zero, and active
        self._tell_of_dense_zeros()
        parts = {candidate.name: local_part(candidate.parameter) != 0 for candidate in self.run.plan.frozen}
        counts = {c.name: (count_of_whole(c.parameter, parts[c.name]), c.numel) for c in self.run.plan.frozen}
        frozen = {name: parts[name] for name, (active, numel) in counts.items() if 0 < active < numel}
        dense = (weight.count(masks[weight.name]) == weight.numel for weight in self.weights)
        if not frozen and all([*dense, *(mask.all() for name, mask in masks.items() if name not in zeros)]):
            raise MisconfigurationException(
                f"FixedMask found no zero in {enumerated(masks)}: the module is dense. Load sparse weights into it"
                " before fit, resume a sparse training with ckpt_path, or give the masks: FixedMask(masks=PATH)."
            )
        return masks | frozen

    def _tell_of_dense_zeros(self) -> None:
        """Warn of zeros, as a sparse training leaves them, in weights that are trained and stay dense."""
        zeros = {
            candidate.name: (count_of_whole(candidate.parameter, local_part(candidate.parameter) == 0), candidate.numel)
            for candidate in self.dense
            if candidate.parameter.dim() > 1
            and candidate.parameter.requires_grad
            and not candidate.reason.startswith((*_LEFT_OUT, "auxiliary"))
        }
        counts = {name: count for name, (count, numel) in zeros.items() if count < numel and looks_pruned(count, numel)}
        if counts:
            shown = enumerated(f"{name} ({count:,})" for name, count in counts.items())
            self.warn_once(
                f"zeros in weights that stay dense will be trained again: {shown}. List them in include=, with '*'"
                " for the others, or give their masks"
            )

    def _read(self, given: str | Path | Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], str]:
        """The masks by name, and where they come from."""
        names = [weight.name for weight in (*self.weights, *self.run.plan.frozen)]
        if isinstance(given, Mapping):
            return as_named(given, names), "The mapping masks="
        return read_masks(given, names=names), printable(f"{given}")

    def _checked(self, masks: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
        known = [weight.name for weight in self.weights] + [candidate.name for candidate in self.dense]
        unknown = [name for name in masks if name not in known]
        if unknown:
            near = names_near(unknown, [weight.name for weight in self.weights])
            shown = ", ".join(map(printable, unknown))
            raise MisconfigurationException(
                f"{source} has masks of {shown}, which the module does not have. Its weights near them: {near}. Give"
                " the masks of this module."
            )
        missing = [weight.name for weight in self.weights if weight.name not in masks]
        if missing:
            shown = ", ".join(map(printable, masks)) or "nothing"
            raise MisconfigurationException(
                f"{source} has no mask for {', '.join(missing)}; it has masks of {shown}. To leave these dense, add"
                f" exclude={[*(self.exclude or ()), *missing]}. If the masks come from a run that shared weights"
                " (EAST, WeightSharing), add WeightSharing() before FixedMask instead, with the arguments that it had"
                " there."
            )
        if wrong := wrong_shapes(masks, [*self.weights, *self.run.plan.frozen], source):
            raise MisconfigurationException(wrong)
        return masks

    @override
    def update_masks(self, group: MaskGroup) -> None:
        raise AssertionError("Fixed masks have no update.")

    @override
    def target_sparsity(self, name: str | None = None) -> float:
        weights = self.weights if name is None else [self.registry[name]]
        numel = sum(weight.numel if name else weight.unshared_numel for weight in weights)
        return 1.0 - sum(weight.num_active for weight in weights) / numel if numel else 0.0
