"""Cross-entropy and its gradient as one Triton kernel."""

import torch
import triton
import triton.language as tl

from finetune.engine.packed.gpu.element_access import store_rounded
from finetune.engine.packed.gpu.launch import launch

WIDTH = 8
"""Neighbouring logits of a lane. With a large vocabulary one thread has them all."""

MAX_LANES = 2048
"""Most lanes of a program."""

WARPS = 32
"""Of a program. With more programs on a multiprocessor, the logits would be out of its cache when
they are read again: 205 microseconds for 1,024 tokens of 128,256 logits on an H200, 216 with 8."""


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
        token [tokens], not set with a gradient; the gradient in the memory of the logits, or None.
    """
    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, device=logits.device)
    correct = torch.empty(tokens, dtype=torch.bool, device=logits.device)
    arguments = (logits, targets, losses, correct, vocabulary)
    lanes = min(MAX_LANES, triton.next_power_of_2(triton.cdiv(vocabulary, WIDTH)))
    constants = (with_gradient, lanes, WIDTH)
    launch(_cross_entropy_kernel, (tokens, 1, 1), arguments, constants, WARPS)
    gradient = logits if with_gradient else None
    return losses, correct, gradient


@triton.jit
def _load_logits(token_logits, columns, vocabulary):
    """Some of a token's logits, as float32; -inf beyond the vocabulary."""
    mask = columns < vocabulary
    logits = tl.load(token_logits + columns, mask=mask, other=-float("inf"))
    return logits.to(tl.float32)


@triton.jit
def _cross_entropy_kernel(
    logits, targets, losses, correct, vocabulary,
    WITH_GRADIENT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # Offsets may be too large for 32 bits.
    token = tl.program_id(0).to(tl.int64)
    token_logits = logits + token * vocabulary
    target = tl.load(targets + token)
    # Before the warps wait for each other: then the gradient may take the place of the logits.
    target_logit = tl.load(token_logits + target).to(tl.float32)
    cells = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # Online softmax (Milakov and Gimelshein, 2018): maximum and denominator in one pass. What was
    # summed under an earlier maximum shrinks to the new one. Each lane has its own, so that warps
    # wait for each other only once. Finite, as a lane may have no logit: the least float32.
    maxima = tl.full((LANES,), -3.4028234663852886e38, tl.float32)
    denominators = tl.zeros((LANES,), tl.float32)
    likeliest = tl.zeros((LANES,), tl.int32)
    for start in range(0, vocabulary, LANES * WIDTH):
        columns = start + cells
        values = _load_logits(token_logits, columns, vocabulary)
        larger = tl.maximum(tl.max(values, 1), maxima)
        if not WITH_GRADIENT:
            first = tl.min(tl.where(values == larger[:, None], columns, vocabulary), 1)
            likeliest = tl.where(larger > maxima, first, likeliest)
        terms = tl.sum(tl.exp(values - larger[:, None]), 1)
        denominators = denominators * tl.exp(maxima - larger) + terms
        maxima = larger
    maximum = tl.max(maxima, 0)
    denominator = tl.sum(denominators * tl.exp(maxima - maximum), 0)
    log_sum_exp = maximum + tl.log(denominator)
    tl.store(losses + token, log_sum_exp - target_logit)
    if not WITH_GRADIENT:
        prediction = tl.min(tl.where(maxima == maximum, likeliest, vocabulary), 0)
        tl.store(correct + token, prediction == target)
    else:
        # The second and last pass over the logits: the denominator has to be known first.
        for start in range(0, vocabulary, LANES * WIDTH):
            columns = start + cells
            values = _load_logits(token_logits, columns, vocabulary)
            is_target = tl.where(columns == target, 1.0, 0.0)
            gradient = tl.exp(values - log_sum_exp) - is_target
            store_rounded(token_logits, columns, gradient, columns < vocabulary)
