"""Whole passes made faster; choice.py is the one door to them."""
