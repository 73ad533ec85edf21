"""What a caller may pass, and what stands around every call.

Internal: what is public can be imported from mlp_backprop itself.
"""

__all__: list[str] = []
