"""Trackers: Weights & Biases, TensorBoard."""
