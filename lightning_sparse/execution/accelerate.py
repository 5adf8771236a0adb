"""``accelerate``: fold, shrink, time each layer, replace slow ones, time the whole, and return the faster module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.execution.accelerated import AcceleratedModule, Recipe
from lightning_sparse.execution.copying import frozen_copy, with_linear_layers
from lightning_sparse.execution.dead_units import can_shrink, shrunk
from lightning_sparse.execution.examples import Call, unfit
from lightning_sparse.execution.kernels import KernelsUnavailableError, available_kernels, default_kernels
from lightning_sparse.execution.layers import (
    SEMI_STRUCTURED,
    InputSpec,
    input_specs,
    layers_with_zeros,
    time_layer,
    unread_layers,
)
from lightning_sparse.execution.report import AccelerationReport, LayerChoice
from lightning_sparse.execution.timing import compare_rounds, num_threads, shown
from lightning_sparse.execution.tracing import UntraceableError, trace

__all__ = ["accelerate"]

LEAST_GAIN_OF_THE_WHOLE = 1.03
"""Below that a gain is not told from noise, and the module is returned as it is."""

LEAST_GAIN_BESIDE_SPARSE = 0.6
"""A layer that is not faster may still be tried among sparse ones, where it spares two changes of layout."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Outputs may differ so much, relative to the largest; 0.01 in narrower types."""


def accelerate(
    module: nn.Module,
    example_input: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    threads: int | None = None,
    kernels: str | None = None,
    seconds: float = 1.0,
) -> AcceleratedModule:
    """Make a module with zeros faster for inference on a CPU, if that is possible.

    BatchNorms are folded and dead units removed. Each layer is timed dense and sparse on inputs of the example's size,
    and replaced if the sparse one is at least 1.1 times as fast. Then the result is timed against the original module.
    Its outputs are the same, up to rounding. Other batch sizes work, but the choice is made for the example's size.

    Args:
        module: Any torch module, in fp32 or fp64, on the CPU. It is never changed. The result computes as the module
            does in evaluation mode.
        example_input: The input of a call: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        threads: Number of threads; by default torch's current number. The dense module is timed with the same number.
            Sparse layers use only one thread if that is faster.
        kernels: ``llvm`` or ``torch_csr``; by default the fastest that is installed.
        seconds: Approximate time for timing each variant of the whole network. Each layer takes another 0.03 s.

    Returns:
        A module with the same outputs. Its ``report`` says what was chosen for each layer and what it gained. If the
        module has no zeros, or nothing makes it faster, the result calls the module unchanged.

    Raises:
        ValueError: The example does not fit the module, is empty or nested; the module cannot be copied, is sharded,
            wrapped, TorchScript, not initialised yet, or on another device; or the kernels are not installed.

    On an NVIDIA GPU, linear layers in fp16 or bf16 that satisfy 2:4 are stored as 2:4 instead, if that is faster; see
    :func:`~lightning_sparse.execution.project_to_2_4`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_sparse import accelerate
        >>> network = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
        >>> _ = network[0].weight.data.mul_(torch.rand(512, 512) > 0.95)
        >>> fast = accelerate(network, torch.randn(16, 512), threads=1)
        >>> fast(torch.randn(3, 512)).shape
        torch.Size([3, 10])
        >>> [layer.name for layer in fast.report.layers]
        ['0']
    """
    threads = _checked_threads(threads)
    seconds = _checked_seconds(seconds)
    device = _checked_device(module)
    kernels = SEMI_STRUCTURED if device.startswith("cuda") else _checked_kernels(kernels)
    call = Call.of(example_input)
    with torch.no_grad(), num_threads(threads):
        return _Acceleration(module, call, kernels, threads, seconds, device).result()


class _Acceleration:
    """One call of ``accelerate``: what is known of the module, and what was found."""

    def __init__(self, module: nn.Module, call: Call, kernels: str, threads: int, seconds: float, device: str) -> None:
        self.module = module
        self.call = call
        self.kernels = kernels
        self.threads = threads
        self.seconds = seconds
        self.device = device
        self.dense = frozen_copy(module)
        given = (*_tensors(call.args), *_tensors(call.kwargs))
        self.error = _allowed_error([*self.dense.parameters(), *self.dense.buffers(), *given])
        self.notes: list[str] = []
        self.layers: dict[tuple[bool, int], list[LayerChoice]] = {}  # by whether units are gone, and threads
        self.outputs = self._run_example()

    def result(self) -> AcceleratedModule:
        """Return the faster of both."""
        if not any(share for _, _, share in layers_with_zeros(self.dense)):
            return self._as_it_is(
                f"The module has no zeros in linear layers or convolutions{_unread(self.dense)}", warn=True
            )
        if self._changes():
            return self._as_it_is("Two calls on the example differ, or a call writes the module's buffers")
        tried = map(self._try, shown(self._recipes(), "Making variants"))
        candidates = [made for made in tried if made is not None]
        if not candidates:
            return self._as_it_is("No layer is faster sparse on this example")
        calls: dict[str, Callable[[], Any]] = {"dense": lambda: self.call(self.dense)}
        calls |= {str(number): _calling(self.call, made) for number, made in enumerate(candidates)}
        what = f"Timing the module and {len(candidates)} variants"
        rounds = compare_rounds(calls, budget=self.seconds, rounds=11, device=self.device, what=what)
        timed = [(rounds[str(number)], made) for number, made in enumerate(candidates)]
        fastest, best = min(timed, key=lambda pair: min(pair[0]))
        by_gain = sorted(zip(rounds["dense"], fastest, strict=True), key=lambda pair: pair[0] / pair[1])
        low, middle, high = quantiles([dense / fast for dense, fast in by_gain], method="inclusive")
        # In a quarter of the rounds, or where each is undisturbed:
        if min(low, min(rounds["dense"]) / min(fastest)) < LEAST_GAIN_OF_THE_WHOLE:
            return self._as_it_is(
                f"The fastest variant is {middle:.2f} times as fast as the dense module ({low:.2f} to {high:.2f})"
            )
        assert best.recipe is not None
        if best.recipe.threads != self.threads:
            self._note("Sparse layers compute on one thread, which was faster than on several.")
        dense, fast = by_gain[len(by_gain) // 2]
        best.report = replace(self._report(best.recipe, dense, fast), gain_range=(low, high))
        return best

    def _run_example(self) -> list[Tensor]:
        """Return the dense module's outputs."""
        try:
            return _tensors(self.call(self.dense))
        except Exception as error:  # whatever the user's module raises when its input does not fit
            raise unfit(self.module, self.call.kwargs or self.call.args, error) from error

    def _changes(self) -> bool:
        """Whether a call depends on chance or on calls before it, so that outputs cannot be compared."""
        before = _versions(self.dense)
        again = self._run_example()
        return before != _versions(self.dense) or _difference(again, self.outputs, self.error) > 1

    def _recipes(self) -> list[Recipe]:
        """What is worth trying: layers that gain alone, those beside them too, without dead units, and none."""
        recipes: list[Recipe] = []
        arguments = tuple(InputSpec.of(x) if isinstance(x, Tensor) else x for x in self.call.args)
        for shrink in (False, True) if self._has_dead_units() else (False,):
            own = with_linear_layers(frozen_copy(self.module))
            network, traced = self._traced(shrunk(own, self.call.args) if shrink else own)
            for part in network.modules():
                if isinstance(part, nn.TransformerEncoder):
                    part.use_nested_tensor = False  # sparse layers take none
            specs = input_specs(network, _calling(self.call, network))
            for threads in self._numbers_of_threads():
                choices = self.layers[shrink, threads] = self._time(network, specs, threads, inside=traced)
                gaining = frozenset(choice.name for choice in choices if choice.sparse)
                beside = frozenset(choice.name for choice in choices if (choice.gain or 0) >= LEAST_GAIN_BESIDE_SPARSE)
                sets = [gaining, beside if traced and gaining else gaining, frozenset[str]()]
                recipes += [
                    Recipe(layers, traced, self.kernels, threads, arguments, specs, shrink)
                    for layers in dict.fromkeys(sets)
                    # A network may gain by folding and shrinking alone.
                    if layers or ((traced or shrink) and threads == self.threads)
                ]
        return recipes

    def _numbers_of_threads(self) -> list[int]:
        """How many threads sparse layers may have: a small one is done before another thread has heard of it."""
        return list(dict.fromkeys([self.threads, 1] if self.kernels == "llvm" else [self.threads]))

    def _has_dead_units(self) -> bool:
        if not can_shrink() or self.call.kwargs or self.kernels == SEMI_STRUCTURED:
            return False
        try:
            small = shrunk(with_linear_layers(frozen_copy(self.module)), self.call.args)
        except Exception as error:  # shrinking is one help among others
            self._note(f"Dead units stay: {error}")
            return False
        sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (small, self.dense)]
        return sizes[0] < sizes[1]

    def _traced(self, own: nn.Module) -> tuple[nn.Module, bool]:
        """Return a graph of the network, or the network itself where it cannot be traced."""
        try:
            if self.call.kwargs:
                raise UntraceableError("The example has keyword arguments.")
            if self.kernels == SEMI_STRUCTURED:
                raise UntraceableError("Nothing is fused on a GPU.")
            return trace(own, self.call.args), True
        except UntraceableError as error:
            self._note(f"Layers are replaced one by one: {error}")
            return own, False

    def _time(
        self, network: nn.Module, specs: Mapping[str, InputSpec], threads: int, *, inside: bool
    ) -> list[LayerChoice]:
        """Time every layer that has zeros, and among convolutions in a graph those without, too."""
        layers = [
            (name, layer, share)
            for name, layer, share in layers_with_zeros(network)
            if share or (inside and self.kernels == "llvm" and isinstance(layer, nn.Conv2d))
        ]
        return [
            time_layer(name, layer, share, specs.get(name), kernels=self.kernels, threads=threads, inside=inside)
            for name, layer, share in shown(layers, "Timing layers")
        ]

    def _try(self, recipe: Recipe) -> AcceleratedModule | None:
        """Return a module made by a recipe, if its outputs are those of the dense one."""
        try:
            made = AcceleratedModule(self.module, recipe, self._report(recipe, None, None))
            outputs = _tensors(self.call(made))
        except Exception as error:  # a graph may take a turn that the module would not; then it is no candidate
            self._note(f"One variant failed: {error}")
            return None
        difference = _difference(outputs, self.outputs, self.error)
        if difference > 1:
            off = f"differ by {difference:.1g} times the allowed error"
            off = off if math.isfinite(difference) else "have another shape or type, or NaN elsewhere"
            self._note(f"One variant was dropped: its outputs {off}.")
            return None
        return made

    def _report(self, recipe: Recipe | None, dense: float | None, fast: float | None) -> AccelerationReport:
        return AccelerationReport(
            layers=self._final_choices(recipe),
            kernels=self.kernels,
            threads=self.threads,
            input_shapes=self.call.shapes,
            dense_seconds=dense,
            fast_seconds=fast,
            accelerated=fast is not None,
            notes=tuple(self.notes),
        )

    def _final_choices(self, recipe: Recipe | None) -> list[LayerChoice]:
        """Say of each layer whether the recipe has it."""
        chosen = frozenset[str]() if recipe is None else recipe.layers
        key = (False, self.threads) if recipe is None else (recipe.shrink, recipe.threads)
        layers = self.layers.get(key, [])
        return [
            replace(layer, sparse=layer.name in chosen, reason=_reason(layer, layer.name in chosen))
            for layer in layers
            if layer.sparsity or layer.name in chosen
        ]

    def _note(self, text: str) -> None:
        note = text.splitlines()[0]
        if note not in self.notes:
            self.notes.append(note)

    def _as_it_is(self, finding: str, *, warn: bool = False) -> AcceleratedModule:
        note = f"{finding}, so the module is returned unchanged."
        self.notes.append(note)
        if warn:
            warnings.warn(note, stacklevel=4)
        return AcceleratedModule(self.module, None, self._report(None, None, None))


def _reason(layer: LayerChoice, is_chosen: bool) -> str:
    """Why a layer is dense, or why it is sparse though that was no faster when it was timed alone."""
    if is_chosen:
        return "" if layer.sparse else "no faster alone, but the network is"
    return layer.reason or "the network is faster without it"


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """Which buffers a module has, and how often each was written."""
    return [(id(x), 0 if x.is_inference() else x._version) for x in module.buffers()]


def _unread(module: nn.Module) -> str:
    """Which layers have weights whose zeros cannot be counted, for a sentence; empty if none has."""
    names = unread_layers(module)
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" (those of {', '.join(names[:3])}{more} are not counted, because their weights are not plain tensors)"


def _calling(call: Call, module: nn.Module) -> Callable[[], Any]:
    return lambda: call(module)


def _allowed_error(tensors: Iterable[Tensor]) -> float:
    """The largest tolerance of any of their types; 0 if none has floating-point values."""
    real = {tensor.dtype.to_real() for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()}
    return max((TOLERANCE.get(dtype, 1e-2) for dtype in real), default=0.0)


def _difference(outputs: list[Tensor], expected: list[Tensor], error: float) -> float:
    """How far outputs are off, in units of what they may be; infinite if they are others altogether.

    They may be off by ``error``, what the module computes with allows, as an output in fp64 may come from sums in fp32;
    and by more in an output of a narrower type.
    """
    if [(x.shape, x.dtype) for x in outputs] != [(x.shape, x.dtype) for x in expected]:
        return float("inf")
    worst = 0.0
    for x, y in zip(outputs, expected, strict=True):
        allowed = _allowed_error([y])
        if not allowed or not y.numel():
            continue
        off = (x - y).abs().nan_to_num(0.0 if torch.equal(x.isnan(), y.isnan()) else float("inf")).max()
        scale = y.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(1e-30)
        worst = max(worst, float(off / scale) / max(error, allowed))
    return worst


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a module's output, however nested."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _tensors(item)]


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return torch.get_num_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads is {threads!r}; give a whole number of at least 1, or None for as many as torch's.")
    return threads


def _checked_seconds(seconds: Any) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds!r}; give the time for the whole network, a number above 0, such as 1.0.")
    return float(seconds)


def _checked_kernels(kernels: str | None) -> str:
    if kernels is None:
        return default_kernels()
    if kernels not in available_kernels():
        raise KernelsUnavailableError(
            f"kernels is {kernels!r}; available are {', '.join(available_kernels())}. The kernels 'llvm' come with pip"
            " install 'lightning-sparse[fast]'."
        )
    return kernels


def _checked_device(module: nn.Module) -> str:
    """Return the one device of a module: the CPU, or an NVIDIA GPU."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"accelerate was given {type(module).__name__}; give a torch.nn.Module.")
    if isinstance(module, AcceleratedModule):
        raise ValueError(
            "The module is accelerated already. Call refresh() if its weights have changed, or give the original"
            " module."
        )
    lazy = next((name for name, parameter in module.named_parameters() if nn.parameter.is_lazy(parameter)), None)
    if lazy is not None:
        raise ValueError(f"{lazy} has no values yet; call the module once to give it a shape.")
    devices = sorted({str(parameter.device) for parameter in module.parameters()}) or ["cpu"]
    if len(devices) > 1 or not devices[0].startswith(("cpu", "cuda")):
        raise ValueError(
            f"The module is on {', '.join(devices)}; sparse kernels run on a CPU, and 2:4 on one NVIDIA GPU. Give a"
            " copy on one of them."
        )
    return devices[0]
