"""Loads and stores of the Triton kernels, which compute in float32 whatever the tensors' dtype."""

import triton
import triton.language as tl


@triton.jit
def load_float32(tensor, offsets, mask):
    """Elements of a tensor as float32; 0 where the mask is False."""
    return tl.load(tensor + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rounded(
    tensor,
    offsets,
    values,
    mask,
):
    """Store float32 values, rounded once, to the dtype of the tensor."""
    tl.store(tensor + offsets, values.to(tensor.dtype.element_ty), mask=mask)
