"""Floating-point operations: counted where they run, and compared with those of dense training.

They are theoretical: what an ideal sparse kernel would need. Masked dense kernels, which is what runs here, save none.
The arithmetic is in :mod:`lightning_sparse.functional.flops`.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchmetrics import Metric
from typing_extensions import override

from lightning_sparse.functional.flops import sparse_flops, training_flops

__all__ = ["ForwardFLOPs", "InferenceFLOPs", "TrainingFLOPs"]

aten = torch.ops.aten

_PLAIN = Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]

# Operators for which torch has no formula and that apply weights to each of their inputs, and which of their arguments
# hold those weights. Recurrent layers have them in a list.
_APPLIERS = {
    aten.linear: slice(1, 2),
    aten._trilinear: slice(1, 2),
    aten.mkldnn_rnn_layer: slice(1, 3),
    aten._cudnn_rnn: slice(1, 2),
    aten.miopen_rnn: slice(1, 2),
    aten._lstm_mps: slice(2, 3),
}
_COPIES = {aten._to_copy, aten.clone}


class ForwardFLOPs(TorchDispatchMode):
    """Counts the operations of whatever runs in it, in total and for each parameter; a context manager.

    An operation belongs to the parameter whose memory it reads: so the projections of an attention layer count for
    their weights while attention itself, which has none, counts in the total alone, and a weight counts in whatever
    module or function uses it. Casts of autocast and products with a scalar are followed. Within ``torch.compile`` it
    sees the kernels that are called, not those that are generated; an operation on a weight that generated code has
    copied counts for the first parameter of its shape that has none yet. What runs, runs unchanged.

    Args:
        parameters: The parameters by name; those with less than two dimensions have no operations of their own.

    Attributes:
        total: Operations of all that ran: two for each multiplication and addition in matrix products, convolutions,
            attention and recurrent layers; the others count as none.
        by_parameter: Operations of each parameter with two dimensions or more.

    Example:
        >>> layer = torch.nn.Linear(4, 3)
        >>> with ForwardFLOPs(dict(layer.named_parameters())) as flops:
        ...     loss = layer(torch.ones(5, 4)).sum()
        >>> flops.total, flops.by_parameter
        (120, {'weight': 120})
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        weights = {name: parameter for name, parameter in parameters.items() if parameter.dim() > 1}
        self.total = 0
        self.by_parameter = dict.fromkeys(weights, 0)
        self._weights = weights
        self._memory: list[tuple[int, int, str]] = []  # start, end, name
        self._alive: list[Tensor] = []  # copies, whose memory must not be given to another tensor while we count

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run compiled (torch ≥ 2.9; before, it runs eagerly while this mode is on)."""
        return True

    @override
    def __enter__(self) -> ForwardFLOPs:
        self._memory.clear()
        for name, weight in self._weights.items():
            self._remember(weight, name)
        super().__enter__()
        return self

    @override
    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._alive.clear()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind.__torch_dispatch__ is not _PLAIN for kind in types):
            return NotImplemented  # a tensor subclass: let it unfold into operations on plain tensors
        result = func(*args, **(kwargs or {}))
        operator = getattr(func, "overloadpacket", func)
        if operator in _COPIES:
            self._follow(args[0], result)
        elif operator is aten.copy_:
            self._follow(args[1], args[0])
        elif operator is aten.mul:
            self._follow_scaled(_tensors(args), result)
        elif operator in _APPLIERS:
            for weight in _tensors(args[_APPLIERS[operator]]):
                if weight.dim() > 1:
                    self._count(2 * weight.numel() * _tokens(args[0]), weight)
        elif operator in flop_registry:
            self._count(_flops(flop_registry[operator], args, kwargs or {}, result), *_tensors(args))
        return result

    def _count(self, flops: int, *operands: Tensor) -> None:
        self.total += flops
        name = next((owner for owner in map(self._owner, operands) if owner), None) or self._adopt(operands)
        if name:
            self.by_parameter[name] += flops

    def _owner(self, tensor: Tensor) -> str | None:
        """The parameter whose memory ``tensor`` is, wholly or in part."""
        address = _address(tensor)
        index = bisect_right(self._memory, (address, float("inf"), "")) - 1
        if index < 0 or address >= self._memory[index][1]:
            return None
        return self._memory[index][2]

    def _adopt(self, operands: Sequence[Tensor]) -> str | None:
        """In compiled code, the first parameter without operations that has the shape of the last matrix."""
        matrices = [operand for operand in operands if operand.dim() > 1]
        if torch.is_grad_enabled() or not matrices:  # compiled code runs without, below autograd
            return None
        copy = matrices[-1]
        for name, weight in self._weights.items():
            if weight.shape in (copy.shape, copy.mT.shape) and not self.by_parameter[name]:
                self._follow(weight, copy)
                return name
        return None

    def _follow(self, source: Tensor, copy: Tensor) -> None:
        name = self._owner(source)
        if name:
            self._alive.append(copy)
            self._remember(copy, name)

    def _follow_scaled(self, factors: Sequence[Tensor], product: Tensor) -> None:
        """A weight times a scalar, as in a convolution that shares its weights, is still that weight."""
        if any(factor.dim() == 0 for factor in factors):
            for factor in factors:
                if factor.shape == product.shape:
                    self._follow(factor, product)

    def _remember(self, tensor: Tensor, name: str) -> None:
        start = _address(tensor)
        if start:
            insort(self._memory, (start, start + tensor.numel() * tensor.element_size(), name))


class InferenceFLOPs(Metric):
    """Operations of a forward pass over those of the dense network, in [0, 1].

    See :func:`~lightning_sparse.functional.flops.inference_flops`; several updates add up to one network.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = InferenceFLOPs()
        >>> metric.update([100.0], [0.9])
        >>> metric.update([], [], rest=100.0)
        >>> metric.compute()
        tensor(0.5500, dtype=torch.float64)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = False
    full_state_update: bool | None = False
    sparse: Tensor
    dense: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sparse", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("dense", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, dense: Sequence[float], sparsity: Sequence[float], rest: float = 0.0) -> None:
        """Add layers: their dense operations and sparsities, and the operations of what has no mask."""
        self.sparse += sparse_flops(dense, sparsity, rest)
        self.dense += sum(dense) + rest

    @override
    def compute(self) -> Tensor:
        return self.sparse / self.dense


class TrainingFLOPs(Metric):
    """Operations of training over those of dense training: the mean over steps.

    See :func:`~lightning_sparse.functional.flops.training_flops`; each update is a step.

    Args:
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = TrainingFLOPs()
        >>> metric.update(sparse=10.0, dense=100.0)
        >>> metric.update(sparse=10.0, dense=100.0, dense_gradients=90.0)
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = False
    full_state_update: bool | None = False
    spent: Tensor
    steps: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("spent", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("steps", default=torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, sparse: float, dense: float, dense_gradients: float = 0.0) -> None:
        """Add a step with the forward operations of the sparse and the dense network."""
        self.spent += training_flops(sparse, dense, dense_gradients)
        self.steps += 1

    @override
    def compute(self) -> Tensor:
        return self.spent / self.steps


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among ``values`` and in the lists among them."""
    flat = [item for value in values for item in (value if isinstance(value, list | tuple) else [value])]
    return [item for item in flat if isinstance(item, Tensor)]


def _tokens(inputs: Tensor) -> int:
    """How often a layer applies its weights to ``inputs``, which have their features in the last dimension."""
    return inputs.numel() // inputs.shape[-1]


def _address(tensor: Tensor) -> int:
    """Where the memory of ``tensor`` begins; 0 where it has none of its own."""
    return tensor.data_ptr() if tensor.layout is torch.strided else 0


def _flops(formula: Callable[..., int], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    try:
        return formula(*args, **kwargs, out_val=result)
    except Exception:  # a formula refuses what its operator has just done; to watch must not stop a training
        return 0
