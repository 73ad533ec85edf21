"""Benchmarks: problems, contenders, results, charts.

Internal: what is public can be imported from mlp_backprop itself.
"""

__all__: list[str] = []
