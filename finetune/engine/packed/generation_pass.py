"""The pass that generates: the answers to prompts of several slots, by the base's own modules."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from finetune.config.sections.model import QuantizationSettings
from finetune.engine.decoding import generate_tokens
from finetune.engine.encoded_prompts import Answers
from finetune.engine.packed.autograd_backend import AutogradBackend
from finetune.engine.packed.requests import Generate
from finetune.model.memory import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate_answers(
    base: "PreTrainedModel",
    autograd: AutogradBackend,
    requests: Sequence[Generate],
    quantization: QuantizationSettings,
) -> list[Answers]:
    """Answer the prompts of several slots together, each token for all of them at once.

    Args:
        base: The base that the slots are on.
        autograd: Applies their adapters to the base's own modules.
        requests: One for each slot.
        quantization: As the base was loaded.

    Returns:
        The answers to each request's prompts.
    """
    slots = [request.slot for request in requests]
    for slot in slots:
        slot.refresh_weights()

    def adapt(runs: Sequence[int]) -> AbstractContextManager["PreTrainedModel"]:
        return autograd.adapted_rows([slots[run] for run in runs])

    prompts = [request.prompts for request in requests]
    answers = generate_tokens(base, prompts, quantization, adapt)
    # Keys and values are large, and of other sizes than what training needs.
    free_memory()
    return answers
