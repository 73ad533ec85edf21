"""Parameters of many nets as one: every array with one more axis in front, and back."""

from collections.abc import Sequence
from typing import Any, overload

from mlp_backprop.edge.arguments import common_dtype, common_home, read_params, type_name
from mlp_backprop.edge.members import count, first
from mlp_backprop.edge.rules import activation_rows, check_layer_shapes
from mlp_backprop.types import Layer, Layers, Namespace, Net, Pairs, flat


@overload  # a Net is a tuple, too
def stack_params(nets: Sequence[Net]) -> Net: ...  # type: ignore[overload-overlap]
@overload
def stack_params(nets: Sequence[Pairs]) -> list[Layer]: ...
def stack_params(nets: Any) -> Any:
    """Put the parameters of several nets into one list, for many nets in one call.

    Parameters
    ----------
    nets : sequence of E params, or of E Nets
        Nets of the same widths, dtype and library; as Nets, of the same activation and loss.

    Returns
    -------
    list of Layer, or Net
        W (E, d_l, d_{l-1}) and b (E, d_l) per layer: copies. Of Nets, a Net.

    Raises
    ------
    TypeError, ValueError
        No sequence of nets, or an empty one; a net of other widths, dtype, library or names than
        the first.

    Examples
    --------
    >>> from mlp_backprop import init_params, stack_params
    >>> stacked = stack_params([init_params([2, 10, 1], rng=seed) for seed in range(5)])
    >>> [(W.shape, b.shape) for W, b in stacked]
    [((5, 10, 2), (5, 10)), ((5, 1, 10), (5, 1))]
    """
    if isinstance(nets, Net | str) or not isinstance(nets, Sequence):
        raise TypeError(f"nets must be a sequence of nets, got {type_name(nets)}")
    if len(nets) == 0:
        raise ValueError("nets is empty: pass one or more")
    layers = [read_params(net, f"nets[{e}]") for e, net in enumerate(nets)]
    sizes = [check_layer_shapes(first(net, count(net, many=False))) for net in layers]
    for e in range(len(nets)):
        mine, theirs = (_described(nets[k], sizes[k]) for k in (0, e))
        if mine != theirs:
            raise ValueError(
                f"nets[0] is {' '.join(mine)}, nets[{e}] {' '.join(theirs)}: all must be alike"
            )
    every = [layer for net in layers for layer in net]
    home = common_home(flat(every), None)
    dtype = common_dtype(every, home)
    return _like(nets[0], stacked(home.xp, [home.place_params(net, dtype) for net in layers]))


def _described(net: Net | Pairs, sizes: tuple[int, ...]) -> list[str]:
    """Widths and names, to be compared."""
    names = []
    if isinstance(net, Net):
        names = [row.name for row in activation_rows(net.activation, len(sizes) - 1)] + [net.loss]
    return ["a Net" if names else "a list", "-".join(map(str, sizes)), *names]


@overload
def unstack_params(params: Net) -> list[Net]: ...  # type: ignore[overload-overlap]
@overload
def unstack_params(params: Pairs) -> list[list[Layer]]: ...
def unstack_params(params: Any) -> Any:
    """Take the parameters of many nets apart: the inverse of `stack_params`.

    Parameters
    ----------
    params : sequence of (W, b), or Net
        W (E, d_l, d_{l-1}) and b (E, d_l) per layer: parameters, or their gradients.

    Returns
    -------
    list of E lists of Layer, or of E Nets
        W (d_l, d_{l-1}) and b (d_l,) of every net: views, in libraries that have views.

    Raises
    ------
    TypeError, ValueError
        Parameters of one net; layers of different numbers of nets.

    Examples
    --------
    >>> from mlp_backprop import init_params, unstack_params
    >>> nets = unstack_params(init_params([2, 10, 1], rng=0, members=5))
    >>> len(nets), nets[0][0].W.shape
    (5, (10, 2))
    """
    layers = read_params(params)
    E = count(layers, many=True)
    if E is None:
        W, b = layers[0]
        raise ValueError(
            "params must be those of many nets, W of shape (E, d_l, d_{l-1}) and b (E, d_l); "
            f"layer 1 has {tuple(W.array.shape)} and {tuple(b.array.shape)}"
        )
    nets = [[Layer(W.array[e, ...], b.array[e, ...]) for W, b in layers] for e in range(E)]
    return [_like(params, net) for net in nets]


def stacked(xp: Namespace, nets: Sequence[Layers]) -> Layers:
    """Every array of all nets, one behind the other along a new axis in front."""
    together = zip(*nets, strict=True)
    return [
        Layer(xp.stack([W for W, _ in each]), xp.stack([b for _, b in each])) for each in together
    ]


def _like(params: Any, layers: Layers) -> Any:
    """A Net of the same names, where params is one."""
    return params._replace(params=layers) if isinstance(params, Net) else layers
