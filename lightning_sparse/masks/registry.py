"""One owner of the masks of a module: :class:`MaskRegistry`, a mapping from names to :class:`MaskedWeight`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sparse.functional.hashing import content_hash
from lightning_sparse.functional.masks import pack, unpack
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.layout import Layout, is_sharded, layout_of, local_part
from lightning_sparse.masks.plan import Candidate, canonical_name
from lightning_sparse.masks.sums import sum_over_processes
from lightning_sparse.masks.weight import MaskedWeight

__all__ = ["ELSEWHERE", "Left", "MaskRegistry"]

ELSEWHERE = (
    "Under ddp_fork, ddp_spawn and ddp_notebook, masks stay in the processes that trained:"
    " lightning_sparse.masks.read_masks reads those of a checkpoint, and lightning_sparse.report(module) counts zeros"
)
"""Where masks may be if a registry is empty, for messages: a process cannot know what others have trained."""


@final
@dataclass(frozen=True, eq=False)
class Left:
    """What a training, a loaded checkpoint or :func:`~lightning_sparse.apply_masks` has left in a module.

    Attributes:
        bits: The masks, packed, by name.
        fingerprint: A hash of the weights at that time.
        given: Whether :func:`~lightning_sparse.apply_masks` has left them.
        layouts: Where the entries of sharded weights were, by name: their masks are those of this process' part.
    """

    bits: Mapping[str, Tensor]
    fingerprint: int
    given: bool
    layouts: Mapping[str, Layout] = field(default_factory=dict[str, Layout])

    def masks_of(self, module: nn.Module) -> dict[str, Tensor]:
        """The masks; empty if a pruned weight is no longer zero, because the module has then changed.

        Where weights are sharded, these are of what this process holds, and every process must ask.
        """
        parameters = _parameters(module)
        masks: dict[str, Tensor] = {}
        for name, bits in self.bits.items():
            mask = None if name not in parameters else self._mask(name, bits, parameters[name])
            if mask is None:
                return {}
            masks[name] = mask
        awake = (bool(local_part(parameters[name])[~mask].any()) for name, mask in masks.items())
        return {} if _anywhere(any(awake), [parameters[name] for name in masks]) else masks

    def _mask(self, name: str, bits: Tensor, parameter: nn.Parameter) -> Tensor | None:
        layout, before = layout_of(parameter), self.layouts.get(name)
        if before is not None and repr(before) != repr(layout):
            return None
        shape = parameter.shape if before is None else layout.local_shape
        if bits.numel() != -(-shape.numel() // 8):
            return None
        mask = unpack(bits, shape)
        return (layout.take(mask) if before is None else mask).to(parameter.device)

    def is_still_in(self, module: nn.Module) -> bool:
        """Whether the weights are still the same bit for bit; where they are sharded, every process must ask."""
        parameters = _parameters(module)
        others = self.fingerprint != _fingerprint(module, self.bits)
        return not _anywhere(others, [parameters[name] for name in self.bits if name in parameters])

    def same_as(self, other: Left) -> bool:
        """Whether both say the same."""
        return (
            (self.fingerprint, self.given, self.bits.keys()) == (other.fingerprint, other.given, other.bits.keys())
        ) and all(torch.equal(bits, other.bits[name]) for name, bits in self.bits.items())


@dataclass
class _Record:
    """What is known of a module: its masks in a training, and what the last one left."""

    registry: MaskRegistry | None = None
    left: Left | None = None


@final
class MaskRegistry(Mapping[str, MaskedWeight]):
    """The masks of a module, by parameter name, shared by all callbacks of its trainer.

    Each method claims the weights that it masks; a weight has one owner. Masks are kept here and in the methods'
    checkpoint state, never in the module. Its parameters, buffers and ``state_dict`` keys stay as they are.

    Attributes:
        num_updates: How often masks have changed.
        idle_optimizers: Optimizers that skip the current step, because a method has updated its masks instead.

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

    _records: ClassVar[WeakKeyDictionary[nn.Module, _Record]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._weights: dict[str, MaskedWeight] = {}
        self._owners: dict[str, str] = {}
        self.num_updates = 0
        self.idle_optimizers: set[torch.optim.Optimizer] = set()

    # Of which module it is.

    @classmethod
    def of(cls, module: nn.Module) -> MaskRegistry:
        """The registry of ``module``, made at the first call."""
        record = cls._records.setdefault(module, _Record())
        if record.registry is None:
            record.registry = cls()
        return record.registry

    @classmethod
    def find(cls, module: nn.Module) -> MaskRegistry | None:
        """The registry of ``module`` during a training; None if there is none."""
        record = cls._records.get(module)
        return None if record is None else record.registry

    def begin(self, module: nn.Module) -> None:
        """Become the registry of ``module``, for a training."""
        self._records.setdefault(module, _Record()).registry = self

    @classmethod
    def forget(cls, module: nn.Module) -> Left | None:
        """Let the next :meth:`of` make a new registry; existing references keep this one.

        Returns:
            What the training has left in the module, so that one can check later whether it is still there.
        """
        record = cls._records.get(module)
        if record is None:
            return None
        if record.registry:
            masks = {name: weight.mask for name, weight in record.registry.items()}
            # Nothing is gathered, for a process that has failed is alone here.
            sharded = {name: w.layout for name, w in record.registry.items() if not w.layout.is_whole}
            record.left = _left(module, masks, given=False, layouts=sharded)
        record.registry = None
        return record.left

    @classmethod
    def leave(cls, module: nn.Module, masks: Mapping[str, Tensor], *, given: bool) -> Left:
        """Let the next training of ``module`` find ``masks``, by name, as if one had just ended with them.

        Args:
            module: It has the weights that belong to the masks.
            masks: ``bool``, of the weights' shapes.
            given: Whether a user gives them; else they come with a checkpoint.

        Returns:
            What is left; the same object where the same was left there before.
        """
        record = cls._records.setdefault(module, _Record())
        left = _left(module, masks, given=given)
        if record.left is None or not record.left.same_as(left):
            record.left = left
        return record.left

    @classmethod
    def last_left(cls, module: nn.Module) -> Left | None:
        """What the last training, loaded checkpoint or :func:`~lightning_sparse.apply_masks` has left in ``module``."""
        record = cls._records.get(module)
        return None if record is None else record.left

    @classmethod
    def left_in(cls, module: nn.Module) -> dict[str, Tensor]:
        """The masks with which the last training of ``module`` ended, by name.

        Empty if there was no training, or if pruned weights are no longer zero: the masks then no longer fit.
        """
        left = cls.last_left(module)
        return {} if left is None else left.masks_of(module)

    # Who owns which weight.

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
        """Like :meth:`claim`, in addition to what ``owner`` already has."""
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
            self.drop(name)

    def drop(self, name: str) -> None:
        """Give up the claim of one weight."""
        del self._weights[name], self._owners[name]

    def _check_free(self, owner: str, candidate: Candidate) -> None:
        for name, weight in self._weights.items():
            if weight.parameter is candidate.parameter:
                same = f"{name!r}" if name == candidate.name else f"{candidate.name!r}, tied to {name!r},"
                raise MisconfigurationException(
                    f"{owner} claims {same} which {self._owners[name]} already masks. A weight has one method: divide"
                    " the network between them with include= and exclude=."
                )

    # What it says.

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
        """Number of weights if each use of a shared weight had its own copy."""
        return sum(weight.unshared_numel for weight in self.values())

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights that have a mask; 0 before there is a mask.

        Each use of a shared weight counts: this is the sparsity of a network that stores the same number of active
        weights without sharing.
        """
        return 1.0 - self.num_active / self.unshared_numel if self else 0.0

    def __getitem__(self, name: str) -> MaskedWeight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        if not self:
            return f"MaskRegistry(no masks in this process. {ELSEWHERE}.)"
        return f"MaskRegistry({len(self)} weights, sparsity={self.sparsity:.4f})"


def _left(
    module: nn.Module, masks: Mapping[str, Tensor], *, given: bool, layouts: Mapping[str, Layout] | None = None
) -> Left:
    packed = {name: pack(mask) for name, mask in masks.items()}
    return Left(packed, _fingerprint(module, masks), given, layouts or {})


def _anywhere(holds: bool, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether something holds in a process, of those that hold parts of the parameters."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        return holds
    return bool(sum_over_processes(torch.tensor([holds], dtype=torch.int32, device=sharded[0].device)))


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {canonical_name(name): value for name, value in module.named_parameters(remove_duplicate=False)}


def _fingerprint(module: nn.Module, names: Mapping[str, Tensor]) -> int:
    """A hash of the weights of those names; of one that is not there, of its absence."""
    parameters = _parameters(module)
    found = [parameters[name] for name in names if name in parameters]
    hashes = [int(content_hash(local_part(parameter)).item()) for parameter in found]
    return hash((len(names), *hashes))


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
            f"No optimizer steps {', '.join(missing)}, so their masks would never be applied. Add them to the"
            " optimizer in configure_optimizers, freeze them (requires_grad=False), or leave them out with exclude=."
        )
    shared = [candidate.name for candidate in candidates if len(indices[id(candidate.parameter)]) > 1]
    if shared:
        raise MisconfigurationException(
            f"Several optimizers step {', '.join(shared)}, and each would keep moments of its own. Give each masked"
            " weight to one optimizer, or leave it out with exclude=."
        )
    members: list[list[Candidate]] = [[] for _ in optimizers]
    for candidate in candidates:
        (index,) = indices[id(candidate.parameter)]
        members[index].append(candidate)
    return list(zip(optimizers, members, strict=True))
