"""What a caller may pass: one table of all that is refused, one of all that is converted."""

import os
import subprocess
import sys
from collections import UserList
from types import SimpleNamespace

import cupy_api
import numpy as np
import pytest
from oracles import assert_close, assert_grads_close, read_only

from mlp_backprop import check_grads, compute_grads, forward, init_params, prepare_grads, trace
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.edge import backends, rules
from mlp_backprop.edge.arguments import Location

RNG = np.random.default_rng(0)
PARAMS = init_params([2, 3, 1], RNG)
CLASSIFIER = init_params([2, 4, 3], RNG)
X = RNG.normal(size=(5, 2))
Y = RNG.uniform(size=(5, 1))
LABELS = np.array([0, 2, 1, 1, 0])
ONES = np.ones(5)
(W1, B1), (W2, B2) = PARAMS

GOOD = {"params": PARAMS, "X": X, "y": Y}
CLASSES = {"params": CLASSIFIER, "y": LABELS, "loss": "softmax_cross_entropy"}
BINARY = {"loss": "binary_cross_entropy"}


def put(array, *, at, value):
    changed = array.copy()
    changed[at] = value
    return changed


# name: (arguments that differ from GOOD, the error, a pattern of its message)
REFUSED = {
    # Shapes
    "y (n,) for (n, 1)": ({"y": Y[:, 0]}, ValueError, r"\(5, 1\).*got \(5,\); pass y\[:, None\]"),
    "y (n, 1) for (n, 3)": (
        {"params": CLASSIFIER, "y": Y},
        ValueError,
        r"y must have shape \(5, 3\) for loss 'squared_error', got \(5, 1\)",
    ),
    "labels (n, 1) for (n,)": (
        CLASSES | {"y": LABELS[:, None]},
        ValueError,
        r"\(5, 3\) or \(5,\).*got \(5, 1\); class indices: pass y\[:, 0\]",
    ),
    "labels for a regression": (CLASSES | {"loss": "huber"}, ValueError, r"\(5, 3\).*got \(5,\)"),
    "y too short": ({"y": Y[:4]}, ValueError, "X has 5 rows, y has 4"),
    "labels too short": (CLASSES | {"y": LABELS[:4]}, ValueError, "X has 5 rows, y has 4"),
    "y too wide": ({"y": np.ones((5, 2))}, ValueError, r"shape \(5, 1\).*got \(5, 2\)"),
    "y of three dimensions": ({"y": Y[None]}, ValueError, r"shape \(5, 1\).*got \(1, 5, 1\)"),
    "y a number": ({"y": 1.0}, ValueError, r"shape \(5, 1\).*got \(\)"),
    "X of one dimension": (
        {"X": X[0]},
        ValueError,
        r"X must have two dimensions, \(n, 2\).*got \(2,\); X\[None, :\] for one sample",
    ),
    "X a number": ({"X": 1.0}, ValueError, r"two dimensions.*got \(\)$"),
    "X of three dimensions": ({"X": X[None]}, ValueError, r"two dimensions.*got \(1, 5, 2\)$"),
    "X too wide": ({"X": np.ones((5, 3))}, ValueError, "X has 3 columns, W of layer 1 takes 2"),
    "X transposed": ({"X": np.ones((2, 5))}, ValueError, r"would fit transposed: pass X\.T"),
    "weights (n, 1)": (
        {"sample_weight": ONES[:, None]},
        ValueError,
        r"sample_weight must have shape \(5,\), got \(5, 1\)",
    ),
    "weights too short": ({"sample_weight": ONES[:4]}, ValueError, r"\(5,\), got \(4,\)"),
    "weight a number": ({"sample_weight": 1.0}, ValueError, r"\(5,\), got \(\)"),
    "b too long": (
        {"params": [(W1, B1), (W2, np.ones(2))]},
        ValueError,
        "b of layer 2 has length 2, its W has 1 rows",
    ),
    "W too wide": (
        {"params": [(W1, B1), (np.ones((1, 4)), B2)]},
        ValueError,
        r"W of layer 2 has shape \(1, 4\), so layer 1 should have 4 outputs; it has 3",
    ),
    "W of layer 1 transposed": (
        {"params": [(W1.T, B1), (W2, B2)]},
        ValueError,
        r"W of layer 1 has shape \(2, 3\).*would fit transposed; pass W\.T",
    ),
    "W of layer 2 transposed": (
        {"params": [(W1, B1), (W2.T, B2)]},
        ValueError,
        r"W of layer 2 has shape \(3, 1\).*would fit transposed; pass W\.T",
    ),
    "W of one dimension": (
        {"params": [(W1, B1), (W2[0], B2)]},
        ValueError,
        r"layer 2 needs W of shape \(d_2, d_1\) and b of shape \(d_2,\), got \(3,\) and \(1,\)",
    ),
    "b of two dimensions": (
        {"params": [(W1, B1[:, None]), (W2, B2)]},
        ValueError,
        r"layer 1 needs .* got \(3, 2\) and \(3, 1\)",
    ),
    "width 0": (
        {"params": [(np.ones((0, 2)), np.ones(0))]},
        ValueError,
        r"layer 1 has width 0: W has shape \(0, 2\)",
    ),
    # Values
    "label too large": (
        CLASSES | {"y": put(LABELS, at=3, value=3)},
        ValueError,
        r"y must hold class indices from 0 to 2, got 3 at \[3\]",
    ),
    "label negative": (
        CLASSES | {"y": put(LABELS, at=4, value=-1)},
        ValueError,
        r"from 0 to 2, got -1 at \[4\]",
    ),
    "label uint8": (
        CLASSES | {"y": put(LABELS.astype(np.uint8), at=0, value=255)},
        ValueError,
        r"from 0 to 2, got 255 at \[0\]",
    ),
    "labels of floats": (
        CLASSES | {"y": LABELS * 1.0},
        TypeError,
        r"shape \(5,\) and dtype.*float64: class indices must be integers; .*\(5, 3\)",
    ),
    "labels of nan": (CLASSES | {"y": ONES * np.nan}, TypeError, "class indices must be integers"),
    "labels listed as floats": (CLASSES | {"y": [0.0] * 5}, TypeError, "must be integers"),
    "probability above 1": (
        BINARY | {"y": put(Y, at=(2, 0), value=1.5)},
        ValueError,
        r"y must hold probabilities from 0 to 1, got 1\.5 at \[2, 0\]",
    ),
    "probability below 0": (BINARY | {"y": put(Y, at=2, value=-0.5)}, ValueError, r"got -0\.5 at"),
    "probability 2, an integer": (
        BINARY | {"y": np.full((5, 1), 2)},
        ValueError,
        r"from 0 to 1, got 2 at \[0, 0\]",
    ),
    "negative class weight": (
        CLASSES | {"y": put(np.ones((5, 3)), at=(2, 1), value=-0.25)},
        ValueError,
        r"y must hold weights per class that are not negative, got -0\.25 at \[2, 1\]",
    ),
    "negative weight": (
        {"sample_weight": put(ONES, at=1, value=-2)},
        ValueError,
        r"sample_weight must hold weights that are not negative, got -2 at \[1\]",
    ),
    "weights all zero": (
        {"sample_weight": 0 * ONES},
        ValueError,
        "weights are all zero: .* use reduction='sum'",
    ),
    "a mean over none": (
        {"X": X[:0], "y": Y[:0]},
        ValueError,
        "X has no rows: a mean over none is undefined; use reduction='sum'",
    ),
    "a weighted mean over none": (
        {"X": X[:0], "y": Y[:0], "sample_weight": ONES[:0]},
        ValueError,
        "use reduction='sum'",
    ),
    # Names
    "activation misspelt": (
        {"activation": "sigmod"},
        ValueError,
        "unknown activation 'sigmod'; known: identity, sigmoid, .*; did you mean 'sigmoid'",
    ),
    "activation without a guess": (
        {"activation": "wavelet"},
        ValueError,
        f"known: {', '.join(ACTIVATIONS)}$",
    ),
    "activation begun": ({"activation": "gelu"}, ValueError, "did you mean 'gelu_tanh'"),
    "reduction None": ({"reduction": None}, TypeError, "reduction must be a name"),
    "reduction an array": ({"reduction": X}, TypeError, "reduction must be a name"),
    "activation a function": ({"activation": np.tanh}, TypeError, "a name or a sequence of names"),
    "activation a number": ({"activation": 3}, TypeError, "activation must be .*, got int"),
    "activations too few": (
        {"activation": ["tanh"]},
        ValueError,
        "activation names 1 layers, params has 2; .* the output layer included",
    ),
    "activations misspelt": (
        {"activation": ["tanh", "Relu"]},
        ValueError,
        "unknown activation 'Relu'.*did you mean 'relu'",
    ),
    "activations of None": (
        {"activation": ["tanh", None]},
        TypeError,
        r"activation must be a name \(str\), got NoneType",
    ),
    "loss misspelt": (
        {"loss": "squared_eror"},
        ValueError,
        "unknown loss 'squared_eror'; known: squared_error, .*; did you mean 'squared_error'",
    ),
    "loss without a guess": ({"loss": "mse"}, ValueError, "unknown loss.*softmax_cross_entropy$"),
    "loss a list": ({"loss": ["huber"]}, TypeError, r"loss must be a name \(str\), got list"),
    "reduction misspelt": (
        {"reduction": "maen"},
        ValueError,
        "unknown reduction 'maen'; known: mean, sum; did you mean 'mean'",
    ),
    "backend misspelt": (
        {"backend": "touch"},
        ValueError,
        "unknown backend 'touch'; known: numpy, numba, cupy, torch, jax; did you mean 'torch'",
    ),
    "backend a module": ({"backend": np}, TypeError, r"backend must be a name \(str\), got module"),
    **{
        f"sigmoid outputs under {loss}": (
            {"loss": loss, "activation": ["tanh", "sigmoid"]},
            ValueError,
            f"'{loss}' takes logits, so the output activation must be 'identity', got 'sigmoid'",
        )
        for loss in ("poisson", "binary_cross_entropy", "softmax_cross_entropy")
    },
    # Dtypes
    "X float32": (
        {"X": X.astype(np.float32)},
        TypeError,
        "X has dtype .*float32, the parameters float64: cast it, .*float64",
    ),
    "y float32": ({"y": Y.astype(np.float32)}, TypeError, "y has dtype .*float32, the parameters"),
    "weights float32": (
        {"sample_weight": ONES.astype(np.float32)},
        TypeError,
        "sample_weight has dtype .*float32, the parameters float64",
    ),
    "b float32": (
        {"params": [(W1, B1), (W2, B2.astype(np.float32))]},
        TypeError,
        "b of layer 2 has dtype .*float32, W of layer 1 float64: cast it",
    ),
    "X complex": ({"X": X + 0j}, TypeError, "X must hold real numbers .*, got dtype .*complex128"),
    "W complex": (
        {"params": [(W1, B1), (W2 + 0j, B2)]},
        TypeError,
        "W of layer 2 must hold real numbers .* complex128",
    ),
    # What is no array
    "X None": ({"X": None}, TypeError, "X must hold real numbers .* object .from a NoneType"),
    "y None": ({"y": None}, TypeError, "y must hold real numbers .* object .from a NoneType"),
    "X ragged": ({"X": [[1, 2], [3]]}, ValueError, "X cannot be read .* equally many in each"),
    "X of words": ({"X": [["1", "2"]] * 5}, TypeError, "X must hold real numbers .* <U1"),
    "X a word": ({"X": "train.csv"}, TypeError, "X must hold real numbers"),
    "X complex in a list": ({"X": [[1j, 2]] * 5}, TypeError, "complex128 .from a list"),
    "X beyond int64": ({"X": [[10**30, 1]] * 5}, TypeError, "X must hold real numbers .* object"),
    "X a dict": ({"X": {0: [1, 2]}}, TypeError, "object .from a dict"),
    "X a generator": ({"X": (row for row in X)}, TypeError, "object .from a generator"),
    "weights named": ({"sample_weight": "balanced"}, TypeError, "sample_weight must hold real"),
    "params empty": ({"params": []}, ValueError, "params is empty: a net needs at least one layer"),
    "params None": ({"params": None}, TypeError, r"sequence of \(W, b\) pairs.*got NoneType"),
    "params an array": ({"params": W1}, TypeError, r"params must be a sequence of \(W, b\) pairs"),
    "params a dict": ({"params": {"W": W1}}, TypeError, r"sequence of \(W, b\) pairs.*got dict"),
    "params a generator": ({"params": (p for p in PARAMS)}, TypeError, "got generator"),
    "params a word": ({"params": "net.npz"}, TypeError, "got str"),
    "params a number": ({"params": 3}, TypeError, "got int"),
    "params of numbers": (
        {"params": [1, 2]},
        TypeError,
        r"layer 1 must be a pair \(W, b\), got int",
    ),
    "params flat": ({"params": [W1, B1]}, TypeError, r"layer 1 must be a pair \(W, b\), got"),
    "a layer of three": (
        {"params": [(W1, B1), (W2, B2, B2)]},
        TypeError,
        r"layer 2 must be a pair \(W, b\), got .* of length 3",
    ),
    "a layer without b": ({"params": [(W1, None)]}, TypeError, "layer 1 has no b: pass zeros"),
    "a layer without W": ({"params": [(None, B1)]}, TypeError, "layer 1 has no W: pass zeros"),
}

# What only NumPy has.
REFUSED_IN_NUMPY = {
    "X of objects": (
        {"X": X.astype(object)},
        TypeError,
        "X must hold real numbers .* object .from a ndarray",
    ),
    "X masked": ({"X": np.ma.array(X)}, TypeError, "X is a masked array.*fill it first"),
    "y masked": ({"y": np.ma.array(Y)}, TypeError, "y is a masked array"),
    "X of dates": ({"X": X.astype("M8[s]")}, TypeError, "X must hold real numbers .* datetime64"),
    "X structured": ({"X": np.zeros((5, 2), "f8, f8")}, TypeError, "X must hold real numbers"),
    "X longdouble": ({"X": X.astype(np.longdouble)}, TypeError, "X "),
    "label uint64": (
        CLASSES | {"y": put(LABELS.astype(np.uint64), at=1, value=2**64 - 1)},
        ValueError,
        r"from 0 to 2, got 1\.84467e\+19 at \[1\]",
    ),
}

FORWARD_ARGUMENTS = {"params", "X", "activation", "backend"}


def map_arrays(value, change):
    """A call's arguments with every array changed, however deep it lies."""
    if isinstance(getattr(value, "shape", None), tuple):
        return change(value)
    if isinstance(value, dict):
        return {key: map_arrays(item, change) for key, item in value.items()}
    if type(value) is list or isinstance(value, tuple):
        return [map_arrays(item, change) for item in value]
    return value


def assert_refused(function, call, error, message, numpy=np.copy):
    """Refused by an error of exactly that type, and nothing the caller owns is changed."""
    before = map_arrays(call, numpy)
    with pytest.raises(error, match=f"(?s){message}") as raised:
        function(**call)
    assert raised.type is error
    np.testing.assert_equal(map_arrays(call, numpy), before)


@pytest.mark.parametrize("name", REFUSED | REFUSED_IN_NUMPY)
def test_refused(name):
    change, error, message = (REFUSED | REFUSED_IN_NUMPY)[name]
    assert_refused(compute_grads, GOOD | change, error, message)
    assert_refused(check_grads, GOOD | change, error, message)
    if set(change) <= FORWARD_ARGUMENTS:
        assert_refused(forward, {"params": PARAMS, "X": X} | change, error, message)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_backend(backend, name):
    change, error, message = REFUSED[name]
    call = map_arrays(GOOD | change, backend.array)
    assert_refused(compute_grads, call, error, message, numpy=backend.numpy)


def test_trace_refuses_the_same():
    assert_refused(trace, GOOD | {"y": Y[:, 0]}, ValueError, "never broadcast")
    assert_refused(trace, GOOD | {"loss": "poison"}, ValueError, "did you mean 'poisson'")


PRECISION_REFUSED = {
    "misspelt": (
        "tf23",
        ValueError,
        "unknown precision 'tf23'; known: float32, float32_exact, tf32, bfloat16; .* 'tf32'",
    ),
    "a dtype": (np.float32, TypeError, r"precision must be a name \(str\), got type"),
    "without a GPU": (
        "tf32",
        ValueError,
        "precision='tf32' is for float32 arrays under backend 'cupy'; these are .* arrays of "
        "float32, computed in float32: leave precision out",
    ),
    "without a GPU, though exact": ("float32_exact", ValueError, "leave precision out"),
}


@pytest.mark.parametrize("name", PRECISION_REFUSED)
def test_precision_refused(backend, name):
    precision, error, message = PRECISION_REFUSED[name]
    if backend.name == "cupy" and error is ValueError and precision != "tf23":
        pytest.skip("a choice that CuPy has")
    call = map_arrays(GOOD, lambda A: backend.array(A.astype(np.float32)))
    change = {"precision": precision}
    assert_refused(compute_grads, call | change, error, message, numpy=backend.numpy)
    with pytest.raises(error, match=message):
        prepare_grads(call["params"], n=5, precision=precision)


def test_precision_of_float64_is_its_own(monkeypatch):
    """On CuPy too, here played by NumPy: only float32 has a choice."""
    monkeypatch.setattr(backends, "library_name", lambda xp: "cupy")
    home = Location(np, None)
    for name in rules.PRECISIONS:
        rules.check_precision(name, home, "float32")
    rules.check_precision("float32", home, "float64")
    with pytest.raises(ValueError, match="these are cupy arrays of float64, computed in float64"):
        rules.check_precision("bfloat16", home, "float64")


# Libraries, dtypes and devices together ----------------------------------------------------------


@pytest.mark.parametrize("name", ["params", "X", "y"])
def test_libraries_are_not_mixed(backend, name):
    if backend.name == "numpy":
        pytest.skip("mixed with NumPy arrays")
    call = GOOD | {name: map_arrays(GOOD[name], backend.array)}
    kinds = f"(numpy|{backend.name})"
    message = f"is a {kinds} array, .* a {kinds} array: pass arrays of one library, or name a"
    assert_refused(compute_grads, call, TypeError, message, numpy=np.asarray)


def test_torch_and_jax_are_not_mixed():
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    call = map_arrays(GOOD, torch.tensor) | {"X": jnp.asarray(X)}
    message = "W of layer 1 is a torch array, X a jax array: pass arrays of one library"
    assert_refused(compute_grads, call, TypeError, message, numpy=np.asarray)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_a_device_array_is_never_copied_silently(backend, name):
    if backend.name == name:
        pytest.skip("its own arrays")
    if backend.name == "numpy":
        pytest.skip("NumPy arrays are uploaded where a backend is named")
    call = map_arrays(GOOD, backend.array) | {"backend": name}
    copies = {
        "torch": r"W\.numpy\(force=True\)",
        "jax": r"numpy\.asarray\(W\)",
        "cupy": r"cupy\.asnumpy\(W\)",
        "array_api_strict": "silently",
    }
    message = f"is a {backend.name} array.*backend='{name}'.*{copies[backend.name]}"
    assert_refused(compute_grads, call, TypeError, message, numpy=backend.numpy)


def test_devices_are_not_mixed():
    strict = pytest.importorskip("array_api_strict")
    call = map_arrays(GOOD, strict.asarray)
    call["y"] = strict.asarray(Y, device=strict.Device("device1"))
    message = "W of layer 1 is on .*CPU.*, y on .*device1.*: move all arrays to one device"
    assert_refused(compute_grads, call, ValueError, message, numpy=id)


def test_a_torch_module_is_refused_with_the_pairs_to_take():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1))
    with pytest.raises(
        TypeError, match=r"Sequential; from torch: \[\(m\.weight, m\.bias\) for m in"
    ):
        compute_grads(model, torch.zeros(5, 2), torch.zeros(5, 1))
    pairs = [(m.weight, m.bias) for m in model if hasattr(m, "weight")]
    assert len(compute_grads(pairs, torch.zeros(5, 2), torch.zeros(5, 1)).grads) == 2


def test_a_dtype_that_the_library_lacks():
    torch = pytest.importorskip("torch")
    params = map_arrays(PARAMS, lambda A: torch.tensor(A).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="unknown dtype 'float8_e4m3fn'; known: float64"):
        forward(params, [[1, 2]])


@pytest.mark.parametrize("name", ["cupy", "torch", "jax"])
def test_a_missing_library_names_the_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    extra = {"cupy": r"mlp-backprop\[cuda12\]' or .*mlp-backprop\[cuda13\]'"}
    message = f"backend '{name}' needs {name}.*pip install '" + extra.get(
        name, rf"mlp-backprop\[{name}\]'"
    )
    assert_refused(compute_grads, GOOD | {"backend": name}, ImportError, message)


class CUDARuntimeError(RuntimeError):
    """Stands in for CuPy's."""


def no_driver():
    raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")


@pytest.mark.parametrize(
    ("count", "reason"), [(no_driver, "cudaErrorNoDevice"), (lambda: 0, "the device count is 0")]
)
def test_cupy_without_a_device(monkeypatch, count, reason):
    cupy = cupy_api.library(
        {
            "cuda.runtime.getDeviceCount": count,
            "cuda.runtime.CUDARuntimeError": CUDARuntimeError,
        }
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", SimpleNamespace())
    message = f"backend 'cupy' needs a CUDA device.*{reason}.*use backend='numpy'"
    assert_refused(compute_grads, GOOD | {"backend": "cupy"}, ImportError, message)


JAX_WITHOUT_X64 = """
import numpy as np
import mlp_backprop

params, X, y = [(np.ones((1, 2)), np.zeros(1))], np.ones((3, 2)), np.ones((3, 1))
for call in (
    lambda: mlp_backprop.compute_grads(params, X, y, backend="jax"),
    lambda: mlp_backprop.forward([([[1, 2]], [3])], X, backend="jax"),
    lambda: mlp_backprop.init_params([2, 1], backend="jax"),
):
    try:
        call()
    except TypeError as error:
        assert 'jax.config.update("jax_enable_x64", True)' in str(error), error
    else:
        raise AssertionError("float64 was accepted")

params = [(W.astype("float32"), b.astype("float32")) for W, b in params]
loss, grads = mlp_backprop.compute_grads(
    params, X.astype("float32"), np.zeros(3, dtype=int), loss="softmax_cross_entropy", backend="jax"
)
assert str(loss.dtype) == str(grads[0].W.dtype) == "float32"
"""


def test_float64_in_jax_without_its_switch():
    pytest.importorskip("jax")
    environment = os.environ | {"JAX_ENABLE_X64": "0"}
    command = [sys.executable, "-W", "error", "-c", JAX_WITHOUT_X64]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What is legal, and gives the answer of the plain call -------------------------------------------

COUNTS = np.array([[0, 1], [1, 1], [3, 0], [2, 2], [1, 0]])


SAME_FLOATS = {
    "lists": lambda A: A.tolist(),
    "tuples": lambda A: tuple(map(tuple, A.tolist())) if A.ndim == 2 else tuple(A.tolist()),
    "lists of arrays": list,
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "negative strides": lambda A: A[::-1].copy()[::-1],
    "every second entry": lambda A: np.repeat(A, 2, axis=-1)[..., ::2],
    "big-endian": lambda A: A.astype(">f8"),
    "a subclass": lambda A: A.view(np.recarray),
    "a buffer": lambda A: memoryview(np.ascontiguousarray(A)),
}


@pytest.mark.parametrize("name", [None, "torch", "jax"])
@pytest.mark.parametrize("kind", SAME_FLOATS)
def test_the_same_numbers_in_another_form(kind, name):
    if name is not None:
        pytest.importorskip(name)
    call = GOOD | {"sample_weight": np.arange(5.0)}
    expected = compute_grads(**call)
    got = compute_grads(**map_arrays(call, SAME_FLOATS[kind]), backend=name)
    assert_close(got.loss, expected.loss, 1e-14)
    assert_grads_close(got.grads, expected.grads, 1e-14)


@pytest.mark.parametrize("dtype", "?bBhHiIlLqQ")
def test_integers_and_booleans_are_converted(dtype):
    counts, y = COUNTS.astype(dtype), COUNTS[:, :1].astype(dtype)
    expected = compute_grads(PARAMS, counts.astype(float), y.astype(float))
    assert_grads_close(compute_grads(PARAMS, counts, y).grads, expected.grads, 0)
    whole = [(np.ones((1, 2), dtype), np.zeros(1, dtype))]
    assert compute_grads(whole, counts, y).grads[0].W.dtype == np.float64


@pytest.mark.parametrize("name", [None, "torch"])
@pytest.mark.parametrize("dtype", "bBhHiIlLqQ")
def test_labels_of_every_integer_type(dtype, name):
    if name is not None:
        pytest.importorskip(name)
    expected = compute_grads(**GOOD | CLASSES)
    got = compute_grads(**GOOD | CLASSES | {"y": LABELS.astype(dtype)}, backend=name)
    assert_grads_close(got.grads, expected.grads, 1e-14)


def test_labels_as_lists_and_booleans():
    expected = compute_grads(**GOOD | CLASSES | {"y": LABELS == 2})
    got = compute_grads(**GOOD | CLASSES | {"y": (LABELS == 2).astype(int).tolist()})
    assert_grads_close(got.grads, expected.grads, 0)


def test_labels_of_a_narrow_type_under_more_classes_than_it_counts(backend):
    params = map_arrays(init_params([2, 300], rng=0), backend.array)
    call = {"params": params, "X": backend.array(X), "loss": "softmax_cross_entropy"}
    y = np.array([0, 255, 3, 255, 254])
    got = compute_grads(**call, y=backend.array(y.astype(np.uint8)))
    expected = compute_grads(**call, y=backend.array(y))
    assert_grads_close(
        map_arrays(got.grads, backend.numpy), map_arrays(expected.grads, backend.numpy)
    )


def test_lists_take_the_dtype_of_the_parameters():
    params = init_params([2, 3, 1], rng=0, dtype="float32")
    loss, grads = compute_grads(params, X.tolist(), Y.tolist(), sample_weight=[1, 2, 3, 4, 5])
    assert loss.dtype == grads[0].W.dtype == grads[1].b.dtype == np.float32
    mixed = [(params[0].W.tolist(), params[0].b), (params[1].W, params[1].b.tolist())]
    assert compute_grads(mixed, X.tolist(), Y.tolist()).grads[0].W.dtype == np.float32


def test_sequences_of_other_kinds():
    expected = compute_grads(PARAMS, X, Y)
    for params in (tuple(PARAMS), UserList(PARAMS), [list(layer) for layer in PARAMS]):
        assert_grads_close(compute_grads(params, X, Y).grads, expected.grads, 0)
    named = compute_grads(PARAMS, X, Y, activation=("sigmoid", np.str_("identity")))
    assert_grads_close(named.grads, expected.grads, 0)


def test_zero_weights_under_a_sum(backend):
    call = map_arrays(GOOD | {"sample_weight": 0 * ONES}, backend.array)
    loss, grads = compute_grads(**call, reduction="sum")
    assert float(loss) == 0
    assert all(not backend.numpy(g).any() for layer in grads for g in layer)


def test_nan_and_inf_in_the_data_pass(backend):
    for value in (np.nan, np.inf):
        for name, array in (("X", X), ("y", Y), ("sample_weight", ONES)):
            call = map_arrays(GOOD | {name: put(array, at=0, value=value)}, backend.array)
            assert not np.isfinite(float(compute_grads(**call).loss)) or name == "X"
    binary = map_arrays(GOOD | BINARY | {"y": put(Y, at=0, value=np.nan)}, backend.array)
    assert np.isnan(float(compute_grads(**binary).loss))


def test_torch_labels_of_unsigned_types():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    labels = torch.tensor(LABELS).to(torch.uint16)
    params = [(torch.tensor(W), torch.tensor(b)) for W, b in CLASSES["params"]]
    loss, _ = compute_grads(params, torch.tensor(X), labels, loss=CLASSES["loss"])
    expected, _ = compute_grads(CLASSES["params"], X, LABELS, loss=CLASSES["loss"])
    assert float(loss) == pytest.approx(float(expected), rel=1e-14)


def test_sparse_tensors_are_refused():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    params = [(torch.tensor(W), torch.tensor(b)) for W, b in GOOD["params"]]
    with pytest.raises(TypeError, match=r"X is sparse: pass X\.to_dense\(\)"):
        compute_grads(params, torch.tensor(X).to_sparse(), torch.tensor(GOOD["y"]))


def test_a_list_of_tensors_in_a_graph_is_refused():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rows = list(torch.tensor(X).requires_grad_())
    with pytest.raises(ValueError, match="X cannot be read as an array"):
        compute_grads(GOOD["params"], rows, GOOD["y"])


def test_no_labels_at_all():
    loss, _ = compute_grads(
        CLASSES["params"], np.empty((0, 2)), [], loss=CLASSES["loss"], reduction="sum"
    )
    assert loss == 0
