"""Cross-entropy and its gradient as one Triton kernel."""

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import store_rounded
from finetune.engine.packed.gpu.launch import launch

MAX_BLOCK = 4096
"""Most logits of a token that a program holds in registers at once."""


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
    block = min(MAX_BLOCK, triton.next_power_of_2(vocabulary))
    launch(
        _cross_entropy_kernel,
        (tokens, 1, 1),
        arguments,
        (with_gradient, block),
        8,
    )
    gradient = logits if with_gradient else None
    return losses, correct, gradient


@triton.jit
def _load_logits(token_logits, column, vocabulary):
    """Some of a token's logits, as float32; -inf beyond the vocabulary."""
    mask = column < vocabulary
    return tl.load(token_logits + column, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, correct, vocabulary,
    WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Offsets may be too large for 32 bits.
    token = tl.program_id(0).to(tl.int64)
    token_logits = logits + token * vocabulary
    target = tl.load(targets + token)
    # Online softmax (Milakov and Gimelshein, 2018): maximum and denominator in one pass. What was
    # summed under an earlier maximum shrinks to the new one.
    maximum = -float("inf")
    likeliest = 0
    denominator = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = _load_logits(token_logits, column, vocabulary)
        block_maximum = tl.max(values, 0)
        block_likeliest = start + tl.argmax(values, 0)
        likeliest = tl.where(block_maximum > maximum, block_likeliest, likeliest)
        new_maximum = tl.maximum(block_maximum, maximum)
        rescaled = denominator * tl.exp(maximum - new_maximum)
        denominator = rescaled + tl.sum(tl.exp(values - new_maximum), 0)
        maximum = new_maximum
    log_sum_exp = maximum + tl.log(denominator)
    # Read before the gradient takes the place of the logits.
    target_logit = tl.load(token_logits + target).to(tl.float32)
    tl.store(losses + token, log_sum_exp - target_logit)
    tl.store(correct + token, likeliest == target)
    # The second and last pass over the logits: the denominator has to be known first.
    if WITH_GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            probabilities = tl.exp(
                _load_logits(token_logits, column, vocabulary) - log_sum_exp
            )
            gradient = probabilities - tl.where(column == target, 1.0, 0.0)
            store_rounded(
                token_logits,
                column,
                gradient,
                column < vocabulary,
            )
