"""The base's decoder on a GPU: forward and backward with hand-written Triton kernels."""
