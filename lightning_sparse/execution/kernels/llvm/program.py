"""Programs: instructions for the kernels, the arrays that they read, and the threads that run them."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_sparse.execution.kernels.llvm.compiler import Library
from lightning_sparse.execution.kernels.llvm.driver import (
    INSTRUCTION_WORDS,
    JOB_WORDS,
    JOBS_GIVEN,
    NUM_THREADS,
    YIELD,
)
from lightning_sparse.execution.kernels.llvm.emitter import Kernel

__all__ = ["Program", "Team", "address_of", "aligned", "bits_of", "team"]

IDLE_SPINS = 4000
"""How often a worker looks for a job before it sleeps: some 100 microseconds. Most networks call again by then."""


def bits_of(number: float) -> int:
    """Return the bits of a double as an integer, the form in which records hold numbers.

    Example:
        >>> bits_of(0.0), bits_of(2.0) == 2**62
        (0, True)
    """
    return struct.unpack("<q", struct.pack("<d", number))[0]


def address_of(x: Tensor, size: Any) -> int:
    """Return the address of a tensor's first number.

    Args:
        x: Contiguous.
        size: One of its sizes. It is a tensor if ``torch.jit.trace`` follows the call.

    Raises:
        RuntimeError: The tensor has no memory: it is a symbol of a tracer.
    """
    address = x.data_ptr()
    if type(size) is not int or (address == 0 and x.numel()):
        raise RuntimeError("The tensor has no numbers in memory.")
    return address


@final
class Program:
    """Kernels, one after the other, and the records that they work on.

    Args:
        library: The kernels.
        threads: How many threads share each kernel's items.
    """

    def __init__(self, library: Library, threads: int) -> None:
        self.library = library
        self.threads = threads
        self._instructions: list[list[int]] = []
        self._held: list[Any] = []
        self.words: Any = None
        self.run: Callable[[], None]
        self._job: Any = None

    def hold(self, array: NDArray[Any]) -> int:
        """Keep an array for as long as the program lives, and return its address."""
        self._held.append(array)
        return array.ctypes.data

    def add(self, kernel: Kernel, items: int, **record: int) -> int:
        """Append an instruction and return its number. ``record`` holds the kernel's fields."""
        words = [self.library.addresses[kernel.name], items, *kernel.layout.words(**record)]
        self._instructions.append(words + [0] * (INSTRUCTION_WORDS - len(words)))
        return len(self._instructions) - 1

    def port(self, instruction: int, kernel: Kernel, field: str) -> int:
        """Return the index, in :attr:`words`, of an instruction's field that changes from call to call."""
        return instruction * INSTRUCTION_WORDS + 2 + kernel.layout.place(field)

    def seal(self) -> None:
        """Make the program ready. Then ``words`` can be set, and ``run()`` runs it; append nothing afterwards."""
        words = [word for instruction in self._instructions for word in instruction]
        self.words = (ctypes.c_int64 * max(1, len(words)))(*words)
        self._job = (ctypes.c_int64 * JOB_WORDS)()
        self._job[0] = ctypes.addressof(self.words)
        self._job[1] = len(self._instructions)
        self._job[NUM_THREADS] = self.threads
        if self.threads == 1:
            # Small networks take a few microseconds, so a call looks nothing up.
            self.run = partial(self.library.run, ctypes.addressof(self._job), 0)
        else:
            self.run = self._run_together

    def _run_together(self) -> None:
        team(self.library, self.threads).run(self._job[0], self._job[1])

    @contextmanager
    def only(self, kernels: Collection[Kernel]) -> Generator[None]:
        """Run only these kernels for a while; they must be neighbours in the program."""
        addresses = {self.library.addresses[kernel.name] for kernel in kernels}
        chosen = [number for number, words in enumerate(self._instructions) if words[0] in addresses]
        before = self._job[0], self._job[1]
        self._job[0] += chosen[0] * INSTRUCTION_WORDS * 8
        self._job[1] = chosen[-1] + 1 - chosen[0]
        try:
            yield
        finally:
            self._job[0], self._job[1] = before


@final
class Team:
    """Threads that run programs together with the calling thread. They sleep when none comes for a while.

    Args:
        library: The kernels.
        threads: How many, including the caller.
    """

    def __init__(self, library: Library, threads: int) -> None:
        self.library = library
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._job = (ctypes.c_int64 * (JOB_WORDS + 8))()
        start = ctypes.addressof(self._job)
        self._address = start + -start % 64
        self._at = (ctypes.c_int64 * JOB_WORDS).from_address(self._address)
        self._at[NUM_THREADS] = threads
        self._at[YIELD] = _yield_address()
        self._asleep = [False] * threads
        self._alarms = [threading.Semaphore(0) for _ in range(threads)]
        for number in range(1, threads):
            threading.Thread(target=self._work, args=(number,), daemon=True, name="lightning_sparse").start()

    def run(self, program: int, num_instructions: int) -> None:
        """Run the program at an address on all threads, and return when all are done."""
        with self._lock:
            self._at[0], self._at[1] = program, num_instructions
            self._at[JOBS_GIVEN] += 1
            for number in range(1, len(self._asleep)):
                if self._asleep[number]:
                    self._asleep[number] = False
                    self._alarms[number].release()
            self.library.run(self._address, 0)

    def _work(self, number: int) -> None:
        """Run this thread's share of every job. The caller waits for it at the gate after each instruction."""
        seen = 0
        while True:
            seen = self.library.work(self._address, number, seen, IDLE_SPINS)
            # The caller counts a job, then looks for sleepers. A worker marks itself asleep, then looks for a job. So
            # no job is missed.
            self._asleep[number] = True
            if self._at[JOBS_GIVEN] == seen:
                self._alarms[number].acquire()
            self._asleep[number] = False


_TEAMS: dict[tuple[str, int], Team] = {}
_TEAMS_LOCK = threading.Lock()


def team(library: Library, threads: int) -> Team:
    """Return a team of this process with so many threads. A forked child gets a team of its own."""
    key = (str(library.dtype), threads)
    found = _TEAMS.get(key)
    if found is not None and found.process == os.getpid() and found.library is library:
        return found
    with _TEAMS_LOCK:
        found = _TEAMS.get(key)
        if found is None or found.process != os.getpid() or found.library is not library:
            found = _TEAMS[key] = Team(library, threads)
        return found


def _yield_address() -> int:
    """Return the address of a system function, without arguments, that yields the core to other threads."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def aligned(shape: tuple[int, ...], dtype: Any, alignment: int = 64) -> NDArray[Any]:
    """Return zeros whose first entry lies at a multiple of ``alignment`` bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)
