"""Measurements: every figure that the README or a docstring claims is printed by a command here."""
