"""Backends: which are usable, and where arrays go in and results come out."""

import sys
from types import SimpleNamespace

import cupy_api
import numpy as np
import pytest
from oracles import assert_grads_close, make_problem

from mlp_backprop import backends, compute_grads, forward, prepare_grads, trace
from mlp_backprop.edge import backends as namespaces

PROBLEM = make_problem(sizes=(3, 4, 2), n=5, activation="sigmoid", weighted=True)


def call(problem, **options):
    return compute_grads(problem.params, problem.X, problem.y, **problem.options | options)


def on_host(backend, grads):
    return [(backend.numpy(W), backend.numpy(b)) for W, b in grads]


def library_of(array):
    return type(array).__module__.partition(".")[0].removesuffix("lib")


# backends() --------------------------------------------------------------------------------------


def test_every_backend_has_a_status():
    status = {row.name: row for row in backends()}
    assert list(status) == ["numpy", "numba", "cupy", "torch", "jax"]
    assert status["numpy"] == ("numpy", True, np.__version__, ["cpu"], None)
    for row in status.values():
        assert row.usable == (row.reason is None) == bool(row.devices)
        assert row.usable == (row.version is not None)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_usable_backend_has_version_and_devices(name):
    library = pytest.importorskip(name)
    (row,) = (row for row in backends() if row.name == name)
    assert row.version == library.__version__
    assert row.devices[0].startswith("cpu")


@pytest.mark.parametrize("name", ["cupy", "torch", "jax"])
def test_a_missing_backend_says_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    (row,) = (row for row in backends() if row.name == name)
    assert not row.usable
    assert f"needs {name}" in row.reason
    assert "pip install 'mlp-backprop[" in row.reason


def fake_cupy(device_count):
    return cupy_api.library(
        {
            "__version__": "14.0",
            "cuda.runtime.getDeviceCount": lambda: device_count,
            "cuda.runtime.getDeviceProperties": lambda i: {"name": f"GPU {i}".encode()},
            "cuda.runtime.CUDARuntimeError": RuntimeError,
        }
    )


def test_the_devices_of_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(device_count=2))
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", SimpleNamespace())
    (row,) = (row for row in backends() if row.name == "cupy")
    assert row == ("cupy", True, "14.0", ["GPU 0", "GPU 1"], None)


def test_cupy_without_a_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(device_count=0))
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", SimpleNamespace())
    (row,) = (row for row in backends() if row.name == "cupy")
    assert not row.usable
    assert "needs a CUDA device" in row.reason


# From the arrays, or by name ---------------------------------------------------------------------


def assert_all_of(name, dtype, *arrays):
    for array in arrays:
        assert library_of(array) == name
        assert str(array.dtype).endswith(dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_array_type_in_array_type_out(backend, dtype):
    """Every public function, every result."""
    placed = PROBLEM.astype(dtype).map(backend.array)
    loss, grads = call(placed)
    steps = trace(placed.params, placed.X, placed.y, **placed.options)
    layers = [A for layer in (*grads, *steps.grads) for A in layer]
    everything = [loss, steps.loss, *layers, *steps.Z, *steps.H, *steps.D]
    everything.append(forward(placed.params, placed.X))
    assert_all_of(backend.name, dtype, *everything)
    assert loss.shape == ()
    tolerance = 1e-14 if dtype == "float64" else 1e-6
    assert_grads_close(on_host(backend, grads), call(PROBLEM).grads, tolerance)


def test_a_named_backend_uploads_and_keeps_the_results(backend):
    if backend.name == "array_api_strict":
        pytest.skip("used by its arrays, not by name")
    loss, grads = call(PROBLEM, backend=backend.name)
    H = forward(PROBLEM.params, PROBLEM.X, backend=backend.name)
    assert_all_of(backend.name, "float64", loss, H, *(A for layer in grads for A in layer))
    assert_grads_close(on_host(backend, grads), call(PROBLEM).grads, 1e-14)


def test_a_named_backend_takes_its_own_arrays_and_numpys_together(backend):
    if backend.name == "array_api_strict":
        pytest.skip("used by its arrays, not by name")
    placed = PROBLEM.map(backend.array)
    mixed = PROBLEM._replace(params=placed.params)
    assert_grads_close(
        on_host(backend, call(mixed, backend=backend.name).grads), call(PROBLEM).grads, 1e-14
    )


def test_lists_follow_the_arrays(backend):
    placed = PROBLEM.map(backend.array)
    lists = PROBLEM.map(lambda A: A.tolist())
    _, grads = call(lists._replace(X=placed.X))
    assert_all_of(backend.name, "float64", *(A for layer in grads for A in layer))
    assert_grads_close(on_host(backend, grads), call(PROBLEM).grads, 1e-14)


@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_the_device_is_kept(loss):
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    problem = make_problem(loss=loss, weighted=True)
    placed = problem.map(lambda A: strict.asarray(A, device=device))
    value, grads = call(placed)
    assert all(A.device == device for A in (value, *(A for layer in grads for A in layer)))
    lists = problem.map(lambda A: A.tolist())._replace(params=placed.params)
    assert call(lists).loss.device == device


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_half_precision_arrays(name, dtype):
    pytest.importorskip(name)
    row = namespaces.BACKENDS[name]
    xp = namespaces.namespace(name)
    placed = PROBLEM.map(lambda A: xp.astype(xp.asarray(A), getattr(xp, dtype)))
    loss, grads = call(placed)
    assert_all_of(name, dtype, *(A for layer in grads for A in layer))
    assert_all_of(name, "float32", loss)
    narrow = [[row.to_numpy(A).astype(float) for A in layer] for layer in grads]
    assert_grads_close(narrow, call(PROBLEM).grads, 0.05 if dtype == "bfloat16" else 5e-3)


# torch ------------------------------------------------------------------------------------------


def test_nothing_is_recorded_by_autograd():
    torch = pytest.importorskip("torch")
    leaf = PROBLEM.map(lambda A: torch.tensor(A, requires_grad=True))
    loss, grads = call(leaf)
    steps = trace(leaf.params, leaf.X, leaf.y, **leaf.options)
    results = [loss, forward(leaf.params, leaf.X), *steps.Z, *steps.H, *steps.D, steps.loss]
    results += [A for layer in (*grads, *steps.grads) for A in layer]
    assert not any(A.requires_grad or A.grad_fn for A in results)
    assert all(A.requires_grad and A.grad is None for layer in leaf.params for A in layer)


def test_parameters_of_a_torch_model():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sigmoid(), torch.nn.Linear(4, 2))
    X, y = torch.randn(5, 3), torch.randn(5, 2)
    pairs = [(m.weight, m.bias) for m in model if hasattr(m, "weight")]
    loss, grads = compute_grads(pairs, X, y)
    expected = ((model(X) - y) ** 2).sum(1).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for (W, b), (V, c) in zip(grads, pairs, strict=True):
        torch.testing.assert_close(W, V.grad)
        torch.testing.assert_close(b, c.grad)


def test_an_upload_shares_no_memory_with_the_results():
    torch = pytest.importorskip("torch")
    X = np.ones((2, 1))
    steps = trace([([[2.0]], [0.0])], X, [[0.0], [0.0]], backend="torch")
    X[:] = 7
    torch.testing.assert_close(steps.grads[0].W, torch.tensor([[8.0]], dtype=torch.float64))


# Helpers ----------------------------------------------------------------------------------------


def test_what_is_no_array_has_no_namespace():
    for value in ([1, 2], (1.0,), 3, None, "X", {}, object(), SimpleNamespace(shape=(1,), dtype=1)):
        assert namespaces.namespace_of(value) is None


def test_the_namespace_of_an_array(backend):
    xp = namespaces.namespace_of(backend.array(np.ones(2)))
    assert namespaces.library_name(xp) == backend.name
    assert (xp is np) == (backend.name == "numpy")


# torch tensors under backend="cupy" --------------------------------------------------------------


class Noted:
    """A context manager that notes when it is entered and left."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __enter__(self):
        self.log.append(f"in {self.name}")

    def __exit__(self, *error):
        self.log.append(f"out of {self.name}")


@pytest.fixture
def shared_memory(monkeypatch):
    """A tensor on cuda:1, where torch's current stream is 7, and a log of what CuPy is asked."""
    log = []
    cupy = cupy_api.library(
        {
            "cuda.Device": lambda index: Noted(log, f"device {index}"),
            "cuda.Stream.from_external": lambda stream: Noted(
                log, f"stream {stream.__cuda_stream__()}"
            ),
            "from_dlpack": lambda array: ("shared", array),
        }
    )
    current_stream = lambda device: SimpleNamespace(cuda_stream=7)  # noqa: E731
    torch = SimpleNamespace(cuda=SimpleNamespace(current_stream=current_stream))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=1)), log


def test_cupy_works_on_the_memory_and_the_stream_of_torch(shared_memory):
    tensor, log = shared_memory
    assert namespaces.borrowed(tensor, "cupy") == ("shared", tensor)
    with namespaces.callers_stream([1, tensor], "cupy"):
        log.append("work")
    outwards = ["out of stream (0, 7)", "out of device 1"]
    assert log == ["in device 1", "in stream (0, 7)", "work", *outwards]


@pytest.mark.parametrize("name", [None, "torch", "numpy"])
def test_only_where_cupy_is_named(shared_memory, name):
    tensor, log = shared_memory
    assert namespaces.borrowed(tensor, name) is tensor
    with namespaces.callers_stream([1, tensor], name):
        assert log == []


def test_only_what_lies_on_a_gpu():
    for array in (np.ones(3), [1.0], SimpleNamespace(is_cuda=False)):
        assert namespaces.borrowed(array, "cupy") is array
        with namespaces.callers_stream([array], "cupy"):
            pass


def test_every_argument_may_be_borrowed(monkeypatch, nothing_seen):
    """Played by adding 1: all arrays must come out of `borrowed`."""
    problem = make_problem(n=5, weighted=True)
    expected = call(problem.map(lambda A: A + 1))
    outputs = forward([(W + 1, b + 1) for W, b in problem.params], problem.X + 1)
    monkeypatch.setattr(namespaces, "borrowed", lambda array, backend: array + 1)
    nothing_seen()
    np.testing.assert_array_equal(forward(problem.params, problem.X), outputs)
    options = {key: value for key, value in problem.options.items() if key != "sample_weight"}
    weight = problem.options["sample_weight"]
    arrays = [[list(map(np.asfortranarray, layer)) for layer in problem.params], problem.X]
    prepared = prepare_grads(problem.params, n=5, **options)(*arrays, problem.y, weight)
    for loss, grads in (call(problem), prepared):
        assert loss == expected.loss
        assert_grads_close(grads, expected.grads, 1e-14)
