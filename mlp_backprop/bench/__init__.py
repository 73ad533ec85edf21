"""Benchmarks: problems, contenders, results, charts."""
