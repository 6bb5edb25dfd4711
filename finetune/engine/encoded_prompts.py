"""Prompts as token ids, with the limits and the ends of their answers; answers as texts.

Loads no torch when it is imported, because a command imports it at its top.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.data.encoding import Encoder
from finetune.data.types import Prompt
from finetune.model.architectures import text_config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)

Answers = list[list[int]]
"""The new tokens of each prompt of a run; an end token, if there is one, is the last."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of answers are drawn.

    An answer depends on its prompt, on these settings and on the prompt's number alone, whatever is
    answered beside it.
    """

    temperature: float
    """Above 0; the logits are divided by it."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this share together are drawn, in (0, 1]."""
    seed: int = 0
    """At least 0."""


@dataclass(frozen=True)
class StopTexts:
    """Texts that end an answer, whatever tokens they consist of."""

    tokenizer: "PreTrainedTokenizerBase"
    texts: tuple[str, ...]
    """Not empty ones."""

    def are_in(self, tokens: list[int]) -> bool:
        """Whether the text of some tokens has one of them."""
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return any(stop in text for stop in self.texts)


@dataclass(frozen=True)
class EncodedPrompts:
    """The prompts of one run."""

    ids: list[list[int]]
    """The tokens of each prompt."""
    limits: list[int]
    """How many tokens each answer may have."""
    ends: list[int]
    """Ids that end an answer; empty: nothing does."""
    padding: int
    """Id of the padding token."""
    sampling: Sampling | None = None
    """None: each token is the most likely one."""
    stops: StopTexts | None = None
    """Texts that end an answer too. Some tokens after them may stand in the answer."""


def encode_prompts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Prompt],
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    variables: Mapping[str, Any] | None,
    sampling: Sampling | None,
) -> EncodedPrompts:
    """Encode prompts, and limit their answers; see `generation.generate_answers`."""
    encoder = Encoder(tokenizer, variables)
    ids = []
    for prompt in prompts:
        question = Prompt(prompt) if isinstance(prompt, str) else prompt
        ids.append(encoder.encode_prompt(question))
    positions = positions_of(model)
    limits = [
        _answer_limit(len(tokens), max_new_tokens, max_length, positions)
        for tokens in ids
    ]
    padding: int = tokenizer.pad_token_id
    ends = end_tokens(model, encoder.ends)
    return EncodedPrompts(ids, limits, ends, padding, sampling)


def decode_answers(tokenizer: "PreTrainedTokenizerBase", answers: Answers) -> list[str]:
    """Return the answers' texts, without special tokens."""
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]
    return [str(text).strip() for text in texts]


def positions_of(model: "PreTrainedModel") -> int | None:
    """Return the number of positions of a model; None: unlimited."""
    config = text_config_of(model.config)
    return getattr(config, "max_position_embeddings", None)


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


def end_tokens(model: "PreTrainedModel", ends: Sequence[int]) -> list[int]:
    """Return the ids that end an answer: the given ones and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    # It is a list, one id, or None.
    configured_ends = configured if isinstance(configured, list) else [configured]
    tokens = {*ends, *configured_ends}
    return sorted(token for token in tokens if token is not None)
