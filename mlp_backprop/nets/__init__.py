"""Nets as data: initial values, parameters as one vector."""
