"""The base's decoder on a GPU, by hand: what a GPU computes faster than through the base's own modules."""
