"""Answers to the prompts of one or several runs, in batches, as token ids.

A run alone is answered in the same way as many runs: it is a batch of one run.
"""

import functools
import logging
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.config.sections.model import QuantizationSettings
from finetune.engine.allocated_cache import allocate_cache
from finetune.engine.answer_batch import (
    AnswerBatch,
    next_batch,
    remove_answered,
    rows_in_memory,
)
from finetune.engine.batch_decoding import ShowTokens, compare_steps, decode_batch
from finetune.engine.encoded_prompts import Answers, EncodedPrompts, positions_of
from finetune.engine.evaluation import evaluation_mode
from finetune.engine.probes import Shortcut, holds
from finetune.engine.recorded_steps import can_record
from finetune.engine.sampling import RowSampler
from finetune.engine.step_cache import StepCache
from finetune.errors import is_out_of_memory_error
from finetune.model.memory import free_memory
from finetune.model.quantization import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

Adapt = Callable[[Sequence[int]], AbstractContextManager[object]]
"""Applies the adapters of some runs, given by their numbers, to equally many rows of each."""


def generate_tokens(
    model: "PreTrainedModel",
    prompts: Sequence[EncodedPrompts],
    quantization: QuantizationSettings,
    adapt: Adapt = lambda runs: nullcontext(),
    show_tokens: ShowTokens | None = None,
) -> list[Answers]:
    """Answer the prompts of runs, together as far as the base and the memory allow it.

    Args:
        model: A base, or a base with an adapter.
        prompts: Those of each run.
        quantization: As the base was loaded.
        adapt: Applies the runs' adapters; by default the model has its adapter already.
        show_tokens: Receives the tokens of the only prompt's answer as they are generated.

    Returns:
        The answers of each run; empty where a prompt's limit is 0.
    """
    assert show_tokens is None or sum(len(run.ids) for run in prompts) == 1
    answers: list[Answers] = [[[] for _ in run.ids] for run in prompts]
    groups: dict[tuple[int, ...], list[int]] = {}
    # Chat templates with other variables may end answers otherwise.
    for number, run in enumerate(prompts):
        groups.setdefault(tuple(run.ends), []).append(number)
    with evaluation_mode(model), autocast(quantization):
        for runs in groups.values():
            _Decoding(model, prompts, adapt, answers, show_tokens).answer(runs)
    return answers


@dataclass(frozen=True)
class _Way:
    """How a base generates."""

    together: bool
    """Prompts can be answered together."""
    use_cache: bool
    """Keys and values of earlier tokens are cached."""
    records: bool = False
    """The passes that compute one token of each row are recorded."""


class _Decoding:
    """Prompts of runs whose answers end alike."""

    def __init__(
        self,
        model: "PreTrainedModel",
        prompts: Sequence[EncodedPrompts],
        adapt: Adapt,
        answers: list[Answers],
        show_tokens: ShowTokens | None,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._adapt = adapt
        self._answers = answers
        self._show_tokens = show_tokens
        self._room: int | None = None
        """Prompts that fit into memory at once; None: no limit has been met."""

    def answer(self, runs: list[int]) -> None:
        """Answer all prompts of some runs that have a limit above 0."""
        rows = []
        for run in runs:
            limits = self._prompts[run].limits
            rows += [(run, row) for row, limit in enumerate(limits) if limit > 0]
        if not rows:
            return
        pending, separate = self._separate(rows)
        longest = max(self._length(run, row) for run, row in rows)
        longest += max(self._limit(run, row) for run, row in rows)
        way = self._choose_way(runs[0], longest, several=len(separate) < len(rows) - 1)
        if not way.together:
            pending, separate = {}, rows
        while pending:
            batch = next_batch(pending, self._rows_in_memory(pending))
            if self._try(batch, way):
                remove_answered(pending, batch)
            else:
                self._room = batch.size // 2
        for run, row in separate:
            self._decode(AnswerBatch([run], [[row]]), way)

    def _length(self, run: int, row: int) -> int:
        return len(self._prompts[run].ids[row])

    def _limit(self, run: int, row: int) -> int:
        return self._prompts[run].limits[row]

    def _separate(
        self, rows: list[tuple[int, int]]
    ) -> tuple[dict[int, list[int]], list[tuple[int, int]]]:
        """Return the prompts that can be answered together, by run, and those that can't.

        A batch is generated until its longest answer ends. A prompt that might exceed the model's
        positions by then is answered alone.
        """
        positions = positions_of(self._model)
        longest_answer = max(self._limit(run, row) for run, row in rows)
        # Prompts of similar length are answered together, which saves padding.
        ordered = sorted(rows, key=lambda pair: -self._length(*pair))
        pending: dict[int, list[int]] = {}
        separate = []
        for run, row in ordered:
            if (
                positions is None
                or self._length(run, row) + longest_answer <= positions
            ):
                pending.setdefault(run, []).append(row)
            else:
                separate.append((run, row))
        return pending, separate

    def _choose_way(self, run: int, tokens: int, several: bool) -> _Way:
        """Return how the base can generate.

        Args:
            run: Any of the runs.
            tokens: Tokens of the longest prompt with the longest answer.
            several: Whether there are prompts to answer together.
        """
        with self._adapt([run]):
            # This probe is of prompts together and of cached steps too, so it is the only one.
            if self._can_record(tokens) and self._holds(
                Shortcut.RECORDED_STEPS, 2, tokens
            ):
                return _Way(together=several, use_cache=True, records=True)
            # This one is of cached steps too.
            if several and self._holds(Shortcut.PROMPTS_TOGETHER, 2, tokens):
                return _Way(together=True, use_cache=True)
            use_cache = self._holds(Shortcut.CACHED_STEPS, 1, tokens)
        return _Way(together=False, use_cache=use_cache)

    def _can_record(self, tokens: int) -> bool:
        if not can_record(self._model):
            return False
        # Without memory for keys and values, which are allocated by the first pass.
        cache = allocate_cache(self._model, tokens, records=True)
        return isinstance(cache, StepCache)

    def _holds(self, shortcut: Shortcut, prompts: int, tokens: int) -> bool:
        """Whether a shortcut holds.

        Args:
            shortcut: Of generation.
            prompts: As `compare_steps` takes it.
            tokens: Tokens of the longest prompt with the longest answer.
        """
        records = shortcut is Shortcut.RECORDED_STEPS
        compare = functools.partial(compare_steps, self._model, prompts, records)
        if not holds(shortcut, self._model, tokens, compare):
            return False
        # Steps that cannot be recorded are compared as they are launched.
        return not records or can_record(self._model)

    def _rows_in_memory(self, pending: dict[int, list[int]]) -> int:
        lengths = []
        limits = []
        for run, rows in pending.items():
            lengths += [self._length(run, row) for row in rows]
            limits += [self._limit(run, row) for row in rows]
        room = rows_in_memory(self._model, max(lengths) + max(limits))
        return room if self._room is None else min(room, self._room)

    def _try(self, batch: AnswerBatch, way: _Way) -> bool:
        """Answer a batch; return False where it does not fit into memory, but a smaller one may."""
        try:
            self._decode(batch, way)
            return True
        except Exception as error:
            if batch.size == 1 or not is_out_of_memory_error(error):
                raise
            # The frames hold the tensors of the batch.
            traceback.clear_frames(error.__traceback__)
        log.warning(
            "memory is too small to answer %d prompts at once; %d from now on",
            batch.size,
            batch.size // 2,
        )
        free_memory()
        return False

    def _decode(self, batch: AnswerBatch, way: _Way) -> None:
        """Answer a batch."""
        members = batch.members()
        first = self._prompts[batch.runs[0]]
        limits = [self._limit(run, row) for run, row in members]
        samplings = [(self._prompts[run].sampling, row) for run, row in members]
        sampler = None
        if any(sampling is not None for sampling, _ in samplings):
            sampler = RowSampler(
                samplings, max(limits), next(self._model.parameters()).device
            )
        with self._adapt(batch.runs):
            answers = decode_batch(
                self._model,
                [self._prompts[run].ids[row] for run, row in members],
                limits,
                runs=len(batch.runs),
                ends=first.ends,
                padding=first.padding,
                use_cache=way.use_cache,
                records=way.records and can_record(self._model),
                sampler=sampler,
                stops=[self._prompts[run].stops for run, _ in members],
                show_tokens=self._show_tokens,
            )
        for (run, row), answer in zip(members, answers, strict=True):
            self._answers[run][row] = answer
