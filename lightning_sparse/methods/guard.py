"""The guard: whether pruned weights are still zero, whatever code writes between our hooks.

The guard checks cheap evidence at every step: the parameter that the module holds, its address, and autograd's version
counter. In-place operations, ``load_state_dict`` and ``nn.init`` raise the counter; ``p.data = x`` and conversions
change the address. Writes without such evidence (``p.data.add_()``, views of numpy) are found on a CPU by checking some
entries of each weight, at every step too. :func:`count_awake` reads every weight, and finds what writes to fewer; it is
therefore called only sometimes. On other devices, where a check would wait for the device, it alone finds such writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from lightning_sparse.functional.masks import awake, counts_true
from lightning_sparse.masks.group import MaskGroup
from lightning_sparse.masks.layout import is_sharded, local_part
from lightning_sparse.masks.weight import MaskedWeight

__all__ = ["Guard", "count_awake"]

_SAMPLE = 256  # pruned entries of a gradient that are looked at where clipping hides who wrote
_SOME = 64  # entries of a weight that are looked at in every step, where no counter tells who wrote

_Mark = tuple[int, ...]
_PLAIN = (nn.Parameter, Tensor)


@final
class Guard:
    """Remembers the state of a group's weights and gradients after our last write.

    Args:
        group: The weights.

    Attributes:
        suspects: Whether a write without evidence was found; from then on, every weight is checked at every step.
    """

    def __init__(self, group: MaskGroup) -> None:
        self._group = group
        self._weights: list[_Mark] = []
        self._grads: list[_Mark] = []
        self._samples: list[Tensor] = []
        self._some: list[Tensor] | None = None
        self._some_masks: list[Tensor] = []
        self._some_pruned: np.ndarray[Any, Any] | None = None
        self._before: list[_Mark] = []
        self._writes: list[int] = []
        self._state = _state_of(group)
        self.suspects = False
        self.note_weights()

    def note_weights(self) -> None:
        """Call this right after our own write to the weights."""
        noted, self._weights = self._weights, self._marks()
        if any(mark[0] != its[0] for mark, its in zip(noted, self._weights, strict=False)):
            self._some = None

    def written_weights(self) -> list[MaskedWeight]:
        """The weights that other code has written to or moved since then."""
        marks = self._marks()
        if marks == self._weights:
            return []
        return [weight for weight, mark, noted in zip(self._group, marks, self._weights, strict=True) if mark != noted]

    def has_moved(self) -> bool:
        """Whether someone has laid a weight elsewhere in memory since."""
        return any(mark[0] != noted[0] for mark, noted in zip(self._marks(), self._weights, strict=True))

    def finds_some_awake(self) -> bool:
        """Whether one of some entries of each weight is pruned and not zero; to be asked where nobody has written."""
        if self._some is None:
            self._some, self._some_masks = _some_entries(self._group)
            self._some_pruned = None
        if not self._some:
            return False
        if self._some_pruned is None:
            self._some_pruned = np.flatnonzero(~torch.cat(self._some_masks).numpy())
        entries = torch.cat(self._some)
        # NumPy, for which there is no bfloat16, takes half as long for so few entries.
        entries = entries.float() if entries.dtype == torch.bfloat16 else entries
        return bool(entries.numpy()[self._some_pruned].any())

    def step_begins(self) -> None:
        """To be called when the optimizer is about to step."""
        self._before = self._marks()

    def moments_are_others(self) -> bool:
        """Whether the optimizer has another state than when last asked, as after its ``load_state_dict``."""
        before, self._state = self._state, _state_of(self._group)
        return self._state is not before

    def step_is_odd(self) -> bool:
        """Whether more, or less, was written since :meth:`step_begins` than in the last step, or this is the first.

        An optimizer writes as often in each step; somebody who writes to weights in a hook before it adds to that.
        """
        before, self._before = self._before, []
        writes = [mark[1] - its[1] for mark, its in zip(self._marks(), before, strict=False)]
        odd, self._writes = writes != self._writes, writes
        return odd

    def replaced_weights(self) -> list[MaskedWeight]:
        """The weights in whose place the module now holds another parameter."""
        return [weight for weight in self._group if not weight.is_in_place]

    def note_gradients(self) -> None:
        """To be called when the gradients of pruned weights have just been zeroed."""
        self._grads = _marks([weight.parameter.grad for weight in self._group])

    def masks_changed(self) -> None:
        """To be called when the masks are others: other entries are looked at."""
        self._samples, self._some_pruned = [], None

    def laid_anew(self) -> None:
        """To be called when the weights, and with them the masks, lie elsewhere in memory."""
        self._samples, self._some = [], None

    def written_gradients(self, *, clipped: bool) -> list[MaskedWeight]:
        """The weights whose gradients are no longer zero where they were pruned, since :meth:`note_gradients`.

        Args:
            clipped: Whether gradients are clipped, which raises the counter of each and leaves zeros zero. A fixed
                sample of pruned entries is looked at then, otherwise all of them.
        """
        if not self._grads:
            return []
        marks = _marks([weight.parameter.grad for weight in self._group])
        written = [
            (index, weight)
            for index, (weight, mark, noted) in enumerate(zip(self._group, marks, self._grads, strict=True))
            if mark != noted and weight.parameter.grad is not None
        ]
        if not written:
            return []
        if clipped:
            samples = self._sampled()
            counts = [int((weight.grad.reshape(-1)[samples[index]] != 0).any()) for index, weight in written]
        else:
            counts = counts_true([awake(weight.grad, weight.mask) for _, weight in written])
        return [weight for (_, weight), count in zip(written, counts, strict=True) if count]

    def _marks(self) -> list[_Mark]:
        return _marks([weight.parameter for weight in self._group])

    def _sampled(self) -> list[Tensor]:
        if not self._samples:
            self._samples = [_some_pruned(weight) for weight in self._group]
        return self._samples


def count_awake(weights: Sequence[MaskedWeight]) -> list[int]:
    """How many pruned weights of each are not zero; reads them all, with one transfer from a device."""
    return counts_true([awake(weight.value, weight.mask) for weight in weights]) if weights else []


def _state_of(group: MaskGroup) -> object:
    """What its optimizer remembers; a wrapper of another may have no such attribute."""
    return getattr(group.optimizer, "state", None)


def _some_entries(weights: Sequence[MaskedWeight]) -> tuple[list[Tensor], list[Tensor]]:
    """Views of some entries of each weight on a CPU, and of their masks."""
    values: list[Tensor] = []
    masks: list[Tensor] = []
    for weight in weights:
        value = weight.value.detach()
        flat = weight.flatten(value)
        if value.device.type == "cpu" and flat.data_ptr() == value.data_ptr():  # else it is a copy
            step = max(1, flat.numel() // _SOME)
            values.append(flat[::step])
            masks.append(weight.flatten(weight.mask)[::step])
    return values, masks


def _marks(tensors: Sequence[Tensor | None]) -> list[_Mark]:
    """The address and the counter of each tensor; taken several times in every step."""
    try:
        return [(t.data_ptr(), t._version) if type(t) in _PLAIN else _mark(t) for t in tensors]  # type: ignore[union-attr]
    except RuntimeError:
        return [_mark(tensor) for tensor in tensors]


def _mark(tensor: Tensor | None) -> _Mark:
    if tensor is None:  # a gradient that is not there
        return 0, 0
    if is_sharded(tensor):  # its own counter knows of its operations, that of the part here of what else is written
        part = local_part(tensor)
        return part.data_ptr(), tensor._version, part._version
    try:
        return tensor.data_ptr(), tensor._version
    except RuntimeError:  # an inference tensor counts no writes
        return tensor.data_ptr(), -1


def _some_pruned(weight: MaskedWeight) -> Tensor:
    """Places of some pruned entries, spread over the weight."""
    pruned = (~weight.mask).reshape(-1).nonzero().squeeze(1)
    return pruned[:: max(1, len(pruned) // _SAMPLE)][:_SAMPLE]
