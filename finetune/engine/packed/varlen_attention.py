"""Attention of a packed batch by PyTorch's variable-length attention: one call for all spans.

It works on a recent GPU in 16 bits.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from finetune.engine.packed.batch import Span
from finetune.model.device import to_device

MAX_HEAD_DIM = 256
"""Widest heads that variable-length attention computes."""


@dataclass(frozen=True)
class VarlenBounds:
    """Boundaries of the spans, as variable-length attention takes them."""

    query_offsets: torch.Tensor
    """[spans + 1], int32."""
    key_offsets: torch.Tensor
    """[spans + 1], int32."""
    max_queries: int
    max_keys: int
    key_indices: torch.Tensor | None
    """The token of each key, where prefixes are shared and so repeated; None: all in order."""


def varlen_bounds(spans: list[Span], device: torch.device) -> VarlenBounds:
    """Compute the boundaries of a batch's spans.

    Args:
        spans: Of the packed batch, in order.
        device: Where the tensors go.
    """
    lengths = [span.length for span in spans]
    prefix_lengths = [span.prefix_length for span in spans]
    # With a 0 in front, their sums are where each span begins.
    query_counts = torch.tensor([0, *lengths])
    key_counts = query_counts + torch.tensor([0, *prefix_lengths])
    key_indices = None
    # A span's keys have to be consecutive, so those of a shared prefix are repeated.
    if any(prefix_lengths):
        indices = torch.cat([span.key_indices() for span in spans])
        key_indices = to_device(indices, device)
    # The largest counts are read on the host: reading them from a GPU would wait for its work.
    return VarlenBounds(
        query_offsets=to_device(query_counts.cumsum(0).int(), device),
        key_offsets=to_device(key_counts.cumsum(0).int(), device),
        max_queries=int(query_counts.max()),
        max_keys=int(key_counts.max()),
        key_indices=key_indices,
    )


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: VarlenBounds,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute the attention of every span. See `PackedAttention.attend`.

    Args:
        query: [tokens, heads, head_dim].
        key: [tokens, key/value heads, head_dim].
        value: As the key.
        bounds: From `varlen_bounds`.
        scale: Factor of the scores; None: 1 / √head_dim.
        window: Tokens that a query sees, itself included; None: all before it.

    Returns:
        [tokens, heads, head_dim].
    """
    if bounds.key_indices is not None:
        key = key[bounds.key_indices]
        value = value[bounds.key_indices]
    # PyTorch counts the tokens before and after the query; -1 is no limit.
    tokens_before = -1 if window is None else window - 1
    output = varlen_attn(
        query,
        key,
        value,
        bounds.query_offsets,
        bounds.key_offsets,
        bounds.max_queries,
        bounds.max_keys,
        scale=scale,
        window_size=(tokens_before, 0),
        **_grouped_query_argument(),
    )
    # A pair only if auxiliary outputs are requested.
    assert isinstance(output, torch.Tensor)
    return output


@functools.cache
def _grouped_query_argument() -> dict[str, Any]:
    """From torch 2.13 on, variable-length attention must be asked for grouped queries."""
    parameters = inspect.signature(varlen_attn).parameters
    return {"enable_gqa": True} if "enable_gqa" in parameters else {}
