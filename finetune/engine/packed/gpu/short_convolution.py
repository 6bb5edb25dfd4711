"""A causal convolution over a few tokens of a row, and SiLU, as one Triton kernel each way."""

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import load_float32, store_rounded
from finetune.engine.packed.gpu.launch import launch

TOKENS = 16
"""Tokens of one program."""
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
    _launch(_convolution_kernel, (x, weight, position_ids, output), x, weight)
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
    _launch(_convolution_backward_kernel, tensors, x, weight)
    return grad_x


def _launch(
    kernel: object,
    tensors: tuple[torch.Tensor, ...],
    x: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    tokens, channels = x.shape
    grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(channels, CHANNELS), 1)
    constants = (weight.shape[1], TOKENS, CHANNELS)
    launch(kernel, grid, (*tensors, tokens, channels), constants)


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
def _convolution_backward_kernel(
    grad_output, x, weight, position_ids, grad_x, token_count, channels,
    TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tokens, columns, token_mask, column_mask = _block(
        token_count, channels, TOKENS, CHANNELS
    )
    result = tl.zeros((TOKENS, CHANNELS), tl.float32)
    # A token is read by itself and by the next ones of its row.
    for tap in tl.static_range(TAPS):
        readers = tokens + tap
        reader_mask = readers < token_count
        positions = tl.load(position_ids + readers, mask=reader_mask, other=0)
        values = _convolve(
            x, weight, readers, columns, positions, reader_mask, column_mask, channels, TAPS
        )  # fmt: skip
        sigmoid = tl.sigmoid(values)
        slope = sigmoid * (1 + values * (1 - sigmoid))
        is_in_row = reader_mask & (positions >= tap)
        offsets = readers[:, None] * channels + columns[None, :]
        mask = is_in_row[:, None] & column_mask[None, :]
        factor = load_float32(weight, columns * TAPS + (TAPS - 1 - tap), column_mask)
        grads = load_float32(grad_output, offsets, mask)
        result += grads * slope * factor[None, :]
    store_rounded(
        grad_x,
        tokens[:, None] * channels + columns[None, :],
        result,
        token_mask[:, None] & column_mask[None, :],
    )
