"""Greedy text generation from prompts.

Loads no torch when it is imported, because a command and `finetune.run.run` import it at their top.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.config.sections.model import QuantizationSettings
from finetune.data.encoding import Encoder
from finetune.data.types import Prompt
from finetune.model.architectures import text_config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)


def generate_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Prompt],
    quantization: QuantizationSettings,
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    variables: Mapping[str, Any] | None = None,
) -> list[str]:
    """Generate an answer to each prompt; each token is the most likely one.

    A prompt is a user's message if the tokenizer has a chat template, else text to continue. The
    model's mode is left as it was.

    Args:
        model: A base, or a base with an adapter.
        tokenizer: The base's tokenizer.
        prompts: The prompts, generated in one batch as far as the model's positions allow it.
        quantization: As the base was loaded.
        max_new_tokens: Limit on an answer's tokens; None: `max_length` alone is the limit.
        max_length: Limit on the tokens of a prompt and its answer together; None:
            `max_new_tokens` alone is the limit.
        variables: Variables of the chat template (`model.template_kwargs`).

    Returns:
        The answers, in the order of the prompts; empty where a limit leaves no token for one, which
        a warning says.
    """
    from finetune.engine.evaluation import evaluation_mode
    from finetune.model.quantization import autocast

    encoder = Encoder(tokenizer, variables)
    questions = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    prompt_ids = [encoder.encode_prompt(question) for question in questions]
    lengths = [len(ids) for ids in prompt_ids]
    config = text_config_of(model.config)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    limits = [_answer_limit(length, max_new_tokens, max_length, positions) for length in lengths]
    answers = [""] * len(prompts)
    with evaluation_mode(model), autocast(quantization):
        for batch in _batches(lengths, limits, positions):
            batch_ids = [prompt_ids[row] for row in batch]
            batch_limits = [limits[row] for row in batch]
            texts = _generate_batch(model, tokenizer, encoder.ends, batch_ids, batch_limits)
            for row, text in zip(batch, texts, strict=True):
                answers[row] = text
    return answers


def _answer_limit(
    prompt_length: int,
    max_new_tokens: int | None,
    max_length: int | None,
    positions: int | None,
) -> int:
    """Return how many tokens an answer may have; log a warning where the prompt is too long.

    Args:
        prompt_length: Tokens of the prompt.
        max_new_tokens: See `generate_answers`.
        max_length: See `generate_answers`.
        positions: Number of positions of the model; None: unlimited.
    """
    limits = []
    if max_new_tokens is not None:
        limits.append(max_new_tokens)
    if max_length is not None:
        limits.append(max_length - prompt_length)
    limit = min(limits)
    if positions is not None and positions - prompt_length < limit:
        remaining = max(0, positions - prompt_length)
        log.warning(
            "a prompt of %d tokens leaves %d for its answer: the model has %d positions",
            prompt_length,
            remaining,
            positions,
        )
        return remaining
    if limit < 1:
        log.warning(
            "a prompt of %d tokens gets no answer: prompt and answer together have %d",
            prompt_length,
            max_length,
        )
    return max(0, limit)


def _batches(
    lengths: Sequence[int], limits: Sequence[int], positions: int | None
) -> list[list[int]]:
    """Return the numbers of the prompts of each batch: all in one, as far as positions allow it.

    A batch is generated until its longest answer ends. A prompt that would exceed the model's
    positions by then gets a batch to itself. Prompts with a limit of 0 are left out.
    """
    rows = [row for row, limit in enumerate(limits) if limit > 0]
    longest_answer = max((limits[row] for row in rows), default=0)
    joint_batch = []
    single_batches = []
    for row in rows:
        if positions is not None and lengths[row] + longest_answer > positions:
            single_batches.append([row])
        else:
            joint_batch.append(row)
    return [joint_batch, *single_batches] if joint_batch else single_batches


def _generate_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    ends: list[int],
    prompt_ids: list[list[int]],
    limits: list[int],
) -> list[str]:
    """Generate the answers of one batch, each cut to its limit of tokens."""
    import torch

    # Padded on the left, because the answer continues at each prompt's last token.
    longest = max(len(ids) for ids in prompt_ids)
    padding = [longest - len(ids) for ids in prompt_ids]
    padded = []
    mask = []
    for ids, missing in zip(prompt_ids, padding, strict=True):
        padded.append([tokenizer.pad_token_id] * missing + ids)
        mask.append([0] * missing + [1] * len(ids))
    device = next(model.parameters()).device
    sequences = model.generate(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=max(limits),
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_end_tokens(model, ends),
    )
    answers = []
    for sequence, limit in zip(sequences, limits, strict=True):
        answer_ids = sequence[longest : longest + limit]
        answers.append(str(tokenizer.decode(answer_ids, skip_special_tokens=True)).strip())
    return answers


def _end_tokens(model: "PreTrainedModel", ends: list[int]) -> list[int]:
    """Return the ids that end an answer: those of the rows and of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens = {*ends, *(configured if isinstance(configured, list) else [configured])}
    return sorted(token for token in tokens if token is not None)
