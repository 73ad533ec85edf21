"""What derivatives are for: whole training runs, of one net or many.

Internal: what is public can be imported from mlp_backprop itself.
"""

__all__: list[str] = []
