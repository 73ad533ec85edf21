"""Memory as compiled code sees it: pointers to numbers, and vectors of them in registers.

Numba compiles loops over single numbers and leaves vectors to LLVM's judgement. What products.py
needs it to keep in registers is written here in LLVM's own vector instructions, 32 bytes at a
time, which every processor has or can make of two. A product and a sum are one instruction where
the processor has that one.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

VECTOR_BYTES = 32


@intrinsic
def pointer(typing_context, like, address):
    """A pointer to the numbers at an address: of a dtype, or of that of another pointer."""
    result = types.CPointer(
        like.instance_type if isinstance(like, types.NumberClass) else like.dtype
    )

    def instructions(context, builder, signature, arguments):
        return builder.inttoptr(arguments[1], context.get_value_type(result))

    return result(like, types.uintp), instructions


@intrinsic
def shifted(typing_context, start, n):
    """The pointer n numbers further on."""

    def instructions(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return start(start, types.intp), instructions


@intrinsic
def lanes(typing_context, like):
    """How many numbers a vector holds: a constant."""
    n = lanes_of(like.dtype)

    def instructions(context, builder, signature, arguments):
        return context.get_constant(types.intp, n)

    return types.intp(like), instructions


def lanes_of(real: Any) -> int:
    """The same outside compiled code."""
    return VECTOR_BYTES * 8 // int(real.bitwidth)


@intrinsic
def call(typing_context, address, arguments):
    """Call a function that returns nothing by its address, with a tuple of arguments."""

    def instructions(context, builder, signature, values):
        unpacked = [builder.extract_value(values[1], k) for k in range(len(arguments))]
        function = ir.FunctionType(ir.VoidType(), [value.type for value in unpacked])
        builder.call(builder.inttoptr(values[0], function.as_pointer()), unpacked)
        return context.get_dummy_value()

    return types.void(types.intp, arguments), instructions


class Vectors:
    """Writes vector instructions for one real type where a builder stands."""

    def __init__(self, builder: Any, real: Any) -> None:
        self.builder = builder
        self.lanes = lanes_of(real)
        self.type = ir.VectorType(
            ir.FloatType() if real is types.float32 else ir.DoubleType(), self.lanes
        )
        self.zero = ir.Constant(self.type, [0.0] * self.lanes)
        self._undefined = ir.Constant(self.type, ir.Undefined)
        self._alignment = VECTOR_BYTES // self.lanes  # that of one number
        self._suffix = f"v{self.lanes}f{real.bitwidth}"

    def load(self, start: Any, index: Any) -> Any:
        vector = self.builder.load(self._at(start, index))
        vector.align = self._alignment
        return vector

    def store(self, vector: Any, start: Any, index: Any) -> None:
        self.builder.store(vector, self._at(start, index)).align = self._alignment

    def broadcast(self, start: Any, index: Any) -> Any:
        """One number, in every lane."""
        number = self.builder.load(self.builder.gep(start, [index]))
        first = self.builder.insert_element(self._undefined, number, ir.IntType(32)(0))
        return self.shuffle(first, self._undefined, [0] * self.lanes)

    def shuffle(self, one: Any, other: Any, lanes: list[int]) -> Any:
        """These lanes of two vectors, those of the second counted on."""
        order = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), lanes)
        return self.builder.shuffle_vector(one, other, order)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """A b + c."""
        kind = ir.FunctionType(self.type, [self.type] * 3)
        return self._call(f"llvm.fmuladd.{self._suffix}", kind, [a, b, c])

    def total(self, vector: Any) -> Any:
        """The sum of all lanes, pair by pair."""
        number = self.type.element
        kind = ir.FunctionType(number, [number, self.type])
        arguments = [ir.Constant(number, -0.0), vector]
        return self._call(f"llvm.vector.reduce.fadd.{self._suffix}", kind, arguments, ("reassoc",))

    def transposed(self, rows: list[Any]) -> list[Any]:
        """A square of numbers, as rows; squares of half the size trade places, and so on."""
        step = self.lanes // 2
        while step:
            for i in [i for i in range(self.lanes) if not i & step]:
                a, b, lane = rows[i], rows[i + step], range(self.lanes)
                rows[i] = self.shuffle(
                    a, b, [k + self.lanes - step if k & step else k for k in lane]
                )
                rows[i + step] = self.shuffle(
                    a, b, [k + self.lanes if k & step else k + step for k in lane]
                )
            step //= 2
        return rows

    def _at(self, start: Any, index: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(start, [index]), self.type.as_pointer())

    def _call(self, name: str, kind: Any, arguments: list[Any], flags: tuple[str, ...] = ()) -> Any:
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments, fastmath=flags)
