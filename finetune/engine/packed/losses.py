"""Losses of answer tokens and their gradient, from the last hidden states."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from finetune.engine.packed.backend import Backend
from finetune.model.architectures import LogitTransform
from finetune.model.quantization import dense_weight


@dataclass(frozen=True)
class TokenLosses:
    """Losses of the answer tokens of a pass."""

    losses: torch.Tensor
    """Negative log-likelihoods in nats, float32 [answer tokens]."""
    correct: torch.Tensor
    """Whether the answer token is the most likely one [answer tokens]; not set with a gradient."""
    gradient: torch.Tensor | None
    """Gradient of the weighted losses with respect to the hidden states
    [answer tokens, hidden_size]; None without weights."""


def token_losses(
    backend: Backend,
    head: torch.nn.Module,
    transform: LogitTransform,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    loss_weights: torch.Tensor | None,
) -> TokenLosses:
    """Compute the losses of answer tokens, and with weights their gradient.

    The logits are computed in chunks, because they are by far the largest tensors.

    Args:
        backend: Computes the cross-entropy.
        head: The base's output embedding.
        transform: What the base does to the head's outputs.
        hidden: Hidden states that predict the answer tokens [answer tokens, hidden_size].
        targets: The answer tokens [answer tokens].
        loss_weights: Weight of each token's loss [answer tokens]; None: no gradient.
    """
    # Before the loop: a quantised head is dequantised once for all chunks.
    weight = dense_weight(head)
    bias = getattr(head, "bias", None)
    losses = []
    correct = []
    gradients = []
    size = chunk_size(len(hidden), backend.logits_chunk)
    for start in range(0, len(hidden), size):
        chunk = slice(start, start + size)
        with_gradient = loss_weights is not None
        capped = None
        if with_gradient and transform.cap is not None:
            capped = transform.apply(linear(hidden[chunk], weight, bias))
        # No name is bound to the logits here, so that `score` can free or overwrite them.
        chunk_losses, chunk_correct, grad_logits = backend.score(
            transform.apply(linear(hidden[chunk], weight, bias))
            if capped is None
            else capped.clone(),
            targets[chunk],
            with_gradient,
        )
        losses.append(chunk_losses)
        correct.append(chunk_correct)
        if loss_weights is not None:
            assert grad_logits is not None
            grad_logits = transform.backward(grad_logits, capped)
            grad_hidden = grad_logits.to(hidden.dtype) @ weight
            # The weights are float32, so weighting adds no rounding of its own to 16 bits.
            weighted = grad_hidden * loss_weights[chunk, None]
            gradients.append(weighted.to(hidden.dtype))
        # Or those of two chunks would be in memory.
        del grad_logits, capped
    gradient = torch.cat(gradients) if gradients else None
    return TokenLosses(torch.cat(losses), torch.cat(correct), gradient)


def chunk_size(tokens: int, limit: int) -> int:
    """Return the tokens of a chunk: about equal for all chunks, and a multiple of 16."""
    # As few chunks as the limit allows; equal ones leave no small last product.
    chunks = math.ceil(tokens / limit)
    return 16 * math.ceil(tokens / chunks / 16)
