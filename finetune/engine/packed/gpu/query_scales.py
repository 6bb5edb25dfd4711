"""Queries that grow with their position (Llama 4, Ministral 3)."""

from collections.abc import Sequence
from typing import Any

import torch

from finetune.engine.packed.batch import Span


def query_scales(
    config: Any | None, spans: Sequence[Span], position_ids: torch.Tensor
) -> torch.Tensor | None:
    """Return the factor of each token's query; None: all are 1.

    Args:
        config: The text config of a base that scales its queries; None for other bases.
        spans: Those of the packed batch.
        position_ids: Position of each token in its row [tokens].

    Returns:
        1 + beta · log(1 + floor(position / original length)) [tokens, 1, 1].
    """
    if config is None:
        return None
    parameters = config.rope_parameters
    length: int = parameters["original_max_position_embeddings"]
    # Known without waiting for the GPU: most rows are shorter.
    longest = max(span.prefix_length + span.length for span in spans)
    if longest <= length:
        return None
    steps = torch.floor(position_ids / length)
    scales: torch.Tensor = 1 + parameters["llama_4_scaling_beta"] * torch.log1p(steps)
    return scales[:, None, None]
