"""The CuPy engine on a card: every tier against float64, streams, memory, torch, the sanitizer.

    pytest -m gpu

Where the driver sees no device all of it is skipped; beside one, nothing may be missing.
test_engine.py needs none.
"""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from oracles import ACTIVATIONS, LOSSES, TAKE_LOGITS, assert_grads_close, make_problem

from mlp_backprop import compute_grads, prepare_grads
from mlp_backprop.edge import backends
from mlp_backprop.types import flat

pytestmark = pytest.mark.gpu

# Of the largest entry of each array. relu may round to the other side of its kink.
TOLERANCES = {"float32": 2e-5, "float32_exact": 2e-5, "tf32": 1e-2, "bfloat16": 8e-2}

# One net or more for each tier, and for what lies between them.
NETS = {
    "tiny": (2, 10, 5, 1),
    "tiny, several outputs": (3, 7, 4),
    "one layer": (5, 3),
    "width 1": (1, 1, 1),
    "beyond tiny": (2, 16, 16, 1),
    "odd widths": (20, 33, 17, 10),
    "tiles": (64, 64, 64, 1),
    "wide tiles": (128, 128, 10),
    "wide input": (784, 128, 64, 10),
    "wide": (300, 257, 129, 5),
}


def on_device(cupy, problem):
    """The problem there, for any stream."""
    placed = problem.map(cupy.asarray)
    cupy.cuda.Device().synchronize()
    return placed


def run(problem, **options):
    return compute_grads(problem.params, problem.X, problem.y, **problem.options | options)


def grad_fn_of(problem, **options):
    named = {name: problem.options[name] for name in ("activation", "loss")}
    return prepare_grads(problem.params, n=len(problem.X), **named, **options)


def arrays_of(problem):
    return *problem[:3], problem.options["sample_weight"]


def prepared(problem, **options):
    grad_fn, arrays = grad_fn_of(problem, **options), arrays_of(problem)
    return lambda: grad_fn(*arrays)


def bound(problem, **options):
    return grad_fn_of(problem, **options).bind(*arrays_of(problem))


def on_host(grads):
    return [(W.get(), b.get()) for W, b in grads]


def flat_of(result):
    return [result.loss, *flat(result.grads)]


def assert_right(cupy, problem, precision="float32", tolerance=None):
    """Both calls, against NumPy in float64; and the same bits again."""
    expected = run(problem, reduction="sum")
    call = prepared(
        on_device(cupy, problem.astype(np.float32)), reduction="sum", precision=precision
    )
    first, again = call(), call()
    public = run(on_device(cupy, problem.astype(np.float32)), reduction="sum", precision=precision)
    for loss, grads in (first, public):
        tolerance = tolerance or TOLERANCES[precision]
        assert_grads_close(on_host(grads), expected.grads, tolerance)
        np.testing.assert_allclose(float(loss), expected.loss, rtol=tolerance, atol=1e-30)
    for A, B in zip(flat_of(first), flat_of(again), strict=True):
        assert_array_equal(A.get(), B.get())


# Right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("n", [1, 2, 33, 1000, 40_001])
@pytest.mark.parametrize("net", NETS)
def test_every_net(cupy, net, n, precision):
    # As float32 has it from the start, so that the reference has the same inputs.
    problem = make_problem(NETS[net], n, weighted=n > 1, dtype=np.float32).astype(np.float64)
    assert_right(cupy, problem, precision)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("net", ["tiny, several outputs", "odd widths", "wide"])
def test_every_activation_and_loss(cupy, net, activation, loss):
    sizes = NETS[net]
    names = [activation] * (len(sizes) - 1)
    if loss in TAKE_LOGITS:
        names[-1] = "identity"
    problem = make_problem(sizes, 300, activation=names, loss=loss, dtype=np.float32)
    assert_right(cupy, problem.astype(np.float64), tolerance=1e-3)


@pytest.mark.parametrize("net", NETS)
def test_class_weights_and_no_rows(cupy, net):
    options = {"loss": "softmax_cross_entropy", "activation": "relu", "dtype": np.float32}
    sizes = (*NETS[net][:-1], 7)
    problem = make_problem(sizes, 100, class_rows=True, **options)
    assert_right(cupy, problem.astype(np.float64), tolerance=1e-3)
    none = on_device(cupy, make_problem(sizes, 0, **options))
    loss, grads = run(none, reduction="sum")
    assert float(loss) == 0
    assert not any(A.any() for A in flat(grads))


@pytest.mark.parametrize("net", NETS)
def test_float64(cupy, net):
    problem = make_problem(NETS[net], 1000, weighted=True)
    expected = run(problem)
    loss, grads = run(on_device(cupy, problem))
    assert float(loss) == pytest.approx(expected.loss, rel=1e-12)
    assert_grads_close(on_host(grads), expected.grads, 1e-11)


@pytest.mark.serial
@pytest.mark.parametrize("net", ["tiny", "tiles", "wide input", "wide"])
def test_as_accurate_as_torch(cupy, net):
    """The default precision against torch's float32, which may round differently, not worse."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no device")
    from mlp_backprop.checks import torch_reference

    problem = make_problem(NETS[net], 10_000, dtype=np.float32)
    expected = run(problem.astype(np.float64), reduction="sum").grads
    ours = on_host(run(on_device(cupy, problem), reduction="sum").grads)
    leaves = [torch.tensor(A, device="cuda", requires_grad=True) for A in flat(problem.params)]
    params = list(zip(leaves[::2], leaves[1::2], strict=True))
    X, y = (torch.tensor(A, device="cuda") for A in (problem.X, problem.y))
    torch_reference.sample_losses(params, X, y, problem.names, "squared_error").sum().backward()
    for got, leaf, A in zip(flat(ours), leaves, flat(expected), strict=True):
        theirs = np.linalg.norm(leaf.grad.numpy(force=True) - A)
        assert np.linalg.norm(got - A) <= max(2 * theirs, 1e-6 * np.linalg.norm(A))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_results_stay_while_inputs_change_in_place(cupy, net, weighted):
    """New results at every call; a graph, where there is one, sees what lies in X now."""
    problem = make_problem(NETS[net], 300, weighted=weighted, dtype=np.float32)
    device = on_device(cupy, problem)
    call, kept = prepared(device), []
    for k in range(6):
        device.X[...] = cupy.asarray((k + 1) / 4 * problem.X)
        kept.append(call())
        if k == 3:
            del kept[:2]  # their memory may be given again
    for k, result in enumerate(kept, 2):
        exact = problem._replace(X=np.float32((k + 1) / 4) * problem.X).astype(np.float64)
        assert_grads_close(on_host(result.grads), run(exact).grads, TOLERANCES["float32"])


@pytest.mark.parametrize("net", NETS)
def test_a_bound_call_reads_what_the_arrays_hold_by_then(cupy, net):
    problem = make_problem(NETS[net], 300, dtype=np.float32)
    device = on_device(cupy, problem)
    step = bound(device)
    streams = [cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream.null]
    for k, stream in enumerate(streams * 2):
        with stream:
            device.X[...] = cupy.asarray((k + 1) / 4 * problem.X)
            grads = step().grads
            stream.synchronize()
        exact = problem._replace(X=np.float32((k + 1) / 4) * problem.X).astype(np.float64)
        assert_grads_close(on_host(grads), run(exact).grads, TOLERANCES["float32"])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("net", NETS)
def test_gradients_are_written_to_out(cupy, net, order):
    problem = make_problem(NETS[net], 300, dtype=np.float32)
    device = on_device(cupy, problem)
    expected = run(device)
    grad_fn = grad_fn_of(device)
    out = [(cupy.zeros_like(W, order=order), cupy.zeros_like(b)) for W, b in device.params]
    for _ in range(4):
        for A in flat(out):
            A.fill(np.nan)
        loss, grads = grad_fn(*arrays_of(device), out=out)
        assert float(loss) == pytest.approx(float(expected.loss), rel=1e-6)
        for mine, given, A in zip(flat(grads), flat(out), flat(expected.grads), strict=True):
            assert mine is given
            cupy.testing.assert_allclose(mine, A, rtol=1e-5, atol=1e-6)


# Labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("label", [-1, 7, 2**31 - 1])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_label_out_of_range(cupy, net, label, dtype):
    """Refused where values are looked at; where they are not, nan, and nothing read beside."""
    sizes = (*NETS[net][:-1], 7)
    problem = make_problem(sizes, 50, loss="softmax_cross_entropy", dtype=np.float32)
    problem.y[13] = label
    problem = on_device(cupy, problem._replace(y=problem.y.astype(dtype)))
    with pytest.raises(ValueError, match=r"class indices from 0 to 6.* at \[13\]"):
        run(problem)
    assert np.isnan(float(prepared(problem)().loss))


# Streams and devices -----------------------------------------------------------------------------

SPIN = """
extern "C" __global__ void spin(long long cycles) {
  long long start = clock64();
  while (clock64() - start < cycles) {}
}
"""


def spin(cupy, cycles=400_000_000):
    """A few tenths of a second on the current stream."""
    cupy.RawKernel(SPIN, "spin")((1,), (1,), (np.int64(cycles),))


@pytest.mark.serial
@pytest.mark.parametrize("net", ["tiny", "tiles", "wide"])
def test_a_prepared_call_waits_for_nothing(cupy, net):
    problem = on_device(cupy, make_problem(NETS[net], 500, dtype=np.float32))
    call, step = prepared(problem), bound(problem)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        call(), call(), step(), step()
        stream.synchronize()
        spin(cupy)
        call(), step()
        assert not stream.done
        stream.synchronize()


@pytest.mark.serial
@pytest.mark.parametrize("net", ["tiny", "tiles", "wide"])
def test_work_is_on_the_current_stream(cupy, net):
    """X is written late, on a stream that nothing else waits for."""
    problem = make_problem(NETS[net], 500, dtype=np.float32)
    expected = run(on_device(cupy, problem)).grads
    device, zeros = on_device(cupy, problem), problem._replace(X=0 * problem.X)
    X, device = device.X, on_device(cupy, zeros)
    call = prepared(device)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        call(), call()
        spin(cupy)
        device.X[...] = X
        grads = call().grads
        stream.synchronize()
    for A, B in zip(flat(grads), flat(expected), strict=True):
        cupy.testing.assert_allclose(A, B, rtol=1e-6, atol=1e-7)


@pytest.mark.serial
@pytest.mark.parametrize("net", ["tiny", "tiles", "wide"])
def test_two_streams_at_once(cupy, net):
    problems = [
        on_device(cupy, make_problem(NETS[net], 5000, dtype=np.float32, seed=s)) for s in (0, 1)
    ]
    expected = [run(problem) for problem in problems]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in problems]
    results = [[], []]
    call = prepared(problems[0])
    for _ in range(50):
        for k, (problem, stream) in enumerate(zip(problems, streams, strict=True)):
            with stream:
                results[k].append(call() if k == 0 else run(problem))
    cupy.cuda.Device().synchronize()
    for k in (0, 1):
        for result in results[k]:
            for A, B in zip(flat(result.grads), flat(expected[k].grads), strict=True):
                assert_array_equal(A.get(), B.get())


def test_several_devices(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one device")
    problem = make_problem(NETS["tiny"], 100, dtype=np.float32)
    expected = run(on_device(cupy, problem))
    with cupy.cuda.Device(1):
        there = on_device(cupy, problem)
    loss, grads = run(there)
    assert loss.device.id == grads[0].W.device.id == 1
    for A, B in zip(flat(grads), flat(expected.grads), strict=True):
        assert_array_equal(A.get(), B.get())
    with pytest.raises(ValueError, match="move all arrays to one device"):
        run(there._replace(X=cupy.asarray(problem.X)))


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.serial
@pytest.mark.parametrize("net", ["tiny", "tiles", "wide"])
def test_ten_thousand_calls_do_not_grow(cupy, net):
    problem = on_device(cupy, make_problem(NETS[net], 100, dtype=np.float32))
    calls = [prepared(problem), lambda: run(problem)]
    pool, used = cupy.get_default_memory_pool(), []
    for count in (10, 5_000):
        for call in calls:
            for _ in range(count):
                call()
        cupy.cuda.Device().synchronize()
        used.append((pool.used_bytes(), pool.total_bytes()))
    assert used[0] == used[1]


@pytest.mark.serial
def test_short_of_memory(cupy):
    """With a limit that the activations of all rows do not fit under."""
    problem = on_device(cupy, make_problem((256, 512, 512, 4), 100_000, dtype=np.float32))
    expected = run(problem)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(pool.used_bytes() + 300_000_000)
    try:
        loss, grads = run(problem)
    finally:
        pool.set_limit(0)
    cupy.testing.assert_allclose(loss, expected.loss, rtol=1e-5)
    for A, B in zip(flat(grads), flat(expected.grads), strict=True):
        cupy.testing.assert_allclose(A, B, rtol=1e-3, atol=1e-5)


# torch -------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no device")
    return torch


@pytest.mark.serial
def test_tensors_are_taken_as_they_lie(cupy, torch):
    tensor = torch.ones(3, 2, device="cuda", requires_grad=True)
    array = backends.borrowed(backends.as_plain(tensor), "cupy")
    assert array.data.ptr == tensor.data_ptr()


@pytest.mark.serial
@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_torch_tensors(cupy, torch, loss):
    problem = make_problem((3, 5, 4), 50, loss=loss, weighted=True, dtype=np.float32)
    expected = run(on_device(cupy, problem))
    tensors = problem.map(lambda A: torch.tensor(A, device="cuda"))
    result = run(tensors, backend="cupy")
    again = prepared(tensors, backend="cupy")()
    step = bound(tensors, backend="cupy")
    for got in (result, again, step(), step()):
        for A, B in zip(flat(got.grads), flat(expected.grads), strict=True):
            assert_array_equal(A.get(), B.get())
            torch.from_dlpack(A)


@pytest.mark.serial
def test_the_stream_of_torch(cupy, torch):
    """X is written late on torch's stream, and written over as soon as the call is back."""
    problem = make_problem((64, 64, 1), 5000, dtype=np.float32)
    expected = run(on_device(cupy, problem)).grads
    tensors = problem.map(lambda A: torch.tensor(A, device="cuda"))
    X, tensors = tensors.X, tensors._replace(X=torch.zeros_like(tensors.X))
    run(tensors, backend="cupy")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)
        tensors.X.copy_(X)
        grads = run(tensors, backend="cupy").grads
        tensors.X.fill_(float("nan"))
    torch.cuda.synchronize()
    for A, B in zip(flat(grads), flat(expected), strict=True):
        assert_array_equal(A.get(), B.get())


# The sanitizer -----------------------------------------------------------------------------------

SANITIZED = """
import sys
import cupy
import numpy as np
from mlp_backprop import compute_grads, init_params

sizes = [int(size) for size in sys.argv[1].split("-")]
rng = np.random.default_rng(0)
params = [(cupy.asarray(W), cupy.asarray(b)) for W, b in init_params(sizes, rng, dtype="float32")]
X = cupy.asarray(rng.random((301, sizes[0]), dtype="float32"))
y = cupy.asarray(rng.integers(sizes[-1], size=301))
for precision in ("float32", "float32_exact", "bfloat16"):
    loss, _ = compute_grads(
        params, X, y, loss="softmax_cross_entropy", activation="tanh", precision=precision
    )
    assert np.isfinite(float(loss))
X[0, 0] = np.inf  # for the kernel that waits behind
loss, _ = compute_grads(params, X, y, loss="softmax_cross_entropy", activation="relu")
assert not np.isfinite(float(loss))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("sizes", ["2-10-5-3", "64-64-10", "200-130-10"])
def test_the_sanitizer_finds_nothing(cupy, tool, sizes):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c"]
    done = subprocess.run([*command, SANITIZED, sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
