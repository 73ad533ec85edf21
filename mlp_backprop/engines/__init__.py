"""Engines: faster ways to run a whole pass than the derivation, with the same answers."""
