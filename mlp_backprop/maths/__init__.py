"""Other contractions of the same sweeps, for any array library: no file here imports one.

Internal: what is public can be imported from mlp_backprop itself.
"""

__all__: list[str] = []
