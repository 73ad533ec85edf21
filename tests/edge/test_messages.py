"""What a refusal says to do, for mistakes that others' tools lead to."""

import re

import numpy as np
import pytest
from oracles import make_problem

from mlp_backprop import check_grads, compute_grads, forward, hvp, init_params, prepare_grads

PARAMS, X, Y, _ = make_problem()
SINGLE = np.float32


class Table:
    """A data frame: columns by name, and one array of objects if they are of several kinds."""

    def __init__(self, **columns):
        self.columns = list(columns)
        self.by_name = columns

    def __getitem__(self, name):
        return self.by_name[name]

    def __array__(self, dtype=None, copy=None):
        rows = zip(*self.by_name.values(), strict=True)
        return np.array([list(row) for row in rows], object)


class NAType:
    """pandas.NA: neither equal nor unequal to anything, and neither true nor false."""

    def __eq__(self, other):
        return self

    __ne__ = __eq__
    __hash__ = object.__hash__

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")

    def __repr__(self):
        return "<NA>"


NUMBERS = np.arange(7.0)
MISSING = "; fill what is missing, or drop its rows"


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a"] * 7, "column 'age' holds 'a'; leave it out, or make numbers of it"),
        (NUMBERS.astype("M8[s]"), r"column 'age' holds .*1970.*; leave it out"),
        ([1, 2, None, 3, 4, 5, 6], "column 'age' holds None" + MISSING),
        ([1, 2, NAType(), 3, 4, 5, 6], "column 'age' holds <NA>" + MISSING),
        (np.array([1, np.nan, 3, 4, 5, 6, 7], object), "column 'age' holds nan" + MISSING),
        ([True] * 7, r"columns are of several kinds; pass X.astype\('float64'\)"),
    ],
)
def test_a_table_with_a_column_that_holds_no_numbers(column, message):
    table = Table(height=NUMBERS, age=column, weight=NUMBERS)
    with pytest.raises(TypeError, match=rf"X must hold real numbers .*from a Table\): .*{message}"):
        forward(PARAMS, table)


def test_a_sparse_matrix():
    sparse = pytest.importorskip("scipy.sparse")
    for matrix in (sparse.csr_array(X), sparse.coo_matrix(X)):
        with pytest.raises(TypeError, match=r"X must hold real numbers .*: pass X.toarray\(\)"):
            compute_grads(PARAMS, matrix, Y)
    with pytest.raises(TypeError, match=r"W of layer 1 must .*: pass W.toarray\(\)"):
        compute_grads([(sparse.csr_array(PARAMS[0][0]), PARAMS[0][1]), *PARAMS[1:]], X, Y)


# Dtypes ------------------------------------------------------------------------------------------

ODD = "; or have parameters of float32, init_params(..., dtype='float32')"


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (
            X.astype(SINGLE),
            Y,
            "X has dtype float32, the parameters float64: cast it, X.astype('float64')",
        ),
        (
            X,
            Y.astype(SINGLE),
            "y has dtype float32, the parameters float64: cast it, y.astype('float64')",
        ),
        (
            X.astype(SINGLE),
            Y.astype(SINGLE),
            "X has dtype float32, the parameters float64: cast it, X.astype('float64')" + ODD,
        ),
        (X.astype(SINGLE), Y.tolist(), "X.astype('float64')" + ODD),
    ],
)
def test_dtypes_that_differ(X, y, message):
    with pytest.raises(TypeError, match=re.escape(message) + "$"):
        compute_grads(PARAMS, X, y)


@pytest.mark.parametrize("change", [lambda A: A.astype(int), lambda A: A.tolist()])
def test_parameters_without_a_dtype_of_their_own(change):
    params = [(change(W), change(b)) for W, b in PARAMS]
    message = (
        "X has dtype float32, the parameters, lists or integers that count as float64: cast it"
    )
    with pytest.raises(TypeError, match=f"^{message}"):
        compute_grads(params, X.astype(SINGLE), Y)


def test_a_layer_is_cast_by_its_letter():
    v = [(W.astype(SINGLE), b) for W, b in PARAMS]
    with pytest.raises(TypeError, match=r"^W of layer 1 in v has dtype float32, .*: cast it, W\.a"):
        hvp(PARAMS, X, Y, v)
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"^X has dtype torch|X\.to\(torch\.float64\)"):
        forward(
            [(torch.tensor(W), torch.tensor(b)) for W, b in PARAMS], torch.tensor(X.astype(SINGLE))
        )


@pytest.mark.parametrize("precision", ["float64", "float16"])
def test_a_precision_that_is_a_dtype(precision):
    message = (
        rf"precision='{precision}': everything is computed in the dtype of the parameters, here "
        rf"float64; init_params\(\.\.\., dtype='{precision}'\).*float32, float32_exact, tf32, bf"
    )
    for call in (
        lambda: compute_grads(PARAMS, X, Y, precision=precision),
        lambda: prepare_grads(PARAMS, n=7, precision=precision),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Names, layers, seeds ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (b"relu", r"got bytes: pass activation\.decode\(\)"),
        (np.array(["relu", "tanh", "identity"]), r"got numpy.ndarray: pass activation\.tolist\(\)"),
        ([b"relu", "tanh", "identity"], r"activation must be a name \(str\), got bytes"),
        (7, "one per layer, got int$"),
    ],
)
def test_activations_that_are_no_names(activation, message):
    with pytest.raises(TypeError, match=message):
        compute_grads(PARAMS, X, Y, activation=activation)


def test_parameters_in_one_list(backend):
    in_one = [backend.array(A) for layer in PARAMS for A in layer]
    message = r"layer 1 must be a pair \(W, b\), got .*list\(zip\(flat\[::2\], flat\[1::2\]\)\)"
    with pytest.raises(TypeError, match=message):
        forward(in_one, backend.array(X))
    forward(list(zip(in_one[::2], in_one[1::2], strict=True)), backend.array(X))


def test_parameters_of_a_torch_module():
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    with pytest.raises(TypeError, match=r"got torch.nn.parameter.Parameter; of W, b, W, b, \.\.\."):
        forward(list(module.parameters()), torch.ones(2, 3))


@pytest.mark.parametrize("rng", ["0", 1.5, object])
def test_what_is_no_seed(rng):
    message = re.escape(f"rng must be a numpy.random.Generator, an integer or None, got {rng!r}")
    with pytest.raises(TypeError, match=message):
        init_params([2, 1], rng)
    with pytest.raises(TypeError, match=message):
        check_grads(PARAMS, X, Y, rng=rng)


# out ---------------------------------------------------------------------------------------------

EXPECTED = r"out must be a list of \(W, b\), numpy arrays of float64 for widths 3-5-2-4"


@pytest.mark.parametrize(
    ("out", "came"),
    [
        (PARAMS[:2], "got 2 layers"),
        (
            [(W, b.astype(SINGLE)) for W, b in PARAMS],
            r"b of layer 1 in out is a numpy array of float32, \(5,\)",
        ),
        (
            [*PARAMS[:2], (PARAMS[2][0].T, PARAMS[2][1])],
            r"W of layer 3 in out is .* float64, \(2, 4\)",
        ),
        (
            [(W.tolist(), b) for W, b in PARAMS],
            r"W of layer 1 in out is a list of float64, \(5, 3\)",
        ),
    ],
)
def test_an_out_of_another_kind(out, came):
    with pytest.raises(ValueError, match=f"^{EXPECTED}; {came}$"):
        prepare_grads(PARAMS, n=7)(PARAMS, X, Y, out=out)


def test_an_out_of_another_library():
    torch = pytest.importorskip("torch")
    out = [(torch.tensor(W), torch.tensor(b)) for W, b in PARAMS]
    with pytest.raises(ValueError, match=f"{EXPECTED}; W of layer 1 in out is a torch array of"):
        prepare_grads(PARAMS, n=7)(PARAMS, X, Y, out=out)
