"""Metrics of generated answers: built-in ones, and functions of the user's. Loads no torch."""
