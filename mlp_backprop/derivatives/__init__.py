"""The public functions on derivatives: a docstring, checks, the choice of a way, the call.

Internal: what is public can be imported from mlp_backprop itself.
"""

__all__: list[str] = []
