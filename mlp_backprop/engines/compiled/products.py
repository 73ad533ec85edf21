"""Matrix products that keep a block of their result in registers.

Of numbers that lie along the rows of a tile, with pointers to where each begins:

    product     C = start + A B      forward, backward, and the gradient of a wide layer
    dots        C = A Bᵀ             the gradient of a narrow layer
    transpose   C = Aᵀ

A block is up to 6 rows of C by 2 vectors, or 4 rows by 2 numbers, summed up as vectors: as many
sums as a processor needs under way to begin two each cycle, and every number loaded serves several.
Rows are cut into blocks of nearly the same height.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.vectors import Vectors, lanes, shifted

# What a product is added to: nothing, what C holds, or b[r] in row r.
NOTHING, ITSELF, COLUMN = np.int64(0), np.int64(1), np.int64(2)

I64 = ir.IntType(64)
HEIGHT, DOTS_HEIGHT = 6, 4


def _by_height(builder: Any, n_rows: Any, height: int, block: Callable[[int], None]) -> None:
    """The block of n_rows rows, 1 to `height`."""
    after = builder.function.append_basic_block("after")
    choice = builder.switch(n_rows, after)
    for k in range(1, height + 1):
        here = builder.function.append_basic_block(f"rows{k}")
        choice.add_case(I64(k), here)
        builder.position_at_end(here)
        block(k)
        builder.branch(after)
    builder.position_at_end(after)


# C = start + A B ---------------------------------------------------------------------------------


def _product_block(
    vectors: Vectors,
    n_rows: int,
    n_vectors: int,
    start: Any,
    b: Any,
    C: Any,
    C_row: Any,
    A: Any,
    A_row: Any,
    A_k: Any,
    B: Any,
    B_k: Any,
    n_k: Any,
) -> None:
    builder, rows, columns = vectors.builder, range(n_rows), range(n_vectors)
    places = [(r, v) for r in rows for v in columns]
    of_C = [_place(vectors, I64(r), C_row, v) for r, v in places]
    before = builder.block
    loop, done = map(builder.function.append_basic_block, ("loop", "done"))
    begun = _beginnings(vectors, start, b, C, of_C, n_vectors, loop)

    builder.position_at_end(loop)
    k = builder.phi(I64)
    sums = [builder.phi(vectors.type) for _ in places]
    right = [vectors.load(B, _place(vectors, k, B_k, v)) for v in columns]
    column_k = builder.mul(k, A_k)
    offsets = [builder.add(column_k, _place(vectors, I64(r), A_row)) for r in rows]
    left = [vectors.broadcast(A, offset) for offset in offsets]
    news = [
        vectors.multiply_add(left[r], right[v], total)
        for (r, v), total in zip(places, sums, strict=True)
    ]
    after = builder.add(k, I64(1))
    builder.cbranch(builder.icmp_signed("<", after, n_k), loop, done)
    begun |= {before: [vectors.zero] * len(places), loop: news}
    for origin, values in begun.items():
        k.add_incoming(after if origin is loop else I64(0), origin)
        for total, value in zip(sums, values, strict=True):
            total.add_incoming(value, origin)

    builder.position_at_end(done)
    for value, place in zip(news, of_C, strict=True):
        vectors.store(value, C, place)


def _place(vectors: Vectors, row: Any, step: Any, v: int = 0) -> Any:
    """Of vector v in a row, or of the number that a row begins with."""
    return vectors.builder.add(vectors.builder.mul(step, row), I64(v * vectors.lanes))


def _beginnings(
    vectors: Vectors, start: Any, b: Any, C: Any, of_C: list[Any], n_vectors: int, loop: Any
) -> dict[Any, list[Any]]:
    """Ways into the loop besides the direct one, for NOTHING: the sums to begin with, by block."""
    builder = vectors.builder
    itself, column = map(builder.function.append_basic_block, ("itself", "column"))
    choice = builder.switch(start, loop)
    choice.add_case(I64(int(ITSELF)), itself)
    choice.add_case(I64(int(COLUMN)), column)
    builder.position_at_end(itself)
    held = [vectors.load(C, place) for place in of_C]
    builder.branch(loop)
    builder.position_at_end(column)
    biases = [vectors.broadcast(b, I64(r)) for r in range(len(of_C) // n_vectors)]
    builder.branch(loop)
    return {itself: held, column: [bias for bias in biases for _ in range(n_vectors)]}


def _product_of_width(n_vectors: int) -> Any:
    @intrinsic
    def block(typing_context, n_rows, start, b, C, C_row, A, A_row, A_k, B, B_k, n_k):
        def instructions(context, builder, signature, arguments):
            n_rows, *others = arguments
            vectors = Vectors(builder, C.dtype)
            _by_height(
                builder, n_rows, HEIGHT, lambda k: _product_block(vectors, k, n_vectors, *others)
            )
            return context.get_dummy_value()

        n = types.intp
        return types.void(n, n, C, C, n, C, n, n, C, n, n), instructions

    @compiled
    def product(start, b, C, C_row, A, A_row, A_k, B, B_k, n_rows, n_k):
        r = 0
        for n_left in range((n_rows + HEIGHT - 1) // HEIGHT, 0, -1):
            k = (n_rows - r + n_left - 1) // n_left
            C_r, A_r = shifted(C, r * C_row), shifted(A, r * A_row)
            block(k, start, shifted(b, r), C_r, C_row, A_r, A_row, A_k, B, B_k, n_k)
            r += k

    return product


_of_two_vectors, _of_one_vector = _product_of_width(2), _product_of_width(1)


@compiled
def product(start, b, C, C_row, A, A_row, A_k, B, B_k, n_rows, n_k, m):
    """C[r, :m] = start + sum over k of A[r A_row + k A_k] B[k, :m], where m is whole vectors."""
    v, two = 0, 2 * lanes(C)
    while v + two <= m:
        C_v, B_v = shifted(C, v), shifted(B, v)
        _of_two_vectors(start, b, C_v, C_row, A, A_row, A_k, B_v, B_k, n_rows, n_k)
        v += two
    if v < m:
        C_v, B_v = shifted(C, v), shifted(B, v)
        _of_one_vector(start, b, C_v, C_row, A, A_row, A_k, B_v, B_k, n_rows, n_k)


# C = A Bᵀ ----------------------------------------------------------------------------------------


def _dots_block(
    vectors: Vectors,
    n_rows: int,
    n_columns: int,
    C: Any,
    C_row: Any,
    A: Any,
    A_row: Any,
    B: Any,
    B_row: Any,
    m: Any,
) -> None:
    builder, pairs = vectors.builder, [(r, c) for r in range(n_rows) for c in range(n_columns)]
    before = builder.block
    loop, done = map(builder.function.append_basic_block, ("loop", "done"))
    builder.branch(loop)

    builder.position_at_end(loop)
    t = builder.phi(I64)
    sums = [builder.phi(vectors.type) for _ in pairs]
    left = [vectors.load(A, builder.add(t, builder.mul(A_row, I64(r)))) for r in range(n_rows)]
    right = [vectors.load(B, builder.add(t, builder.mul(B_row, I64(c)))) for c in range(n_columns)]
    news = [
        vectors.multiply_add(left[r], right[c], total)
        for (r, c), total in zip(pairs, sums, strict=True)
    ]
    after = builder.add(t, I64(vectors.lanes))
    builder.cbranch(builder.icmp_signed("<", after, m), loop, done)
    t.add_incoming(I64(0), before)
    t.add_incoming(after, loop)
    for total, value in zip(sums, news, strict=True):
        total.add_incoming(vectors.zero, before)
        total.add_incoming(value, loop)

    builder.position_at_end(done)
    for (r, c), value in zip(pairs, news, strict=True):
        place = builder.add(builder.mul(C_row, I64(r)), I64(c))
        builder.store(vectors.total(value), builder.gep(C, [place]))


def _dots_of_width(n_columns: int) -> Any:
    @intrinsic
    def block(typing_context, n_rows, C, C_row, A, A_row, B, B_row, m):
        def instructions(context, builder, signature, arguments):
            n_rows, *others = arguments
            vectors = Vectors(builder, C.dtype)
            _by_height(
                builder, n_rows, DOTS_HEIGHT, lambda k: _dots_block(vectors, k, n_columns, *others)
            )
            return context.get_dummy_value()

        n = types.intp
        return types.void(n, C, n, C, n, C, n, n), instructions

    @compiled
    def dots(C, C_row, A, A_row, B, B_row, n_rows, m):
        r = 0
        for n_left in range((n_rows + DOTS_HEIGHT - 1) // DOTS_HEIGHT, 0, -1):
            k = (n_rows - r + n_left - 1) // n_left
            block(k, shifted(C, r * C_row), C_row, shifted(A, r * A_row), A_row, B, B_row, m)
            r += k

    return dots


_of_two_columns, _of_one_column = _dots_of_width(2), _dots_of_width(1)


@compiled
def dots(C, C_row, A, A_row, B, B_row, n_rows, n_columns, m):
    """C[r, c] = sum over t < m of A[r, t] B[c, t], where m is whole vectors."""
    c = 0
    while c + 2 <= n_columns:
        _of_two_columns(shifted(C, c), C_row, A, A_row, shifted(B, c * B_row), B_row, n_rows, m)
        c += 2
    if c < n_columns:
        _of_one_column(shifted(C, c), C_row, A, A_row, shifted(B, c * B_row), B_row, n_rows, m)


# C = Aᵀ ------------------------------------------------------------------------------------------


@intrinsic
def _transpose_square(typing_context, C, C_row, A, A_row):
    def instructions(context, builder, signature, arguments):
        C, C_row, A, A_row = arguments
        vectors = Vectors(builder, signature.args[0].dtype)
        rows = [vectors.load(A, builder.mul(A_row, I64(r))) for r in range(vectors.lanes)]
        for r, vector in enumerate(vectors.transposed(rows)):
            vectors.store(vector, C, builder.mul(C_row, I64(r)))
        return context.get_dummy_value()

    return types.void(C, types.intp, C, types.intp), instructions


@compiled
def transpose(C, C_row, A, A_row, n_rows, n_columns):
    """C[c, r] = A[r, c], by squares: what is read and written is rounded up to whole ones."""
    for r in range(0, n_rows, lanes(C)):
        for c in range(0, n_columns, lanes(C)):
            _transpose_square(shifted(C, c * C_row + r), C_row, shifted(A, r * A_row + c), A_row)


@intrinsic
def gather_square(typing_context, C, C_row, A, A_row, rows):
    """C[c, r] = A[rows[r], c], of one square."""

    def instructions(context, builder, signature, arguments):
        C, C_row, A, A_row, numbers = arguments
        vectors = Vectors(builder, signature.args[0].dtype)
        lanes = range(vectors.lanes)
        places = [builder.load(builder.gep(numbers, [I64(r)])) for r in lanes]
        rows = [vectors.load(A, builder.mul(A_row, place)) for place in places]
        for c, vector in enumerate(vectors.transposed(rows)):
            vectors.store(vector, C, builder.mul(C_row, I64(c)))
        return context.get_dummy_value()

    return types.void(C, types.intp, C, types.intp, rows), instructions
