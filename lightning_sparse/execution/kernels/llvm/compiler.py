"""Compiles the kernels for this machine at first use. Python writes the IR, llvmlite turns it into machine code."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, final

import torch
from llvmlite import binding, ir

from lightning_sparse.execution.kernels.llvm.activations import GELU
from lightning_sparse.execution.kernels.llvm.driver import emit_driver
from lightning_sparse.execution.kernels.llvm.emitter import I64, POINTER, Elements, Emitter, Kernel
from lightning_sparse.execution.kernels.llvm.layouts import PAD, PHASES, TRANSPOSE, UNPAD
from lightning_sparse.execution.kernels.llvm.offsets import OFFSETS
from lightning_sparse.execution.kernels.llvm.pooling import LARGEST, MEAN
from lightning_sparse.execution.kernels.llvm.vectors import VECTORS_16, VECTORS_32

__all__ = ["KERNELS", "Library", "Target", "host_target", "library"]

KERNELS = (OFFSETS, VECTORS_16, VECTORS_32, TRANSPOSE, PAD, UNPAD, PHASES, LARGEST, MEAN, GELU)
SCALARS: dict[torch.dtype, Any] = {torch.float32: ir.FloatType(), torch.float64: ir.DoubleType()}


@final
@dataclass(frozen=True)
class Target:
    """The processor for which code is compiled.

    Args:
        cpu: LLVM's name for the processor.
        features: LLVM's list of its instruction sets, as in ``"+avx2,-avx512f"``.
        vector_bytes: Width of vectors: 64 with AVX-512, 32 with AVX2, else 16.
        gathers: Whether to load scattered elements by one instruction. Zen has it, but in microcode, which is slow.
    """

    cpu: str
    features: str
    vector_bytes: int
    gathers: bool = False


@final
@dataclass(frozen=True)
class Library:
    """The kernels in machine code, for one type of elements.

    Args:
        lanes: Elements of a vector.
        dtype: The type of the elements.
        addresses: The address of each kernel, by its name.
        run: ``run(job, thread)``; see :mod:`~lightning_sparse.execution.kernels.llvm.driver`.
        work: ``work(job, thread, seen, spins)``; see there too.
        engine: Owns the machine code.
    """

    lanes: int
    dtype: torch.dtype
    addresses: dict[str, int]
    run: Callable[[int, int], None]
    work: Callable[[int, int, int, int], int]
    engine: Any = field(repr=False)


_COMPILING = threading.Lock()


def library(dtype: torch.dtype) -> Library:
    """Return the kernels for this machine. The first call for a type compiles them, in a fraction of a second.

    Args:
        dtype: ``torch.float32`` or ``torch.float64``.

    Example:
        >>> import torch
        >>> from lightning_sparse.execution.kernels.llvm.compiler import library
        >>> library(torch.float32) is library(torch.float32)
        True
    """
    with _COMPILING:
        return _compiled(dtype, host_target())


@lru_cache(maxsize=1)
def host_target() -> Target:
    """Return the processor of this machine.

    Example:
        >>> from lightning_sparse.execution.kernels.llvm.compiler import host_target
        >>> host_target().vector_bytes in (16, 32, 64)
        True
    """
    _initialize()
    features = binding.get_host_cpu_features()
    width = 64 if features.get("avx512f") else 32 if features.get("avx2") else 16
    cpu = binding.get_host_cpu_name()
    return Target(cpu, features.flatten(), width, gathers=width > 16 and not cpu.startswith("znver"))


@lru_cache(maxsize=1)
def _initialize() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


@lru_cache(maxsize=8)
def _compiled(dtype: torch.dtype, target: Target) -> Library:
    _initialize()
    elements = Elements(SCALARS[dtype], target.vector_bytes // dtype.itemsize, target.gathers)
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, jit=True
    )
    module = binding.parse_assembly(str(_written(elements, machine)))
    module.verify()
    _optimize(module, machine)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
    work = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return Library(
        lanes=elements.lanes,
        dtype=dtype,
        addresses={kernel.name: engine.get_function_address(kernel.name) for kernel in KERNELS},
        run=run(engine.get_function_address("run")),
        work=work(engine.get_function_address("work")),
        engine=engine,
    )


def _written(elements: Elements, machine: Any) -> ir.Module:
    """Return the IR of all kernels."""
    module = ir.Module(name="lightning_sparse")
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    for kernel in KERNELS:
        _write(module, kernel, elements)
    emit_driver(module, x86=machine.triple.startswith(("x86_64", "i686")))
    return module


def _write(module: ir.Module, kernel: Kernel, elements: Elements) -> None:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER, I64, I64]), kernel.name)
    kernel.emit(Emitter(function, kernel.layout, elements))


def _optimize(module: Any, machine: Any) -> None:
    """Turn variables into registers and simplify. Loops do not change: they are written as they should run."""
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    options.loop_interleaving = False
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
