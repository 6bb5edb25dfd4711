"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings of training rows.

The noise of a token is alpha / sqrt(tokens of its row x hidden size) times a number between -1 and
1. It depends on the run's seed and batch alone, not on other slots.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from finetune.data.lengths import computed_length
from finetune.engine.packed.batch import PackedBatch
from finetune.engine.packed.requests import ForwardBackward
from finetune.model.device import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOISE_NUMBER = 4_092
"""Seeds the noise where an adapter's number seeds its dropout masks (`SlotTokens.dropout_mask`)."""


@contextlib.contextmanager
def embedding_noise(
    base: "PreTrainedModel", requests: Sequence[ForwardBackward], batch: PackedBatch
) -> Iterator[None]:
    """Add the noise of the requests that have some, while the context lasts.

    Args:
        base: Its input embedding is called once within the context, with all tokens of the batch.
        requests: Those of the batch; the rows of one with noise share no prefix.
        batch: The tokens.
    """
    if all(request.noise_alpha is None for request in requests):
        yield
        return

    def add_noise(
        embedding: torch.nn.Module, inputs: Any, output: torch.Tensor
    ) -> torch.Tensor:
        noisy = output.clone()
        spans = zip(requests, batch.batch_spans, strict=True)
        for request, (start, stop) in spans:
            if request.noise_alpha is not None:
                noisy[0, start:stop] += _noise(request, output[0, start:stop])
        return noisy

    handle = base.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def _noise(request: ForwardBackward, embeddings: torch.Tensor) -> torch.Tensor:
    """Draw the noise of a request's tokens [tokens, hidden_size]."""
    assert request.noise_alpha is not None
    device = embeddings.device
    generator = torch.Generator(device)
    # As the seeds of dropout masks.
    seed = (request.slot.seed * 1_000_003 + request.dropout_step) * 4_093 + NOISE_NUMBER
    generator.manual_seed(seed % 2**63)
    noise = torch.empty(embeddings.shape, dtype=torch.float32, device=device)
    noise.uniform_(-1, 1, generator=generator)
    hidden_size = embeddings.shape[-1]
    scales = []
    for row in request.rows:
        scale = request.noise_alpha / (len(row["input_ids"]) * hidden_size) ** 0.5
        scales += [scale] * computed_length(row)
    column = to_device(torch.tensor(scales), device)[:, None]
    return (noise * column).to(embeddings.dtype)
