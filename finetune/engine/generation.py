"""Greedy text generation from prompts.

Loads no torch when it is imported, because a command and `finetune.run.run` import it at their top.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.config.sections.model import QuantizationSettings
from finetune.data.encoding import Encoder
from finetune.data.types import Prompt
from finetune.model.architectures import text_config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.engine.probes import Comparison


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
        prompts: The prompts, generated in one batch as far as the model's positions and its
            handling of padding allow it.
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
    prompt_ids = []
    for prompt in prompts:
        question = Prompt(prompt) if isinstance(prompt, str) else prompt
        prompt_ids.append(encoder.encode_prompt(question))
    lengths = [len(ids) for ids in prompt_ids]
    ends = _end_tokens(model, encoder.ends)
    config = text_config_of(model.config)
    positions: int | None = getattr(config, "max_position_embeddings", None)
    limits = [
        _answer_limit(length, max_new_tokens, max_length, positions)
        for length in lengths
    ]
    answers = [""] * len(prompts)
    with evaluation_mode(model), autocast(quantization):
        batches = _batches(lengths, limits, positions)
        totals = [length + limit for length, limit in zip(lengths, limits, strict=True)]
        longest = max(totals, default=0)
        batches, use_cache = _choose_way(model, batches, longest)
        for batch in batches:
            batch_ids = [prompt_ids[row] for row in batch]
            batch_limits = [limits[row] for row in batch]
            sequences = _generate(
                model,
                tokenizer.pad_token_id,
                batch_ids,
                max(batch_limits),
                ends,
                use_cache,
            )
            # The prompts are padded on the left, so all answers begin at the same column.
            longest_prompt = max(map(len, batch_ids))
            new_tokens = sequences[:, longest_prompt:]
            for row, tokens in zip(batch, new_tokens, strict=True):
                # The batch was generated up to the largest limit of its rows.
                answer = tokens[: limits[row]]
                text = tokenizer.decode(answer, skip_special_tokens=True)
                answers[row] = str(text).strip()
    return answers


def _choose_way(
    model: "PreTrainedModel", batches: list[list[int]], tokens: int
) -> tuple[list[list[int]], bool]:
    """Return the batches as the base can compute them, and whether with cached keys and values.

    Args:
        model: In evaluation mode.
        batches: The numbers of the prompts of each batch.
        tokens: Tokens of the longest prompt with its answer.
    """
    from finetune.engine.probes import Shortcut, holds

    if not batches:
        return batches, True
    if any(len(batch) > 1 for batch in batches):
        compare = functools.partial(_compare_steps, model, 2)
        # This probe is of cached steps too, so the next one is not needed.
        if holds(Shortcut.PROMPTS_TOGETHER, model, tokens, compare):
            return batches, True
    single_batches = [[row] for batch in batches for row in batch]
    compare = functools.partial(_compare_steps, model, 1)
    use_cache = holds(Shortcut.CACHED_STEPS, model, tokens, compare)
    return single_batches, use_cache


def _compare_steps(model: "PreTrainedModel", prompts: int, length: int) -> "Comparison":
    """Compare the logits of cached steps with those of the row alone, without a cache.

    Args:
        model: In evaluation mode.
        prompts: Prompts at once: 1, or 2 of which the compared one is padded on the left.
        length: Tokens of the compared prompt.
    """
    import torch

    from finetune.engine.probes import computes_exactly, plain_logits, probe_ids

    # Where products are rounded, the median token is compared: one token would be no median.
    cached_steps = 1 if computes_exactly(model) else 3
    prompt = probe_ids(model, length, 0)
    longer_prompt = probe_ids(model, length + 3, 1)
    batch = [longer_prompt, prompt][-prompts:]
    output = _generate(
        model,
        prompt[0],
        batch,
        max_new_tokens=1 + cached_steps,
        ends=[],
        use_cache=True,
        min_new_tokens=1 + cached_steps,
        output_logits=True,
        return_dict_in_generate=True,
    )
    # The first new token comes from the pass over the prompt, which has no cache yet.
    cached_logits = [step[-1] for step in output.logits[1:]]
    # No step has read the last new token.
    sequence = output.sequences[-1].tolist()
    answer = sequence[-1 - cached_steps : -1]
    plain = plain_logits(model, prompt + answer)
    return torch.stack(cached_logits), plain[-cached_steps:]


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


def _generate(
    model: "PreTrainedModel",
    padding: int,
    prompt_ids: list[list[int]],
    max_new_tokens: int,
    ends: list[int],
    use_cache: bool,
    **arguments: Any,
) -> Any:
    """Continue prompts in one batch.

    Args:
        model: In evaluation mode.
        padding: Id of the padding token.
        prompt_ids: Tokens of each prompt.
        max_new_tokens: Limit on each answer's tokens.
        ends: Ids that end an answer; empty: nothing does.
        use_cache: Whether the keys and values of earlier tokens are cached.
        arguments: Further arguments of transformers' `generate`.

    Returns:
        transformers' output: the padded prompts with their answers [prompts, tokens], unless
        `arguments` ask for more.
    """
    import torch

    # Padded on the left, because the answer continues at each prompt's last token.
    longest = max(len(ids) for ids in prompt_ids)
    padded = []
    mask = []
    for ids in prompt_ids:
        length = len(ids)
        missing = longest - length
        padded.append([padding] * missing + ids)
        mask.append([0] * missing + [1] * length)
    device = next(model.parameters()).device
    return model.generate(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding,
        eos_token_id=ends or None,
        use_cache=use_cache,
        **arguments,
    )


def _end_tokens(model: "PreTrainedModel", ends: list[int]) -> list[int]:
    """Return the ids that end an answer: those of the rows and of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    # It is a list, one id, or None.
    configured_ends = configured if isinstance(configured, list) else [configured]
    tokens = {*ends, *configured_ends}
    return sorted(token for token in tokens if token is not None)
