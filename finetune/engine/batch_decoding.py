"""One batch of prompts, continued token by token with transformers' `generate`.

With an allocated cache it is called for some tokens at a time, and rows that have ended leave the
batch in between.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from finetune.engine.allocated_cache import allocate_cache
from finetune.engine.encoded_prompts import Answers, StopTexts
from finetune.engine.probes import (
    Comparison,
    computes_exactly,
    plain_logits,
    probe_ids,
)
from finetune.engine.recorded_steps import recorded_steps
from finetune.engine.sampling import RowSampler
from finetune.model.device import without_cudnn_attention

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

ShowTokens = Callable[[list[int]], None]
"""Receives new tokens of an answer."""

TOKENS_OF_A_CALL = 16
"""Tokens after which rows that have ended leave the batch, and stop texts are looked for."""

MEDIAN_STEPS = 3
"""Steps that a probe compares where products are rounded: the fewest that have a median."""

SMALLER_SHARE = 0.75
"""Rows leave if at most this share of the batch remains: the cache is copied for it."""


def decode_batch(
    model: "PreTrainedModel",
    prompt_ids: list[list[int]],
    limits: list[int],
    *,
    runs: int,
    ends: list[int],
    padding: int,
    use_cache: bool,
    records: bool = False,
    sampler: RowSampler | None,
    stops: Sequence[StopTexts | None] = (),
    show_tokens: ShowTokens | None = None,
) -> Answers:
    """Continue prompts together.

    Args:
        model: In evaluation mode, with the adapters of the runs.
        prompt_ids: Tokens of each prompt: of one run after another, equally many of each.
        limits: Limit on each answer's tokens, at least 1.
        runs: Number of runs.
        ends: Ids that end an answer; empty: nothing does.
        padding: Id of the padding token.
        use_cache: Whether the keys and values of earlier tokens are cached.
        records: Whether the passes that compute one token of each row are recorded.
        sampler: Draws the tokens; None: each is the most likely one.
        stops: Texts that end each prompt's answer, if any; empty: there are none.
        show_tokens: Receives the tokens of the only prompt's answer as they are generated.

    Returns:
        The answer of each prompt, in the order of the prompts.
    """
    device = next(model.parameters()).device
    ids, mask = pad_left(prompt_ids, padding, device)
    remaining = max(limits)
    longest = ids.shape[1] + remaining
    cache = allocate_cache(model, longest, records=records) if use_cache else None
    answers: Answers = [[] for _ in prompt_ids]
    rows = list(range(len(prompt_ids)))
    stops = stops or [None] * len(rows)
    finished = [False] * len(rows)
    arguments: dict[str, Any] = {}
    if show_tokens is not None:
        arguments["streamer"] = _TokenStreamer(show_tokens)
    if cache is None and any(stops):
        # One call generates all tokens.
        arguments["stopping_criteria"] = [_StopCriterion(stops, ids.shape[1], ends)]
    with recorded_steps(model, cache):
        while True:
            tokens = remaining if cache is None else min(remaining, TOKENS_OF_A_CALL)
            length = ids.shape[1]
            ids = generate(
                model,
                ids,
                mask,
                tokens=tokens,
                ends=ends,
                padding=padding,
                use_cache=use_cache,
                cache=cache,
                sampler=sampler,
                **arguments,
            )
            for row, new_tokens in zip(rows, ids[:, length:].tolist(), strict=True):
                if finished[row]:
                    continue
                answer = _cut(answers[row] + new_tokens, limits[row], ends)
                answers[row] = answer
                finished[row] = _is_finished(answer, limits[row], ends, stops[row])
            remaining -= tokens
            unfinished = [not finished[row] for row in rows]
            if cache is None or not any(unfinished):
                return answers
            mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - length)], 1)
            selected = _select(unfinished, runs)
            if len(selected) <= SMALLER_SHARE * len(rows):
                indices = torch.tensor(selected, device=device)
                ids = ids[indices]
                mask = mask[indices]
                cache.batch_select_indices(indices)
                if sampler is not None:
                    sampler.select(indices)
                rows = [rows[index] for index in selected]


class _TokenStreamer(BaseStreamer):  # type: ignore[misc]
    """Hands on new tokens, within a call of transformers' `generate`."""

    def __init__(self, show_tokens: ShowTokens) -> None:
        self._show_tokens = show_tokens

    def put(self, value: torch.Tensor) -> None:
        """Receive the tokens before the call [1, tokens], and then each new one [1]."""
        if value.dim() == 1:
            self._show_tokens(value.tolist())

    def end(self) -> None:
        """Receive the end of the call."""


class _StopCriterion(StoppingCriteria):  # type: ignore[misc]
    """Ends rows with a stop text, within a call of transformers' `generate`."""

    def __init__(
        self, stops: Sequence[StopTexts | None], prompt_length: int, ends: list[int]
    ) -> None:
        """Set what ends the rows.

        Args:
            stops: Of each row.
            prompt_length: Tokens before the answers, with padding.
            ends: Ids that end an answer.
        """
        self._stops = stops
        self._prompt_length = prompt_length
        self._ends = ends

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Return whether each row ends here [rows]; looked at after some tokens."""
        new_tokens = input_ids[:, self._prompt_length :]
        are_ended = torch.zeros(len(new_tokens), dtype=torch.bool)
        length = new_tokens.shape[1]
        if length % TOKENS_OF_A_CALL == 0:
            for row, tokens in enumerate(new_tokens.tolist()):
                stop = self._stops[row]
                answer = _cut(tokens, length, self._ends)
                are_ended[row] = stop is not None and stop.are_in(answer)
        return are_ended.to(input_ids.device)


def _cut(tokens: list[int], limit: int, ends: list[int]) -> list[int]:
    """Return an answer up to its limit or its first end, which is left in it."""
    for position, token in enumerate(tokens[:limit]):
        if token in ends:
            return tokens[: position + 1]
    return tokens[:limit]


def _is_finished(
    answer: list[int], limit: int, ends: list[int], stops: StopTexts | None
) -> bool:
    if len(answer) >= limit or answer[-1] in ends:
        return True
    return stops is not None and stops.are_in(answer)


def _select(unfinished: list[bool], runs: int) -> list[int]:
    """Choose equally many rows of each run, all that are unfinished among them.

    Args:
        unfinished: Of each row, of one run after another.
        runs: Number of runs.

    Returns:
        The indices of the rows, of one run after another.
    """
    rows_of_a_run = len(unfinished) // runs
    ordered = []
    counts = []
    for run in range(runs):
        first = run * rows_of_a_run
        indices = range(first, first + rows_of_a_run)
        # The unfinished ones come first, each group in its order.
        ordered.append(sorted(indices, key=lambda index: not unfinished[index]))
        counts.append(sum(unfinished[index] for index in indices))
    selected = []
    for indices_of_a_run in ordered:
        selected += indices_of_a_run[: max(counts)]
    return selected


def pad_left(
    prompt_ids: list[list[int]], padding: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts as one tensor, and the mask that is 0 at padding [prompts, tokens].

    They are padded on the left, because each answer continues at its prompt's last token.
    """
    longest = max(map(len, prompt_ids))
    padded = []
    mask = []
    for ids in prompt_ids:
        missing = longest - len(ids)
        padded.append([padding] * missing + ids)
        mask.append([0] * missing + [1] * len(ids))
    return torch.tensor(padded, device=device), torch.tensor(mask, device=device)


def generate(
    model: "PreTrainedModel",
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    tokens: int,
    ends: list[int],
    padding: int,
    use_cache: bool,
    cache: "DynamicCache | None",
    sampler: RowSampler | None = None,
    **arguments: Any,
) -> Any:
    """Continue rows until all have ended.

    Args:
        model: In evaluation mode.
        ids: Tokens of each row, padded on the left [rows, tokens].
        mask: 0 at padding [rows, tokens].
        tokens: Limit on the new tokens.
        ends: Ids that end an answer; empty: nothing does.
        padding: Id of the padding token.
        use_cache: Whether the keys and values of earlier tokens are cached.
        cache: Those of the rows' first tokens, or empty; None: transformers' own.
        sampler: Draws the tokens; None: each is the most likely one.
        arguments: Further arguments of transformers' `generate`.

    Returns:
        transformers' output: the rows with the new tokens [rows, tokens], unless `arguments` ask
        for more.
    """
    if cache is not None:
        arguments["past_key_values"] = cache
    if sampler is not None:
        arguments["logits_processor"] = [sampler]
    with without_cudnn_attention():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=padding,
            eos_token_id=ends or None,
            use_cache=use_cache,
            # For a cache whose tensors stay the same, transformers would compile the base.
            disable_compile=True,
            **arguments,
        )


def compare_steps(
    model: "PreTrainedModel", prompts: int, records: bool, length: int
) -> Comparison:
    """Compare the logits of cached steps with those of the row alone, without a cache.

    Args:
        model: In evaluation mode.
        prompts: Prompts at once: 1, or 2 of which the compared one is padded on the left.
        records: Whether steps are recorded.
        length: Tokens of the compared prompt.
    """
    prompt = probe_ids(model, length, 0)
    longer_prompt = probe_ids(model, length + 3, 1)
    batch = [longer_prompt, prompt][-prompts:]
    ids, mask = pad_left(batch, prompt[0], next(model.parameters()).device)
    # Where products are rounded, the median token is compared.
    compared = 1 if computes_exactly(model) else MEDIAN_STEPS
    # The first step is launched, the second one recorded, and then launched at its own position.
    steps = 2 + compared if records else compared
    cache = allocate_cache(model, ids.shape[1] + 1 + steps, records=records)
    with recorded_steps(model, cache):
        output = generate(
            model,
            ids,
            mask,
            tokens=1 + steps,
            ends=[],
            padding=prompt[0],
            use_cache=True,
            cache=cache,
            min_new_tokens=1 + steps,
            output_logits=True,
            return_dict_in_generate=True,
        )
    # The first new token comes from the pass over the prompt, which has no cache yet.
    cached_logits = [step[-1] for step in output.logits[1:]]
    # No step has read the last new token.
    sequence = output.sequences[-1].tolist()
    answer = sequence[-1 - steps : -1]
    plain = plain_logits(model, prompt + answer)
    return torch.stack(cached_logits[-compared:]), plain[-compared:]
