"""Many nets as one list of layers: drawn, put together, taken apart, and what they say together."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from oracles import assert_close

from mlp_backprop import (
    Layer,
    Net,
    ensemble_forward,
    forward,
    init_params,
    ravel_params,
    stack_params,
    unravel_params,
    unstack_params,
)
from mlp_backprop.losses import LOSSES
from mlp_backprop.nets.initial import SCHEMES
from mlp_backprop.types import flat

SIZES = [3, 5, 2]
X = np.random.default_rng(0).normal(size=(7, 3))


def one(seed, sizes=SIZES, **options):
    return init_params(sizes, rng=seed, **options)


def assert_same(params, others):
    for A, B in zip(flat(params), flat(others), strict=True):
        assert_array_equal(A, B, strict=True)


# Initial values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_members_are_drawn_one_after_the_other(scheme, dtype):
    options = {"scheme": scheme, "dtype": dtype}
    stacked = init_params(SIZES, 1, members=4, **options)
    rng = np.random.default_rng(1)
    nets = unstack_params(stacked)
    assert len(nets) == 4
    for net in nets:
        assert_same(net, init_params(SIZES, rng, **options))


def test_a_member_alone_has_an_axis_too():
    assert_same(init_params(SIZES, 3, members=1), stack_params([one(3)]))


# Put together, and taken apart -------------------------------------------------------------------


def test_apart_is_the_inverse_of_together(backend):
    nets = [[Layer(*map(backend.array, layer)) for layer in one(seed)] for seed in range(3)]
    stacked = stack_params(nets)
    assert [tuple(A.shape) for A in flat(stacked)] == [(3, 5, 3), (3, 5), (3, 2, 5), (3, 2)]
    assert {type(A) for A in flat(stacked)} == {type(nets[0][0].W)}
    for net, again in zip(nets, unstack_params(stacked), strict=True):
        for A, B in zip(flat(net), flat(again), strict=True):
            assert_array_equal(backend.numpy(A), backend.numpy(B), strict=True)


def test_together_is_a_copy_and_apart_are_views():
    nets = [one(0), one(1)]
    stacked = stack_params(nets)
    stacked[0].W[0] = 0
    assert nets[0][0].W.all()
    assert not unstack_params(stacked)[0][0].W.any()


def test_nets_keep_their_names():
    nets = [Net(one(seed), ["tanh", "identity"], "poisson") for seed in range(2)]
    stacked = stack_params(nets)
    assert isinstance(stacked, Net)
    assert stacked[1:] == nets[0][1:]
    for net, again in zip(nets, unstack_params(stacked), strict=True):
        assert again[1:] == net[1:]
        assert_same(again.params, net.params)


def test_names_are_compared_and_not_how_they_are_written():
    assert len(
        unstack_params(stack_params([Net(one(0), "tanh"), Net(one(1), ["tanh", "identity"])]))
    )


def test_lists_are_parameters():
    stacked = stack_params([[([[1, 2]], [3])], [([[4, 5]], [6])]])
    assert_same(stacked, [(np.array([[[1.0, 2]], [[4, 5]]]), np.array([[3.0], [6]]))])


def test_vectors_of_members():
    stacked = init_params(SIZES, 0, members=3)
    vectors = ravel_params(stacked)
    assert_array_equal(vectors, [ravel_params(net) for net in unstack_params(stacked)])
    assert_same(unravel_params(vectors, one(0)), stacked)


def test_print_says_how_many():
    stacked = init_params([2, 10, 1], 0, members=5)
    text = "Net 2-10-1: tanh, squared_error, float64, 41 parameters, 5 members"
    assert str(Net(stacked, "tanh")) == text
    lists = [(W.tolist(), b.tolist()) for W, b in stacked]
    assert str(Net(lists, "tanh")) == text.replace("float64", "lists")


REFUSED = {
    "one net": (lambda: stack_params(one(0)), TypeError, r"layer 1 in nets\[0\] must be a pair"),
    "a Net": (lambda: stack_params(Net(one(0))), TypeError, "must be a sequence of nets, got"),
    "none": (lambda: stack_params([]), ValueError, "nets is empty: pass one or more"),
    "stacked": (
        lambda: stack_params([init_params(SIZES, members=2)]),
        ValueError,
        r"takes one net, and W of layer 1 in nets\[0\] has shape \(2, 5, 3\), that of 2 nets",
    ),
    "widths": (
        lambda: stack_params([one(0), one(1), one(0, [3, 4, 2])]),
        ValueError,
        r"nets\[0\] is a list 3-5-2, nets\[2\] a list 3-4-2: all must be alike",
    ),
    "activation": (
        lambda: stack_params([Net(one(0)), Net(one(1), "tanh")]),
        ValueError,
        r"3-5-2 sigmoid identity squared_error, nets\[1\] a Net 3-5-2 tanh identity squared_error",
    ),
    "loss": (
        lambda: stack_params([Net(one(0)), Net(one(1), loss="huber")]),
        ValueError,
        r"nets\[1\] a Net 3-5-2 sigmoid identity huber",
    ),
    "a Net and a list": (
        lambda: stack_params([Net(one(0)), one(1)]),
        ValueError,
        r"squared_error, nets\[1\] a list 3-5-2: all",
    ),
    "dtypes": (
        lambda: stack_params([one(0), one(1, dtype="float32")]),
        TypeError,
        r"W of layer 1 in nets\[1\] has dtype float32",
    ),
    "apart, of one": (
        lambda: unstack_params(one(0)),
        ValueError,
        r"W of shape \(E, d_l, d_{l-1}\) and b \(E, d_l\); layer 1 has \(5, 3\) and \(5,\)",
    ),
    "layers of other numbers": (
        lambda: unstack_params(
            [init_params(SIZES, members=2)[0], init_params(SIZES, members=3)[1]]
        ),
        ValueError,
        r"layer 2 needs W of shape \(2, d_2, d_1\) and b of shape \(2, d_2\), since W of layer 1 "
        r"is of 2 nets; got \(3, 2, 5\) and \(3, 2\)",
    ),
    "members of zero": (lambda: init_params(SIZES, members=0), ValueError, "must be 1 or more"),
    "members no number": (
        lambda: init_params(SIZES, members=2.0),
        TypeError,
        "members must be an integer, got 2.0",
    ),
    "ensemble of one": (
        lambda: ensemble_forward(one(0), X),
        ValueError,
        r"many nets.*those of one: stack_params",
    ),
    "no members": (
        lambda: forward([(np.ones((0, 5, 3)), np.ones((0, 5)))], X),
        ValueError,
        "params are those of 0 nets",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


# What they say together --------------------------------------------------------------------------

LINKS = {
    "poisson": np.exp,
    "binary_cross_entropy": lambda H: 1 / (1 + np.exp(-H)),
    "softmax_cross_entropy": lambda H: np.exp(H) / np.exp(H).sum(axis=-1, keepdims=True),
}


def test_the_links_are_those_of_the_losses_that_take_logits():
    assert {row.name for row in LOSSES.values() if row.link} == set(LINKS)


@pytest.mark.parametrize("own", [False, True], ids=["shared X", "own X"])
@pytest.mark.parametrize("loss", LOSSES)
def test_means_are_averaged_and_not_logits(loss, own, backend):
    nets = [one(seed) for seed in range(3)]
    data = [X + e for e in range(3)] if own else [X] * 3
    outputs = [forward(net, mine, activation="tanh") for net, mine in zip(nets, data, strict=True)]
    P = np.stack([LINKS.get(loss, lambda H: H)(H) for H in outputs])
    stacked = [Layer(*map(backend.array, layer)) for layer in stack_params(nets)]
    inputs = backend.array(np.stack(data) if own else X)
    mean, std = ensemble_forward(stacked, inputs, activation="tanh", loss=loss)
    assert_close(backend.numpy(mean), P.mean(axis=0))
    assert_close(backend.numpy(std), P.std(axis=0))
    net = Net(stacked, "tanh", loss)
    assert_array_equal(backend.numpy(ensemble_forward(net, inputs).mean), backend.numpy(mean))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_predictions_have_the_nets_dtype(dtype):
    net = init_params(SIZES, 0, dtype=dtype, members=3)
    mean, std = ensemble_forward(net, X.astype(dtype), loss="softmax_cross_entropy")
    assert mean.dtype == std.dtype == dtype
    assert_close(mean.sum(axis=1), np.ones(7), 1e-2)


def test_one_member_is_sure():
    net = init_params(SIZES, 0, members=1)
    mean, std = ensemble_forward(net, X)
    assert_array_equal(mean, forward(net, X)[0])
    assert not std.any()
