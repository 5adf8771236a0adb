"""The tools to write kernels: loops, vectors and records, on top of llvmlite's builder of LLVM IR.

A kernel is a function ``(record, begin, end)``. The record is an array of 64-bit words, addresses or integers. A
:class:`Layout` names its fields, for Python and for the IR. ``begin`` and ``end`` limit the items that one thread works
on.
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
"""Floats in a cache line of 64 bytes. Rows of activations begin at multiples of it, however wide a vector is."""

CONTRACT = ("contract",)  # lets LLVM fuse a product and a sum into one multiply-add, if the machine has it


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
        """Return the record as integers, field by field; all fields must be given."""
        return [values.pop(field) for field in self.fields]

    def place(self, field: str) -> int:
        """Return the index of a field."""
        return self.fields.index(field)


@final
@dataclass(frozen=True)
class Elements:
    """The type of weights and activations, and how many of them fit into a vector register.

    Args:
        scalar: ``float`` or ``double`` of LLVM.
        lanes: Elements of a vector.
        gathers: Whether to load a vector of scattered elements by one instruction: it is faster than one by one.
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
        """The suffix of LLVM's names for functions on such vectors."""
        return f"v{self.lanes}f{8 * self.size}"


@final
@dataclass(frozen=True)
class Kernel:
    """A function to compile: its name, its record, and the function that writes its body."""

    name: str
    layout: Layout
    emit: Callable[[Emitter], None]


@final
class Emitter:
    """Writes the body of one kernel.

    Args:
        function: The function to write, of type ``void (ptr, i64, i64)``.
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
        """Load a number, which the record holds as the bits of a double."""
        value = self.build.bitcast(self.field(name), ir.DoubleType())
        return value if self.elements.size == 8 else self.build.fptrunc(value, self.elements.scalar)

    def at(self, base: Any, index: Any, kind: Any | None = None) -> Any:
        """Return the address of an array's entry. The array has elements, unless another type is given."""
        return self.build.gep(base, [index], source_etype=kind or self.elements.scalar)

    def load(self, base: Any, index: Any, kind: Any | None = None) -> Any:
        """Load an array's entry. The array has elements, unless another type is given."""
        kind = kind or self.elements.scalar
        return self.build.load(self.at(base, index, kind), typ=kind)

    def load_index(self, base: Any, index: Any, kind: Any = I32) -> Any:
        """Load a 16- or 32-bit index as a 64-bit integer; 16-bit indices are unsigned."""
        widen = self.build.zext if kind is I16 else self.build.sext
        return widen(self.load(base, index, kind), I64)

    def load_vector(self, address: Any) -> Any:
        """Load a vector of elements from an address that need not be aligned to vectors."""
        return self.build.load(address, typ=self.elements.vector, align=self.elements.size)

    def store_vector(self, value: Any, address: Any) -> None:
        """Store a vector of elements to an address that need not be aligned to vectors."""
        self.build.store(value, address, align=self.elements.size)

    def broadcast(self, value: Any, lanes: int | None = None) -> Any:
        """Return a vector whose lanes are all ``value``."""
        kind = ir.VectorType(value.type, lanes or self.elements.lanes)
        single = self.build.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.build.shuffle_vector(single, ir.Constant(kind, ir.Undefined), self.indices([0] * kind.count))

    def indices(self, places: Sequence[int]) -> Any:
        """Return a constant vector of 32-bit integers, the type that shuffles take."""
        return ir.Constant(ir.VectorType(I32, len(places)), list(places))

    def shuffle(self, first: Any, second: Any, places: Sequence[int]) -> Any:
        """Return the lanes of two vectors at ``places``; the second vector's places follow the first's."""
        return self.build.shuffle_vector(first, second, self.indices(places))

    def multiply_add(self, factor: Any, other: Any, addend: Any) -> Any:
        """Return ``factor * other + addend``, fused if the machine can."""
        build: Any = self.build  # typeshed does not know the flags
        return build.fadd(build.fmul(factor, other, flags=CONTRACT), addend, flags=CONTRACT)

    def clamp(self, value: Any, low: Any, high: Any) -> Any:
        """Return values within [low, high]; NaN stays NaN, as in torch."""
        value = self.build.select(self.build.fcmp_ordered("<", value, low), low, value)
        return self.build.select(self.build.fcmp_ordered(">", value, high), high, value)

    def sum_of(self, values: Sequence[Any]) -> Any:
        """Return a sum, added up as a tree, whose branches do not wait for one another."""
        while len(values) > 1:
            pairs = [self.build.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=False)]
            values = pairs + list(values[len(values) // 2 * 2 :])
        return values[0]

    def variable(self, initial: Any) -> Any:
        """Return a place for a value that loops change; LLVM turns it into a register."""
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
        """Run the block for ``start``, ``start + step``, ..., while a whole step fits below ``stop``.

        Yields the loop's index. To know how far the loop came, use :meth:`counting`.
        """
        with self.counting(start, stop, step) as (index, _):
            yield index

    @contextmanager
    def counting(self, start: Any, stop: Any, step: int = 1) -> Generator[tuple[Any, Any]]:
        """Like :meth:`loop`, but also yield the counter's variable, for a second loop over the rest."""
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
