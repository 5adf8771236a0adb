"""What every kernel is written with: loops, vectors and records, on top of llvmlite's builder of LLVM IR.

A kernel is a function ``(record, begin, end)``. The record is an array of 64-bit words, addresses or integers, whose
places a :class:`Layout` names for both sides, Python and IR; ``begin`` and ``end`` are the share of its items that one
thread works on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from llvmlite import ir

__all__ = ["LANES_OF_A_LINE", "Elements", "Emitter", "Kernel", "Layout"]

I1, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
POINTER = ir.PointerType()
LANES_OF_A_LINE = 16
"""Floats in a cache line of 64 bytes. Rows of activations begin at multiples of it, whatever a vector holds."""

CONTRACT = ("contract",)  # lets LLVM make one fused multiply-add of a product and a sum, where the machine has it


@final
@dataclass(frozen=True)
class Layout:
    """The fields of a kernel's record, in order.

    Example:
        >>> layout = Layout(("x", "y", "rows"))
        >>> layout.words(x=64, y=128, rows=3)
        [64, 128, 3]
    """

    fields: tuple[str, ...]

    def words(self, **values: int) -> list[int]:
        """Return the record as integers, field by field; none may be missing."""
        return [values.pop(field) for field in self.fields]

    def place(self, field: str) -> int:
        """Return the index of a field."""
        return self.fields.index(field)


@final
@dataclass(frozen=True)
class Elements:
    """The type of weights and activations, and how many of them a vector register holds.

    Args:
        scalar: ``float`` or ``double`` of LLVM.
        lanes: Elements of a vector.
        gathers: Whether one instruction loads a vector of scattered elements, faster than one by one.
    """

    scalar: Any
    lanes: int
    gathers: bool = False

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return 8 if isinstance(self.scalar, ir.DoubleType) else 4

    @property
    def vector(self) -> Any:
        """The type of a vector register."""
        return ir.VectorType(self.scalar, self.lanes)

    @property
    def suffix(self) -> str:
        """What LLVM appends to the names of functions on such vectors."""
        return f"v{self.lanes}f{8 * self.size}"


@final
@dataclass(frozen=True)
class Kernel:
    """A function to be compiled: its name, its record, and what writes its body."""

    name: str
    layout: Layout
    emit: Callable[[Emitter], None]


@final
class Emitter:
    """Writes the body of one kernel.

    Args:
        function: What is written, of type ``void (ptr, i64, i64)``.
        layout: The fields of its record.
        elements: The type of weights and activations.
    """

    def __init__(self, function: ir.Function, layout: Layout, elements: Elements) -> None:
        self.elements = elements
        self.module = function.module
        self.build = ir.IRBuilder(function.append_basic_block("entry"))
        self.record, self.begin, self.end = function.args
        self._layout = layout

    def integer(self, value: int) -> Any:
        """Return a 64-bit constant."""
        return ir.Constant(I64, value)

    def field(self, name: str) -> Any:
        """Load a 64-bit integer from the record."""
        return self.load(self.record, self.integer(self._layout.place(name)), I64)

    def address(self, name: str) -> Any:
        """Load an address from the record."""
        return self.build.inttoptr(self.field(name), POINTER)

    def element_field(self, name: str) -> Any:
        """Load a number that the record holds as the bits of a double."""
        value = self.build.bitcast(self.field(name), ir.DoubleType())
        return value if self.elements.size == 8 else self.build.fptrunc(value, self.elements.scalar)

    def at(self, base: Any, index: Any, kind: Any | None = None) -> Any:
        """Return the address of an entry of an array, of elements if no other type is given."""
        return self.build.gep(base, [index], source_etype=kind or self.elements.scalar)

    def load(self, base: Any, index: Any, kind: Any | None = None) -> Any:
        """Load one entry of an array, an element if no other type is given."""
        kind = kind or self.elements.scalar
        return self.build.load(self.at(base, index, kind), typ=kind)

    def load_index(self, base: Any, index: Any, kind: Any = I32) -> Any:
        """Load a 16- or 32-bit index, as a 64-bit integer; 16 bits are unsigned."""
        widen = self.build.zext if kind is I16 else self.build.sext
        return widen(self.load(base, index, kind), I64)

    def load_vector(self, address: Any) -> Any:
        """Load a vector of elements from an address without alignment."""
        return self.build.load(address, typ=self.elements.vector, align=self.elements.size)

    def store_vector(self, value: Any, address: Any) -> None:
        """Store a vector of elements to an address without alignment."""
        self.build.store(value, address, align=self.elements.size)

    def broadcast(self, value: Any, lanes: int | None = None) -> Any:
        """Return a vector whose lanes are all ``value``."""
        kind = ir.VectorType(value.type, lanes or self.elements.lanes)
        single = self.build.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.build.shuffle_vector(single, ir.Constant(kind, ir.Undefined), self.indices([0] * kind.count))

    def indices(self, places: Sequence[int]) -> Any:
        """Return a constant vector of 32-bit integers, as shuffles take it."""
        return ir.Constant(ir.VectorType(I32, len(places)), list(places))

    def shuffle(self, first: Any, second: Any, places: Sequence[int]) -> Any:
        """Return lanes of two vectors, those of the second counted on from those of the first."""
        return self.build.shuffle_vector(first, second, self.indices(places))

    def multiply_add(self, factor: Any, other: Any, addend: Any) -> Any:
        """Return ``factor * other + addend``, fused where the machine can."""
        build: Any = self.build  # typeshed does not know of flags
        return build.fadd(build.fmul(factor, other, flags=CONTRACT), addend, flags=CONTRACT)

    def clamp(self, value: Any, low: Any, high: Any) -> Any:
        """Return values within [low, high]; NaN stays NaN, as in torch."""
        value = self.build.select(self.build.fcmp_ordered("<", value, low), low, value)
        return self.build.select(self.build.fcmp_ordered(">", value, high), high, value)

    def sum_of(self, values: Sequence[Any]) -> Any:
        """Return a sum by a tree, whose branches do not wait for one another."""
        while len(values) > 1:
            pairs = [self.build.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
            values = pairs + list(values[len(values) // 2 * 2 :])
        return values[0]

    def variable(self, initial: Any) -> Any:
        """Return a place for a value that loops change; LLVM makes a register of it."""
        with self.build.goto_entry_block():
            place = self.build.alloca(initial.type)
        self.build.store(initial, place)
        return place

    def get(self, place: Any, kind: Any) -> Any:
        """Read a variable."""
        return self.build.load(place, typ=kind)

    def smaller(self, first: Any, second: Any) -> Any:
        """Return the smaller of two signed integers."""
        return self.build.select(self.build.icmp_signed("<", first, second), first, second)

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Generator[Any]:
        """Run what follows for ``start``, ``start + step``, ..., while a whole step fits below ``stop``.

        The value is the loop's index; how far it came is in the variable that :meth:`counting` yields.
        """
        with self.counting(start, stop, step) as (index, _):
            yield index

    @contextmanager
    def counting(self, start: Any, stop: Any, step: int = 1) -> Generator[tuple[Any, Any]]:
        """Do as :meth:`loop`, and give the counter's variable too, for a second loop over what is left."""
        counter = self.variable(start)
        head, body, done = (self.build.append_basic_block(name) for name in ("head", "body", "done"))
        self.build.branch(head)
        self.build.position_at_end(head)
        index = self.get(counter, I64)
        last = self.build.add(index, self.integer(step))
        self.build.cbranch(self.build.icmp_signed("<=", last, stop), body, done)
        self.build.position_at_end(body)
        yield index, counter
        self.build.store(self.build.add(index, self.integer(step)), counter)
        self.build.branch(head)
        self.build.position_at_end(done)
