"""Runs a program: a list of kernels, one after the other. Threads share each kernel, and meet before the next.

A program is an array of instructions of ``INSTRUCTION_WORDS`` 64-bit words: address of the kernel, number of its items,
then its record. Each thread calls ``run`` once, without Python's lock. All threads take an even share of the items, and
wait for each other after each instruction: the last to arrive opens the gate. A waiting thread spins for a while, since
the others are microseconds away; then it yields the core to other processes. All threads but the caller's are in
``work``, which runs job after job, and returns when none has come for a while.

A job consists of 64-bit words. A word that several threads write has a cache line of its own:

====  =============================================================
0     address of the program
1     number of instructions
2     number of threads
3     address of a function without arguments that yields the core
8     threads that have arrived at the gate
16    how often the gate has been opened
24    how many jobs have been given to the workers
====  =============================================================
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from lightning_sparse.execution.kernels.llvm.emitter import I32, I64, POINTER

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["INSTRUCTION_WORDS", "JOBS_GIVEN", "JOB_WORDS", "NUM_THREADS", "emit_driver"]

INSTRUCTION_WORDS = 24
JOB_WORDS = 32
PROGRAM, NUM_INSTRUCTIONS, NUM_THREADS, YIELD, ARRIVED, OPENED, JOBS_GIVEN = 0, 1, 2, 3, 8, 16, 24
SPINS = 2000
"""How often a thread looks at the gate before it yields the core: some 50 microseconds."""

KERNEL_TYPE = ir.FunctionType(ir.VoidType(), [POINTER, I64, I64])


def emit_driver(module: ir.Module, *, x86: bool) -> None:
    """Add ``run(job, thread)`` and ``work(job, thread, seen, spins)`` to a module.

    Args:
        module: The module to which they are added.
        x86: Whether the machine has the instruction that tells a core that its thread spins.
    """
    pause = module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), [])) if x86 else None
    run = _emit_run(module, pause)
    _emit_work(module, run, pause)


class _Words:
    """Reads and writes 64-bit words at a base address."""

    def __init__(self, build: ir.IRBuilder, base: Any) -> None:
        self.build = build
        self.base = base

    def address(self, place: Any) -> Any:
        """Return the address of a word."""
        index = place if isinstance(place, ir.Value) else ir.Constant(I64, place)
        return self.build.gep(self.base, [index], source_etype=I64)

    def load(self, place: Any) -> Any:
        """Read a word that no other thread writes."""
        return self.build.load(self.address(place), typ=I64)

    def load_atomic(self, place: Any) -> Any:
        """Read a word, and see everything that was written before it."""
        return self.build.load_atomic(self.address(place), "acquire", 8, typ=I64)


@contextmanager
def _counted(build: ir.IRBuilder, stop: Any) -> Generator[Any]:
    """Run the block for 0, 1, ..., stop - 1."""
    with build.goto_entry_block():
        counter = build.alloca(I64)
    build.store(ir.Constant(I64, 0), counter)
    head, body, done = (build.append_basic_block(name) for name in ("head", "body", "done"))
    build.branch(head)
    build.position_at_end(head)
    index = build.load(counter, typ=I64)
    build.cbranch(build.icmp_signed("<", index, stop), body, done)
    build.position_at_end(body)
    yield index
    build.store(build.add(index, ir.Constant(I64, 1)), counter)
    build.branch(head)
    build.position_at_end(done)


def _emit_run(module: ir.Module, pause: Any) -> ir.Function:
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER, I64]), "run")
    build = ir.IRBuilder(function.append_basic_block("entry"))
    job, thread = _Words(build, function.args[0]), function.args[1]
    program = _Words(build, build.inttoptr(job.load(PROGRAM), POINTER))
    threads = job.load(NUM_THREADS)
    several = build.icmp_signed(">", threads, ir.Constant(I64, 1))
    with _counted(build, job.load(NUM_INSTRUCTIONS)) as number:
        start = build.mul(number, ir.Constant(I64, INSTRUCTION_WORDS))
        kernel = build.inttoptr(program.load(start), KERNEL_TYPE.as_pointer())
        items = program.load(build.add(start, ir.Constant(I64, 1)))
        record = program.address(build.add(start, ir.Constant(I64, 2)))
        begin = build.sdiv(build.mul(items, thread), threads)
        end = build.sdiv(build.mul(items, build.add(thread, ir.Constant(I64, 1))), threads)
        build.call(kernel, [record, begin, end])
        with build.if_then(several):
            _emit_gate(build, job, threads, pause)
    build.ret_void()
    return function


def _emit_gate(build: ir.IRBuilder, job: _Words, threads: Any, pause: Any) -> None:
    one = ir.Constant(I64, 1)
    opened = job.load_atomic(OPENED)
    arrived = build.atomic_rmw("add", job.address(ARRIVED), one, "acq_rel")
    with build.if_else(build.icmp_signed("==", build.add(arrived, one), threads)) as (last, other):
        with last:
            build.atomic_rmw("xchg", job.address(ARRIVED), ir.Constant(I64, 0), "release")
            build.atomic_rmw("add", job.address(OPENED), one, "release")
        with other:
            _emit_spin(build, job, OPENED, opened, pause)


def _emit_work(module: ir.Module, run: ir.Function, pause: Any) -> None:
    """``work``: run each job after the first ``seen`` jobs. When none comes for a while, return how many have come."""
    function = ir.Function(module, ir.FunctionType(I64, [POINTER, I64, I64, I64]), "work")
    build = ir.IRBuilder(function.append_basic_block("entry"))
    address, thread, seen, patience = function.args
    job = _Words(build, address)
    place = build.alloca(I64)
    build.store(seen, place)
    wait, busy, idle = (build.append_basic_block(name) for name in ("wait", "busy", "idle"))
    build.branch(wait)
    build.position_at_end(wait)
    known = build.load(place, typ=I64)
    _emit_spin(build, job, JOBS_GIVEN, known, pause, patience)
    given = job.load_atomic(JOBS_GIVEN)
    build.cbranch(build.icmp_signed("!=", given, known), busy, idle)
    build.position_at_end(busy)
    build.store(given, place)
    build.call(run, [address, thread])
    build.branch(wait)
    build.position_at_end(idle)
    build.ret(known)


def _emit_spin(build: ir.IRBuilder, job: _Words, place: int, old: Any, pause: Any, patience: Any | None = None) -> None:
    """Wait until a word differs from ``old``, or for ``patience`` looks at it; without ``patience``, yield the core."""
    with build.goto_entry_block():
        counter = build.alloca(I64)
    build.store(ir.Constant(I64, 0), counter)
    head, wait, done = (build.append_basic_block(name) for name in ("spin", "wait", "through"))
    build.branch(head)
    build.position_at_end(head)
    count = build.load(counter, typ=I64)
    goes_on = build.icmp_signed("==", job.load_atomic(place), old)
    if patience is not None:
        goes_on = build.and_(goes_on, build.icmp_signed("<", count, patience))
    build.cbranch(goes_on, wait, done)
    build.position_at_end(wait)
    build.store(build.add(count, ir.Constant(I64, 1)), counter)
    if pause is not None:
        build.call(pause, [])
    if patience is None:
        with build.if_then(build.icmp_signed(">", count, ir.Constant(I64, SPINS))):
            build.call(build.inttoptr(job.load(YIELD), ir.FunctionType(I32, []).as_pointer()), [])
    build.branch(head)
    build.position_at_end(done)
