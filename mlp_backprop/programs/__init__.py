"""The command line: what it computes, and how that is shown.

Internal: what is public can be imported from mlp_backprop itself.
"""

__all__: list[str] = []
