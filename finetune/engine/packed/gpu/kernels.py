"""Triton kernels for RMS norm, SwiGLU, rotary embedding and cross-entropy.

Each is one launch for what PyTorch does in several, each of which would read and write all of its
operands in memory (as in Liger Kernel, Hsu et al., 2024). Values are computed in float32 and
rounded once, to the dtype of the tensor that they are stored in.
"""

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.launch import launch

BLOCK = 1024
"""Elements of one program where elements are independent."""

ROTARY_HEADS = 16
"""Heads of one program of the rotary embedding."""


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, copy_input: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Root mean square normalisation (Zhang and Sennrich, 2019) of each row.

    Args:
        x: [rows, columns].
        weight: [columns].
        epsilon: Added to the mean square.
        copy_input: Copy x on the way, for a residual that is added to in place.

    Returns:
        The normalised rows [rows, columns]; 1 / root mean square of each row, float32 [rows]; the
        copy of x or None.
    """
    rows, columns = x.shape
    y = torch.empty_like(x)
    inverse_rms = torch.empty(rows, device=x.device)
    residual = torch.empty_like(x) if copy_input else None
    residual_argument = y if residual is None else residual
    arguments = (x, weight, y, inverse_rms, residual_argument, columns, epsilon)
    block, warps = _row_block(columns)
    launch(_rms_norm_kernel, (rows, 1, 1), arguments, (copy_input, block), warps)
    return y, inverse_rms, residual


def rms_norm_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse_rms: torch.Tensor,
    grad_residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of the input of `rms_norm`. The frozen weight gets none.

    Args:
        grad_output: [rows, columns].
        x: The input of the forward pass [rows, columns].
        weight: [columns].
        inverse_rms: From the forward pass [rows].
        grad_residual: Added to the result [rows, columns].

    Returns:
        [rows, columns].
    """
    rows, columns = x.shape
    grad_x = torch.empty_like(x)
    residual_argument = x if grad_residual is None else grad_residual
    arguments = (grad_output, x, weight, inverse_rms, residual_argument, grad_x, columns)
    block, warps = _row_block(columns)
    constants = (grad_residual is not None, block)
    launch(_rms_norm_backward_kernel, (rows, 1, 1), arguments, constants, warps)
    return grad_x


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up (SwiGLU: Shazeer, 2020), elementwise."""
    output = torch.empty_like(gate)
    count = gate.numel()
    grid = (triton.cdiv(count, BLOCK), 1, 1)
    launch(_swiglu_kernel, grid, (gate, up, output, count), (BLOCK,))
    return output


def swiglu_backward(
    grad_output: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, recompute_output: bool
) -> torch.Tensor | None:
    """Gradients of the inputs of `swiglu`, in place.

    Args:
        grad_output: Overwritten by the output where that is recomputed.
        gate: Overwritten by its gradient.
        up: Overwritten by its gradient.
        recompute_output: Compute the output again, so that it need not be kept in memory.

    Returns:
        The output, in the memory of `grad_output`, or None.
    """
    count = gate.numel()
    grid = (triton.cdiv(count, BLOCK), 1, 1)
    arguments = (grad_output, gate, up, count)
    launch(_swiglu_backward_kernel, grid, arguments, (recompute_output, BLOCK))
    return grad_output if recompute_output else None


def apply_rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float
) -> torch.Tensor:
    """Rotary position embedding (Su et al., 2021).

    Args:
        x: [tokens, heads, head_dim].
        cos: [tokens, head_dim].
        sin: [tokens, head_dim].
        sign: 1.0 rotates; -1.0 rotates back, which is also the gradient.

    Returns:
        [tokens, heads, head_dim].
    """
    tokens, heads, head_dim = x.shape
    output = torch.empty_like(x)
    block = triton.next_power_of_2(head_dim // 2)
    arguments = (x, cos, sin, output, heads, head_dim, sign)
    grid = (tokens, triton.cdiv(heads, ROTARY_HEADS), 1)
    launch(_rotary_kernel, grid, arguments, (ROTARY_HEADS, block))
    return output


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of logits; with a gradient, this overwrites the logits.

    Args:
        logits: [tokens, vocabulary].
        targets: [tokens].
        with_gradient: Compute the gradient too.

    Returns:
        Negative log-likelihoods in nats, float32 [tokens]; whether each target is the most likely
        token [tokens]; the gradient in the memory of the logits, or None.
    """
    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, device=logits.device)
    correct = torch.empty(tokens, dtype=torch.bool, device=logits.device)
    arguments = (logits, targets, losses, correct, vocabulary)
    block = min(4096, triton.next_power_of_2(vocabulary))
    launch(_cross_entropy_kernel, (tokens, 1, 1), arguments, (with_gradient, block), 8)
    return losses, correct, logits if with_gradient else None


def _row_block(columns: int) -> tuple[int, int]:
    """Elements and warps of a program that takes a whole row."""
    block = triton.next_power_of_2(columns)
    return block, min(max(block // 512, 1), 16)


@triton.jit
def _rms_norm_kernel(
    x, weight, y, inverse_rms, residual, columns, epsilon,
    COPY_INPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    values = tl.load(x + row * columns + column, mask=mask, other=0.0)
    if COPY_INPUT:
        tl.store(residual + row * columns + column, values, mask=mask)
    x_float32 = values.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x_float32 * x_float32, 0) / columns + epsilon)
    normalized = (x_float32 * scale).to(y.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    output = (normalized * weights).to(y.dtype.element_ty)
    tl.store(y + row * columns + column, output, mask=mask)
    tl.store(inverse_rms + row, scale)


@triton.jit
def _rms_norm_backward_kernel(
    grad_output, x, weight, inverse_rms, grad_residual, grad_x, columns,
    ADD_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    scale = tl.load(inverse_rms + row)
    normalized = tl.load(x + row * columns + column, mask=mask, other=0.0).to(tl.float32) * scale
    grad = tl.load(grad_output + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    grad *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    projection = tl.sum(grad * normalized, 0) / columns
    result = (grad - normalized * projection) * scale
    if ADD_RESIDUAL:
        residual = tl.load(grad_residual + row * columns + column, mask=mask, other=0.0)
        result += residual.to(tl.float32)
    tl.store(grad_x + row * columns + column, result.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_kernel(gate, up, output, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    g = tl.load(gate + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + offsets, mask=mask, other=0.0).to(tl.float32)
    result = g * tl.sigmoid(g) * u
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    grad_output, gate, up, count, RECOMPUTE_OUTPUT: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    grad = tl.load(grad_output + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + offsets, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + offsets, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    grad_gate = grad * u * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(gate + offsets, grad_gate.to(gate.dtype.element_ty), mask=mask)
    tl.store(up + offsets, (grad * g * sigmoid).to(up.dtype.element_ty), mask=mask)
    if RECOMPUTE_OUTPUT:
        output = (g * sigmoid * u).to(grad_output.dtype.element_ty)
        tl.store(grad_output + offsets, output, mask=mask)


@triton.jit
def _rotary_kernel(
    x, cos, sin, output, heads, head_dim, sign, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = head_dim // 2
    column = tl.arange(0, BLOCK)
    column_mask = column < half
    c = tl.load(cos + token * head_dim + column, mask=column_mask, other=0.0)
    s = tl.load(sin + token * head_dim + column, mask=column_mask, other=0.0)
    c = c.to(tl.float32)[None, :]
    s = s.to(tl.float32)[None, :] * sign
    offsets = token * heads * head_dim + head[:, None] * head_dim + column[None, :]
    mask = (head < heads)[:, None] & column_mask[None, :]
    first = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + offsets + half, mask=mask, other=0.0).to(tl.float32)
    dtype = output.dtype.element_ty
    tl.store(output + offsets, (first * c - second * s).to(dtype), mask=mask)
    tl.store(output + offsets + half, (second * c + first * s).to(dtype), mask=mask)


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, correct, vocabulary,
    WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    token_logits = logits + token * vocabulary
    target = tl.load(targets + token)
    # Online softmax (Milakov and Gimelshein, 2018): maximum and denominator in one pass.
    maximum, likeliest, denominator = -float("inf"), 0, 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < vocabulary
        values = tl.load(token_logits + column, mask=mask, other=-float("inf")).to(tl.float32)
        block_maximum = tl.max(values, 0)
        block_likeliest = start + tl.argmax(values, 0)
        likeliest = tl.where(block_maximum > maximum, block_likeliest, likeliest)
        new_maximum = tl.maximum(block_maximum, maximum)
        rescaled = denominator * tl.exp(maximum - new_maximum)
        denominator = rescaled + tl.sum(tl.exp(values - new_maximum), 0)
        maximum = new_maximum
    log_sum_exp = maximum + tl.log(denominator)
    tl.store(losses + token, log_sum_exp - tl.load(token_logits + target).to(tl.float32))
    tl.store(correct + token, likeliest == target)
    if WITH_GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < vocabulary
            values = tl.load(token_logits + column, mask=mask, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(values - log_sum_exp) - tl.where(column == target, 1.0, 0.0)
            tl.store(token_logits + column, gradient.to(logits.dtype.element_ty), mask=mask)
