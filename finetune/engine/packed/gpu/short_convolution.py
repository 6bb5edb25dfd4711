"""A causal convolution over a few tokens of a row, and SiLU, as one Triton kernel each way."""

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.launch import launch

TOKENS = 16
"""Tokens of one program of the forward pass."""
GRAD_TOKENS = 32
"""Tokens of one program of the backward pass, which reads a few more."""
CHANNELS = 128
"""Channels of one program."""


def short_convolution(
    x: torch.Tensor, weight: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """silu(convolution of x), each channel by itself.

    Args:
        x: [tokens, channels], contiguous.
        weight: [channels, taps]; the last tap is that of the token itself.
        position_ids: Position of each token in its row: no token sees another row [tokens].

    Returns:
        [tokens, channels].
    """
    output = torch.empty_like(x)
    tensors = (x, weight, position_ids, output)
    _launch(_convolution_kernel, tensors, x, weight, TOKENS, warps=4)
    return output


def short_convolution_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the input of `short_convolution`. The frozen weight gets none.

    Args:
        grad_output: [tokens, channels].
        x: As in the forward pass.
        weight: As in the forward pass.
        position_ids: As in the forward pass.

    Returns:
        [tokens, channels].
    """
    grad_x = torch.empty_like(x)
    tensors = (grad_output, x, weight, position_ids, grad_x)
    # One warp, as the program has one token at a time.
    _launch(_convolution_backward_kernel, tensors, x, weight, GRAD_TOKENS, warps=1)
    return grad_x


def _launch(
    kernel: object,
    tensors: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    weight: torch.Tensor,
    tokens_at_once: int,
    warps: int,
) -> None:
    tokens, channels = x.shape
    grid = (triton.cdiv(tokens, tokens_at_once), triton.cdiv(channels, CHANNELS), 1)
    constants = (weight.shape[1], tokens_at_once, CHANNELS)
    launch(kernel, grid, (*tensors, tokens, channels), constants, warps)


@triton.jit
def _block(token_count, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's tokens and channels, and which of them exist."""
    # Offsets may be too large for 32 bits.
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return tokens, columns, tokens < token_count, columns < channels


@triton.jit
def _convolve(
    x, weight, tokens, columns, positions, token_mask, column_mask, channels,
    TAPS: tl.constexpr,
):  # fmt: skip
    """The convolution at some tokens, before SiLU."""
    result = tl.zeros((tokens.shape[0], columns.shape[0]), tl.float32)
    for tap in tl.static_range(TAPS):
        is_in_row = token_mask & (positions >= tap)
        offsets = (tokens - tap)[:, None] * channels + columns[None, :]
        mask = is_in_row[:, None] & column_mask[None, :]
        factor = load_float32(weight, columns * TAPS + (TAPS - 1 - tap), column_mask)
        result += load_float32(x, offsets, mask) * factor[None, :]
    return result


@triton.jit
def _convolution_kernel(
    x, weight, position_ids, output, token_count, channels,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tokens, columns, token_mask, column_mask = _block(
        token_count, channels, TOKENS, CHANNELS
    )
    positions = tl.load(position_ids + tokens, mask=token_mask, other=0)
    values = _convolve(
        x, weight, tokens, columns, positions, token_mask, column_mask, channels, TAPS
    )
    store_rounded(
        output,
        tokens[:, None] * channels + columns[None, :],
        values * tl.sigmoid(values),
        token_mask[:, None] & column_mask[None, :],
    )


@triton.jit
def _load_token(tensor, token, columns, mask, channels):
    """Some channels of a token, float32; 0 where the mask is False."""
    # Offsets may be too large for 32 bits.
    return load_float32(tensor + tl.cast(token, tl.int64) * channels, columns, mask)


@triton.jit
def _convolution_backward_kernel(
    grad_output, x, weight, position_ids, grad_x, token_count, channels,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Goes over the tokens that read this program's tokens, so that each is loaded once."""
    first = tl.program_id(0) * TOKENS
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = columns < channels
    # Of a token's own values, and of those of the tokens before it, the nearest first.
    factors: tl.tuple = ()
    before: tl.tuple = ()
    # Gradients of those tokens, as far as they have been read.
    partial: tl.tuple = ()
    for tap in tl.static_range(TAPS):
        factors += (load_float32(weight, columns * TAPS + (TAPS - 1 - tap), exists),)
    for tap in tl.static_range(1, TAPS):
        mask = exists & (first >= tap)
        before += (_load_token(x, first - tap, columns, mask, channels),)
        partial += (tl.zeros((CHANNELS,), tl.float32),)
    for token in range(first, first + TOKENS + TAPS - 1):
        is_token = token < token_count
        # A row's first tokens read fewer than the others.
        position = tl.load(position_ids + token, mask=is_token, other=0)
        values = _load_token(x, token, columns, exists & is_token, channels)
        read: tl.tuple = (values,)
        read += before
        grads = _load_token(grad_output, token, columns, exists & is_token, channels)
        sums = values * factors[0]
        for tap in tl.static_range(1, TAPS):
            sums += tl.where(position >= tap, read[tap], 0.0) * factors[tap]
        sigmoid = tl.sigmoid(sums)
        grads *= sigmoid * (1 + sums * (1 - sigmoid))
        gradients: tl.tuple = (grads * factors[0],)
        for tap in tl.static_range(1, TAPS):
            its_grads = tl.where(position >= tap, grads, 0.0)
            gradients += (partial[tap - 1] + its_grads * factors[tap],)
        # No later token reads this one.
        done = token - (TAPS - 1)
        store_rounded(
            grad_x + tl.cast(done, tl.int64) * channels,
            columns,
            gradients[TAPS - 1],
            exists & (done >= first) & (done < token_count),
        )
        before = read[: TAPS - 1]
        partial = gradients[: TAPS - 1]
