"""The tables of activations and losses, and the plainest steps, on rows of a tile.

A step takes pointers to where its rows begin, how many they are, the stride from each to the next,
and how many numbers of each it concerns. Rows without gaps between them are one long row.
"""

from collections.abc import Callable

import numpy as np
from numba import njit
from numba.extending import overload

from mlp_backprop.engines.compiled import formulas
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.third_derivatives import THIRD
from mlp_backprop.engines.compiled.vectors import pointer

# Offsets are unsigned: a signed index may be negative, and the test for it would keep the loops
# from being vectorised.
at = np.uintp

# A sum over samples in any order, as long as it is always the same one.
summing = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})

ACTIVATIONS = tuple(formulas.ACTIVATIONS)
LOSSES = (*formulas.LOSSES, "softmax_cross_entropy")


@compiled
def shape(n_rows, stride, m):
    """The same rows, as few as possible."""
    return (1, n_rows * m) if stride == m else (n_rows, m)


@compiled
def fill(A, value, n_rows, stride, m):
    n_rows, m = shape(n_rows, stride, m)
    for row in range(n_rows):
        for t in range(at(row * stride), at(row * stride + m)):
            A[t] = value


@compiled
def copy(A, B, n_rows, stride, m):
    """A = B."""
    n_rows, m = shape(n_rows, stride, m)
    for row in range(n_rows):
        for t in range(at(row * stride), at(row * stride + m)):
            A[t] = B[t]


@compiled
def add(A, B, n_rows, stride, m):
    """A = A + B."""
    n_rows, m = shape(n_rows, stride, m)
    for row in range(n_rows):
        for t in range(at(row * stride), at(row * stride + m)):
            A[t] += B[t]


@compiled
def multiply(A, B, n_rows, stride, m):
    """A = A ∘ B."""
    n_rows, m = shape(n_rows, stride, m)
    for row in range(n_rows):
        for t in range(at(row * stride), at(row * stride + m)):
            A[t] *= B[t]


@compiled
def multiply_by_row(A, factors, n_rows, stride, m):
    """Every row of A times the same one."""
    for row in range(n_rows):
        a = at(row * stride)
        for t in range(at(m)):
            A[a + t] *= factors[t]


@compiled
def add_squares(S, A, n_rows, stride, m):
    """S plus the squares of every row."""
    for row in range(n_rows):
        a = at(row * stride)
        for t in range(at(m)):
            S[t] += A[a + t] * A[a + t]


@summing
def row_sum(A, m):
    total = type(A[0])(0)
    for t in range(at(m)):
        total += A[t]
    return total


@summing
def dot(A, B, m):
    total = type(A[0])(0)
    for t in range(at(m)):
        total += A[t] * B[t]
    return total


# The tables --------------------------------------------------------------------------------------


def activation_of(k, z):
    """Row k of formulas.ACTIVATIONS, for a k known when compiled."""


def second_of(k, z):
    """Row k of formulas.SECOND, likewise."""


def third_of(k, z):
    """The row of third_derivatives.THIRD for row k of formulas.ACTIVATIONS, likewise."""


def loss_of(k, h, y):
    """Row k of formulas.LOSSES, likewise."""


@overload(activation_of, prefer_literal=True)
def _activation_of(k, z):
    f = formulas.ACTIVATIONS[ACTIVATIONS[k.literal_value]]
    return lambda k, z: f(z)


@overload(second_of, prefer_literal=True)
def _second_of(k, z):
    f = formulas.SECOND[ACTIVATIONS[k.literal_value]]
    return lambda k, z: f(z)


@overload(third_of, prefer_literal=True)
def _third_of(k, z):
    f = THIRD[ACTIVATIONS[k.literal_value]]
    return lambda k, z: f(z)


@overload(loss_of, prefer_literal=True)
def _loss_of(k, h, y):
    f = formulas.LOSSES[LOSSES[k.literal_value]]
    return lambda k, h, y: f(h, y)


def activation(sources: int, k: int) -> Callable[..., None]:
    """H = f(Z) in place of Z, and the slopes f'(Z) in F."""

    def activation(Z, F, n_rows, stride, m):
        _ = sources
        n_rows, m = shape(n_rows, stride, m)
        for row in range(n_rows):
            for t in range(at(row * stride), at(row * stride + m)):
                Z[t], F[t] = activation_of(k, Z[t])

    return activation


def activation2(sources: int, k: int) -> Callable[..., None]:
    """As `activation`, and f''(Z) in S."""

    def activation2(Z, F, S, n_rows, stride, m):
        _ = sources
        n_rows, m = shape(n_rows, stride, m)
        for row in range(n_rows):
            for t in range(at(row * stride), at(row * stride + m)):
                Z[t], F[t], S[t] = second_of(k, Z[t])

    return activation2


def activation3(sources: int, k: int) -> Callable[..., None]:
    """As `activation2`, and f'''(Z) in C."""

    def activation3(Z, F, S, C, n_rows, stride, m):
        _ = sources
        n_rows, m = shape(n_rows, stride, m)
        for row in range(n_rows):
            for t in range(at(row * stride), at(row * stride + m)):
                Z[t], F[t], S[t], C[t] = third_of(k, Z[t])

    return activation3


def loss(sources: int, k: int) -> Callable[..., None]:
    """The losses in place of Y, and dE/dH in G; behind its rows are three to work with."""
    if LOSSES[k] == "softmax_cross_entropy":
        return softmax_cross_entropy(sources)

    def loss(H, Y, G, n_rows, stride, m):
        _ = sources
        n_rows, m = shape(n_rows, stride, m)
        for row in range(n_rows):
            for t in range(at(row * stride), at(row * stride + m)):
                Y[t], G[t] = loss_of(k, H[t], Y[t])

    return loss


def softmax_cross_entropy(sources: int) -> Callable[..., None]:
    """As `loss`, over all outputs of a sample together."""

    def softmax_cross_entropy(H, Y, G, n_rows, stride, m):
        _ = sources
        zero, one, m = type(H[0])(0), type(H[0])(1), at(m)
        largest, total, weight = exponentials(H, Y, G, n_rows, stride, m)
        for row in range(n_rows):
            h = at(row * stride)
            for t in range(m):
                k = Y[h + t]
                surprise = formulas.log1p(G[total + t] - one) - (H[h + t] - G[largest + t])
                G[h + t] = G[weight + t] * (G[h + t] / G[total + t]) - k
                Y[h + t] = zero if k == zero else k * surprise

    return softmax_cross_entropy


@compiled
def exponentials(H, Y, G, n_rows, stride, m):
    """Of outputs less a sample's largest. Behind them that one, their sum and that of Y: where."""
    zero, largest = type(H[0])(0), at(n_rows * stride)
    total, weight = largest + at(stride), largest + at(2 * stride)
    for t in range(m):
        G[largest + t], G[total + t], G[weight + t] = H[t], zero, zero
    for row in range(1, n_rows):
        h = at(row * stride)
        for t in range(m):
            G[largest + t] = max(H[h + t], G[largest + t])
    for row in range(n_rows):
        h = at(row * stride)
        for t in range(m):
            G[h + t] = formulas.exp(H[h + t] - G[largest + t])
            G[total + t] += G[h + t]
            G[weight + t] += Y[h + t]
    return largest, total, weight


# Jets --------------------------------------------------------------------------------------------


def jet(sources: int) -> Callable[..., None]:
    """(I2) and (I4) of maths/jets.py: Ht in place of K arrays Zt, Hs in place of S arrays Zs.

    Of n_rows rows each, one array after the other. Pair (i, j, s) adds Zt_i ∘ Zt_j to q_s.
    """

    def jet(pairs, n_pairs, F, F2, Zt, K, S, n_rows, stride, m):
        _ = sources
        table, m = pointer(np.int64, pairs), at(m)
        for row in range(n_rows):
            f = at(row * stride)
            for s in range(K, K + S):
                z = at((s * n_rows + row) * stride)
                for t in range(m):
                    Zt[z + t] *= F[f + t]
            for p in range(n_pairs):
                i = at((table[3 * p] * n_rows + row) * stride)
                j = at((table[3 * p + 1] * n_rows + row) * stride)
                z = at(((K + table[3 * p + 2]) * n_rows + row) * stride)
                for t in range(m):
                    Zt[z + t] += F2[f + t] * (Zt[i + t] * Zt[j + t])
            for k in range(K):
                z = at((k * n_rows + row) * stride)
                for t in range(m):
                    Zt[z + t] *= F[f + t]

    return jet


def jet_up(sources: int) -> Callable[..., None]:
    """As `jet`, beside Zt, for a Laplacian, Σ_k c_k Zt_k², or no second derivative at all."""

    def jet_up(c, F, F2, Zt, Ht, K, S, n_rows, stride, m):
        _ = sources
        c, m = pointer(np.int64, c), at(m)
        for row in range(n_rows):
            f, s = at(row * stride), at((K * n_rows + row) * stride)
            if S:
                for t in range(m):
                    Ht[s + t] = F[f + t] * Zt[s + t]
            for k in range(K):
                z = at((k * n_rows + row) * stride)
                for t in range(m):
                    Ht[z + t] = F[f + t] * Zt[z + t]
                if S and c[k]:
                    for t in range(m):
                        Ht[s + t] += F2[f + t] * (Zt[z + t] * Zt[z + t])

    return jet_up


def jet_down(sources: int) -> Callable[..., None]:
    """(I5) to (I7): D in place of F, Dt and Ds in place of Zt and Zs, given G, Gt and Gs."""

    def jet_down(c, F, F2, F3, Zt, G, K, S, n_rows, stride, m):
        _ = sources
        c, m, two = pointer(np.int64, c), at(m), type(F[0])(2)
        for row in range(n_rows):
            f, z_s = at(row * stride), at((K * n_rows + row) * stride)
            g_s = at(((K + 1) * n_rows + row) * stride)
            for t in range(m):
                G[f + t] *= F[f + t]
            for k in range(K):
                z, g = at((k * n_rows + row) * stride), at(((k + 1) * n_rows + row) * stride)
                for t in range(m):
                    G[f + t] += G[g + t] * Zt[z + t] * F2[f + t]
                if S and c[k]:
                    for t in range(m):  # more arrays in one loop, and it is not vectorised
                        G[f + t] += G[g_s + t] * (Zt[z + t] * Zt[z + t]) * F3[f + t]
                    for t in range(m):
                        Zt[z + t] = G[g + t] * F[f + t] + two * G[g_s + t] * F2[f + t] * Zt[z + t]
                else:
                    for t in range(m):
                        Zt[z + t] = G[g + t] * F[f + t]
            if S:
                for t in range(m):
                    G[f + t] += G[g_s + t] * Zt[z_s + t] * F2[f + t]
                    Zt[z_s + t] = G[g_s + t] * F[f + t]
            for t in range(m):
                F[f + t] = G[f + t]

    return jet_down
