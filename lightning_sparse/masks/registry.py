"""One owner of the masks of a module: :class:`MaskRegistry`, a mapping from names to :class:`MaskedWeight`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, TypedDict
from weakref import WeakKeyDictionary, WeakSet

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparse.functional.masks import counts_true, memory_order, multiplier, pack, unpack, zero_pruned_
from lightning_sparse.masks.plan import Candidate, canonical_name

__all__ = ["MaskGroup", "MaskRegistry", "MaskedWeight"]


# Weights of a layer for which a second mask, as wide as the weights, is kept: 1 MiB. A step of a network of such layers
# is so short that reading a mask of bytes shows.
_SMALL = 2**18


class PackedMask(TypedDict):
    """A mask in a checkpoint: primitives and one tensor."""

    shape: list[int]
    bits: Tensor
    budget: int
    updated_at: int


class MaskedWeight:
    """A weight and its mask.

    Attributes:
        name: Name in the plain module.
        parameter: The parameter; the module's own, not a copy.
        mask: ``bool``, shape and strides of the parameter; ``True`` = active. A view into its group's flat mask.
        num_active: Active weights, as counted at the last update.
        budget: Active weights that the method allows.
        module_type: Name of the class of the module that owns it.
    """

    def __init__(self, candidate: Candidate, flat_mask: Tensor) -> None:
        self.name = candidate.name
        self.parameter = candidate.parameter
        self.module_type = candidate.module_type
        self.mask = _view_as(flat_mask, candidate.parameter)
        self.num_active = self.budget = self.numel
        self._candidate = candidate
        self._multiplier = self.mask

    @property
    def numel(self) -> int:
        """Number of weights, pruned ones included."""
        return self.parameter.numel()

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.parameter.shape

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer: that of the weight, or of one of its :attr:`copies`."""
        return self._candidate.layer_shape

    @property
    def copies(self) -> int:
        """Layers of one shape that lie in the weight, as the experts of a mixture; 1 for all others."""
        return self._candidate.copies

    @property
    def unshared_numel(self) -> int:
        """Number of weights that the module would have here if each use had its own."""
        return self.numel * self._candidate.uses

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]."""
        return 1.0 - self.num_active / self.numel

    @property
    def target_sparsity(self) -> float:
        """Sparsity of the budget: what the method allows since its last update."""
        return 1.0 - self.budget / self.numel

    @property
    def grad(self) -> Tensor:
        """The gradient of the parameter; zeros where the weight took no part in the loss."""
        return torch.zeros_like(self.parameter) if self.parameter.grad is None else self.parameter.grad

    def rows(self, tensor: Tensor) -> Tensor:
        """``tensor``, of the weight's shape, as ``(outputs, fan-in)``: one row for each output neuron or filter.

        Right for linear, (grouped, transposed) convolution and recurrent layers, where a row is one gate of one unit.
        """
        return self._candidate.rows(tensor)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`: shape ``(outputs, fan-in)`` to the weight's."""
        return self._candidate.from_rows(rows)

    def flatten(self, tensor: Tensor) -> Tensor:
        """``tensor``, of the weight's shape, in the order of the group's flat mask."""
        return tensor.permute(memory_order(self.mask)).reshape(-1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """The inverse of :meth:`flatten`, as a view."""
        return _view_as(flat, self.parameter)

    @torch.no_grad()
    def apply_(self) -> None:
        """Zero the pruned weights."""
        self.zero_pruned_(self.parameter)

    def zero_pruned_(self, tensor: Tensor) -> None:
        """Zero the entries of ``tensor``, of the weight's shape, where weights were pruned at the last count."""
        as_wide = self._multiplier.element_size() == tensor.element_size()
        zero_pruned_(tensor, self._multiplier if as_wide else self.mask)

    def recount(self, num_active: int) -> None:
        """Take the number of active weights, and make what follows from a new mask."""
        self.num_active = num_active
        if self.numel <= _SMALL:
            self._multiplier = multiplier(self.mask, self.parameter.dtype)

    def __repr__(self) -> str:
        return f"MaskedWeight({self.name}, {tuple(self.shape)}, sparsity={self.sparsity:.4f})"


class MaskGroup(Sequence[MaskedWeight]):
    """The masked weights of one method in one optimizer: they are ranked, updated and broadcast together.

    Attributes:
        mask: The masks of all its weights in one flat ``bool`` tensor; each weight's mask is a view of a part.
        optimizer: The optimizer that steps its weights.
        updated_at: The step of the last update; -1 before the first.
        not_finite_for: Steps in a row whose gradients held inf or NaN where they were looked at.
    """

    def __init__(self, candidates: Sequence[Candidate], optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.updated_at = -1
        self.not_finite_for = 0
        devices = {candidate.parameter.device for candidate in candidates}
        if len(devices) > 1:
            raise MisconfigurationException(
                f"The weights of one optimizer lie on {', '.join(sorted(map(str, devices)))}, and masks are ranked on"
                " one device. Use one optimizer, and one method with include=, for each device."
            )
        sizes = [candidate.parameter.numel() for candidate in candidates]
        self.mask = torch.ones(sum(sizes), dtype=torch.bool, device=candidates[0].parameter.device)
        parts = self.mask.split(sizes)
        self._weights = [MaskedWeight(candidate, part) for candidate, part in zip(candidates, parts, strict=True)]

    def __getitem__(self, index: int) -> MaskedWeight:  # type: ignore[override]
        return self._weights[index]

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def numel(self) -> int:
        """Number of weights, pruned ones included."""
        return self.mask.numel()

    @property
    def unshared_numel(self) -> int:
        """Number of weights that there would be if each use of a shared one had its own; budgets count these."""
        return sum(weight.unshared_numel for weight in self)

    @property
    def num_active(self) -> int:
        """Active weights, as counted at the last update."""
        return sum(weight.num_active for weight in self)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor for each weight, shaped like it, in one flat tensor in the order of :attr:`mask`."""
        return torch.cat([weight.flatten(tensor) for weight, tensor in zip(self, tensors, strict=True)])

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor in the order of :attr:`mask` as one view for each weight, shaped like it."""
        parts = flat.split([weight.numel for weight in self])
        return [_view_as(part, weight.parameter) for weight, part in zip(self, parts, strict=True)]

    def recount(self) -> None:
        """Count the active weights anew; one transfer from a device that is not the CPU."""
        for weight, num_active in zip(self, counts_true([weight.mask for weight in self]), strict=True):
            weight.recount(num_active)

    def apply_(self) -> None:
        """Zero the pruned weights."""
        for weight in self:
            weight.apply_()

    def packed(self) -> dict[str, PackedMask]:
        """The masks at one bit a weight, by name, for a checkpoint."""
        return {
            weight.name: {
                "shape": list(weight.shape),
                "bits": pack(weight.mask),
                "budget": weight.budget,
                "updated_at": self.updated_at,
            }
            for weight in self
        }

    def load_(self, packed: Mapping[str, PackedMask]) -> None:
        """Take the masks of a checkpoint: all of them or, where one does not fit, none.

        Raises:
            MisconfigurationException: A mask is missing, has another shape or is cut short.
        """
        masks = [_unpack(weight, packed) for weight in self]
        for weight, mask in zip(self, masks, strict=True):
            weight.mask.copy_(mask)
            weight.budget = packed[weight.name]["budget"]
            self.updated_at = packed[weight.name]["updated_at"]
        self.recount()


class MaskRegistry(Mapping[str, MaskedWeight]):
    """The masks of a module, by parameter name, shared by all callbacks of its trainer.

    Each method claims the weights that it masks; a weight has one owner. Masks live here and in the methods'
    checkpoint state, never in the module, whose parameters, buffers and ``state_dict`` keys stay as they are.

    Attributes:
        num_updates: How often masks have changed.
        idle_optimizers: Optimizers that are to take no step now, because a method has updated its masks instead.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sparse.masks import MaskRegistry, select_weights
        >>> module = nn.Linear(4, 2, bias=False)
        >>> registry = MaskRegistry.of(module)
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> group, = registry.claim("example", select_weights(module).masked, [optimizer])
        >>> group.mask[:6] = False
        >>> group.recount()
        >>> registry["weight"].mask
        tensor([[False, False, False, False],
                [False, False,  True,  True]])
        >>> registry.sparsity
        0.75
    """

    _of_module: ClassVar[WeakKeyDictionary[nn.Module, MaskRegistry]] = WeakKeyDictionary()
    _left_in: ClassVar[WeakKeyDictionary[nn.Module, dict[str, Tensor]]] = WeakKeyDictionary()
    _given: ClassVar[WeakSet[nn.Module]] = WeakSet()

    def __init__(self) -> None:
        self._weights: dict[str, MaskedWeight] = {}
        self._owners: dict[str, str] = {}
        self.num_updates = 0
        self.idle_optimizers: set[torch.optim.Optimizer] = set()

    @classmethod
    def of(cls, module: nn.Module) -> MaskRegistry:
        """The registry of ``module``, made at the first call."""
        return cls._of_module.setdefault(module, cls())

    @classmethod
    def find(cls, module: nn.Module) -> MaskRegistry | None:
        """The registry of ``module`` if there is one, in a training."""
        return cls._of_module.get(module)

    @classmethod
    def forget(cls, module: nn.Module) -> None:
        """Let the next :meth:`of` make a new registry; those who hold this one keep it."""
        registry = cls._of_module.pop(module, None)
        if registry:
            cls._left_in[module] = {name: pack(weight.mask) for name, weight in registry.items()}
            cls._given.discard(module)

    @classmethod
    def leave(cls, module: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Let the next training of ``module`` find ``masks``, by name, as if one had just ended with them."""
        cls._left_in[module] = {name: pack(mask) for name, mask in masks.items()}
        cls._given.add(module)

    @classmethod
    def was_given(cls, module: nn.Module) -> bool:
        """Whether ``module`` has not been trained since :meth:`leave`."""
        return module in cls._given

    @classmethod
    def left_in(cls, module: nn.Module) -> dict[str, Tensor]:
        """The masks with which the last training of ``module`` ended, by name.

        Empty where there was none, and where weights have moved since: it then no longer is that sparse module.
        """
        parameters = {canonical_name(name): parameter for name, parameter in module.named_parameters()}
        masks: dict[str, Tensor] = {}
        for name, bits in cls._left_in.get(module, {}).items():
            parameter = parameters.get(name)
            if parameter is None or bits.numel() != -(-parameter.numel() // 8):
                return {}
            mask = unpack(bits, parameter.shape).to(parameter.device)
            if parameter.detach()[~mask].any():
                return {}
            masks[name] = mask
        return masks

    def claim(
        self, owner: str, candidates: Sequence[Candidate], optimizers: Sequence[torch.optim.Optimizer]
    ) -> list[MaskGroup]:
        """Make ``owner`` the owner of the candidates' masks, all active, one group for each optimizer that has some.

        Raises:
            MisconfigurationException: A weight has another owner, or no optimizer steps it.
        """
        self.release(owner)
        return self.claim_more(owner, candidates, optimizers)

    def claim_more(
        self, owner: str, candidates: Sequence[Candidate], optimizers: Sequence[torch.optim.Optimizer]
    ) -> list[MaskGroup]:
        """:meth:`claim` beside what ``owner`` has already."""
        for candidate in candidates:
            self._check_free(owner, candidate)
        groups = [MaskGroup(members, opt) for opt, members in _by_optimizer(candidates, optimizers) if members]
        for weight in (weight for group in groups for weight in group):
            self._weights[weight.name] = weight
            self._owners[weight.name] = owner
        return groups

    def release(self, owner: str) -> None:
        """Give up every claim of ``owner``."""
        for name in [name for name, its_owner in self._owners.items() if its_owner == owner]:
            del self._weights[name], self._owners[name]

    def _check_free(self, owner: str, candidate: Candidate) -> None:
        for name, weight in self._weights.items():
            if weight.parameter is candidate.parameter:
                same = f"{name!r}" if name == candidate.name else f"{candidate.name!r}, tied to {name!r},"
                raise MisconfigurationException(
                    f"{owner} claims {same} which {self._owners[name]} already masks. A weight has one method: divide"
                    " the network between them with include= and exclude=."
                )

    @property
    def numel(self) -> int:
        """Number of weights that have a mask."""
        return sum(weight.numel for weight in self.values())

    @property
    def num_active(self) -> int:
        """Active weights of all masks."""
        return sum(weight.num_active for weight in self.values())

    @property
    def unshared_numel(self) -> int:
        """Number of weights that there would be if each use of a shared one had its own."""
        return sum(weight.unshared_numel for weight in self.values())

    @property
    def sparsity(self) -> float:
        """Fraction that is not stored of the weights that have a mask; 0 before there is one.

        Of weights that are shared, each use counts: it is the sparsity of an unshared network that stores as many.
        """
        return 1.0 - self.num_active / self.unshared_numel if self else 0.0

    def __getitem__(self, name: str) -> MaskedWeight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return f"MaskRegistry({len(self)} weights, sparsity={self.sparsity:.4f})"


def _view_as(flat: Tensor, parameter: Tensor) -> Tensor:
    """A flat tensor as a view with the shape and the order in memory of ``parameter``."""
    order = memory_order(parameter)
    inverse = [order.index(dim) for dim in range(len(order))]
    return flat.view([parameter.shape[dim] for dim in order]).permute(inverse)


def _by_optimizer(
    candidates: Sequence[Candidate], optimizers: Sequence[torch.optim.Optimizer]
) -> list[tuple[torch.optim.Optimizer, list[Candidate]]]:
    indices: dict[int, set[int]] = {}
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                indices.setdefault(id(parameter), set()).add(index)
    missing = [candidate.name for candidate in candidates if id(candidate.parameter) not in indices]
    if missing:
        raise MisconfigurationException(
            f"No optimizer steps {', '.join(missing)}, so masks there would never be held. Add them to the optimizer in"
            " configure_optimizers, freeze them (requires_grad=False), or leave them out with exclude=."
        )
    shared = [candidate.name for candidate in candidates if len(indices[id(candidate.parameter)]) > 1]
    if shared:
        raise MisconfigurationException(
            f"Several optimizers step {', '.join(shared)}, and each would have moments of its own to keep clear. Give"
            " each masked weight to one optimizer, or leave it out with exclude=."
        )
    members: list[list[Candidate]] = [[] for _ in optimizers]
    for candidate in candidates:
        (index,) = indices[id(candidate.parameter)]
        members[index].append(candidate)
    return list(zip(optimizers, members, strict=True))


def _unpack(weight: MaskedWeight, packed: Mapping[str, PackedMask]) -> Tensor:
    if weight.name not in packed:
        raise MisconfigurationException(
            f"The checkpoint holds no mask of {weight.name}; it has masks of {', '.join(packed) or 'nothing'}. Resume"
            " with the same module and the same include= and exclude= as the run that wrote it."
        )
    saved = packed[weight.name]
    missing = PackedMask.__required_keys__ - saved.keys()
    if not isinstance(saved.get("bits"), Tensor):
        missing |= {"bits"}
    if missing:
        raise MisconfigurationException(
            f"The checkpoint's mask of {weight.name} is cut short: it lacks {', '.join(sorted(missing))}. Resume from"
            " an earlier checkpoint."
        )
    if list(saved["shape"]) != list(weight.shape):
        raise MisconfigurationException(
            f"The checkpoint's mask of {weight.name} has shape {tuple(saved['shape'])}, but the weight has"
            f" {tuple(weight.shape)}. Resume with the module that wrote the checkpoint."
        )
    try:
        return unpack(saved["bits"], weight.shape)
    except ValueError as error:
        raise MisconfigurationException(f"The checkpoint's mask of {weight.name} cannot be read: {error}") from error
