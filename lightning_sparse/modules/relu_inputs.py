"""Finds the inputs of a module's ReLUs, and which modules call relu as a function, by running a copy of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import Self, override

from lightning_sparse.execution.examples import arguments_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Watch", "watch_a_step"]

_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
# Modules whose features are the last dimension. After one of them, dimension 1 counts positions, not channels.
_FEATURES_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)


def watch_a_step(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Watch:
    """Run a copy of a module, and return what was observed.

    Args:
        trainer: Gives a batch if the module has no ``example_input_array``.
        pl_module: The module; it does not change.

    Raises:
        MisconfigurationException: It cannot be copied, or the copy cannot compute.
    """
    pl_module.trainer, its_trainer = None, pl_module.trainer  # which no copy needs; without one, log does nothing
    try:
        module = copy.deepcopy(pl_module).eval()
    except Exception as error:
        raise MisconfigurationException(
            "DyReLUPhasing runs a copy of the module to count the channels at each ReLU, but"
            f" {type(pl_module).__name__} cannot be copied: {error!r}. Keep out of the module what copy.deepcopy"
            " refuses, such as locks, open files and tensors that have a gradient history."
        ) from error
    finally:
        pl_module.trainer = its_trainer
    watch, failures = Watch(module), list[str]()
    for compute in _ways_to_compute(trainer, pl_module, module):
        failure = watch.see(compute)
        if failure is None:
            return watch
        failures.append(repr(failure))
    raise MisconfigurationException(
        f"DyReLUPhasing needs the number of channels at each ReLU, but {type(pl_module).__name__} could not be run:"
        f" {'; '.join(failures)}. Set self.example_input_array in its __init__ to what forward takes, a batch of two"
        " or so."
    )


class Watch(TorchFunctionMode):
    """Observes the inputs of each ``nn.ReLU``, and which modules call relu as a function.

    Args:
        module: Whose ``forward``, and that of all modules inside, is watched.

    Attributes:
        channels: The numbers of channels that came to each ReLU, by its name.
        features_last: Names of the ReLUs to which features came in the last of several dimensions.
        functions: Names of the modules that call relu as a function.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.channels: dict[str, set[int]] = {}
        self.features_last: set[str] = set()
        self.functions: set[str] = set()
        self._names = {child: name or type(child).__name__ for name, child in module.named_modules()}
        self._at_work: list[nn.Module] = []
        self._latest: nn.Module | None = None
        self._handles: list[RemovableHandle] = []

    @override
    def __enter__(self) -> Self:
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._begin))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
        return super().__enter__()  # type: ignore[no-any-return]

    @override
    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def see(self, compute: Callable[[], object]) -> Exception | None:
        """Watch ``compute``; return what it raised."""
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
                warnings.simplefilter("ignore")
                with torch.no_grad(), self:
                    compute()
        except Exception as error:  # whatever a user's code may raise
            return error
        return None

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._at_work.append(module)
        if not isinstance(module, nn.ReLU) or inputs[0].dim() < 2:
            return
        if inputs[0].dim() > 2 and isinstance(self._latest, _FEATURES_LAST):
            self.features_last.add(self._names[module])
        else:
            self.channels.setdefault(self._names[module], set()).add(inputs[0].shape[1])

    def _end(self, module: nn.Module, *_: Any) -> None:
        self._at_work.pop()
        if next(module.parameters(recurse=False), None) is not None:
            self._latest = module

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _RELU_FUNCTIONS and self._at_work and not isinstance(self._at_work[-1], nn.ReLU):
            self.functions.add(self._names[self._at_work[-1]])
        return func(*args, **(kwargs or {}))


def _ways_to_compute(
    trainer: pl.Trainer, pl_module: pl.LightningModule, module: pl.LightningModule
) -> Iterator[Callable[[], object]]:
    # An earlier fit may have left it in half or double precision, or on another device.
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in module.parameters()) else torch.float32
    module.to(dtype)

    def converted(value: Any) -> Any:
        return apply_to_collection(
            value, Tensor, lambda part: part.to(module.device, dtype if part.is_floating_point() else None)
        )

    example = module.example_input_array
    if example is not None:
        args, kwargs = arguments_of(converted(example))
        yield lambda: module(*args, **kwargs)
        return

    def batch() -> Any:
        loader = trainer.fit_loop._data_source.dataloader()  # pyright: ignore[reportPrivateUsage]
        combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
        first = pl_module._on_before_batch_transfer(next(iter(combined))[0])  # pyright: ignore[reportPrivateUsage]
        return converted(pl_module._apply_batch_transfer_handler(first, module.device))  # pyright: ignore[reportPrivateUsage]

    yield lambda: module.training_step(batch(), 0)
    # What computes losses in training mode alone, as the detectors of torchvision do.
    yield lambda: module.train().training_step(batch(), 0)
    yield lambda: module.eval()(_first_of(batch()))


def _first_of(batch: Any) -> Any:
    return batch[0] if isinstance(batch, list | tuple) else batch
