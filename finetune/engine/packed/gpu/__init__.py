"""The base's decoder on a GPU, forward and backward by hand."""
