"""The packed engine's training loop: one run as a generator of requests to the bank."""

import functools
import itertools
import logging
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune.config.schema import RunConfig
from finetune.data.lengths import computed_length
from finetune.data.token_file import Example, Tokens
from finetune.data.types import Prompt
from finetune.engine.budget import Budget
from finetune.engine.checkpoint import Progress
from finetune.engine.encoded_prompts import (
    Answers,
    EncodedPrompts,
    Sampling,
    decode_answers,
    encode_prompts,
)
from finetune.engine.evaluation import Evaluation
from finetune.engine.packed.batch import BatchLayout, Row, lay_out
from finetune.engine.packed.gradient_norms import GradientNorm
from finetune.engine.packed.optimizer import SlotOptimizer
from finetune.engine.packed.requests import (
    Evaluate,
    ForwardBackward,
    ForwardBackwardResult,
    Generate,
    Wait,
)
from finetune.engine.packed.sequences import evaluation_of_sequences, rows_of
from finetune.engine.packed.slot import Slot
from finetune.engine.reporter import Reporter
from finetune.engine.schedule import (
    Step,
    answer_steps,
    evaluation_rungs,
    resolve_steps,
    step_batches,
    unlimited_steps,
)
from finetune.engine.steps import RunSteps
from finetune.files.run_folder import RunFolder
from finetune.metrics.load import generates_answers
from finetune.model.device import HostCopy, record_event

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _PreparedBatch:
    rows: list[Row]
    layout: BatchLayout


def with_next(steps: Iterable[Step]) -> Iterator[tuple[Step, Step | None]]:
    """Yield each step with the one that follows it; None after the last one."""
    following: Iterator[Step | None] = itertools.chain(steps, [None])
    for step, next_step in itertools.pairwise(following):
        assert step is not None
        yield step, next_step


class PackedTraining:
    """One run in its slot: its rows, its optimizer and its position in training."""

    def __init__(
        self,
        config: RunConfig,
        slot: Slot,
        rows: Tokens,
        total: int,
    ) -> None:
        """Set up the optimizer of a fresh slot.

        Args:
            config: The run's config.
            slot: The run's slot; nobody else may change it.
            rows: The tokenised training rows.
            total: Optimizer steps of the whole run.
        """
        self._config = config
        self._slot = slot
        self._rows = rows
        self._total = total
        self._rungs = evaluation_rungs(config.trainer.eval_steps, total)
        self._answer_steps: list[int] = []
        """The steps after which answers are generated."""
        # Nobody knows when a run that ends by the clock asks for answers.
        is_timed = config.trainer.max_minutes is not None
        if generates_answers(config.evaluation) and not is_timed:
            self._answer_steps = answer_steps(config.evaluation, self._rungs)
        self._step_number = 0
        """Of the step that is computed, or that an evaluation follows."""
        self._noise_alpha = config.trainer.extra.get("neftune_noise_alpha")
        self._prepared: tuple[Step, list[_PreparedBatch]] | None = None
        """The batches of the next step, if they have been prepared."""
        self._budget = Budget(config.trainer, total, unlimited_steps(config, len(rows)))
        self._optimizer = SlotOptimizer(config, slot, total)
        self._weights_event = record_event(slot.device)
        """Recorded after the last update of the weights; None on a CPU."""
        self.model = slot.model
        """The adapter as PEFT has it."""

    def train(
        self,
        reporter: Reporter,
        folder: RunFolder,
        checkpoint: Path | None,
    ) -> RunSteps[None]:
        """Train until the last step or until the reporter stops the run.

        Args:
            reporter: Receives every step, evaluates, and decides when to stop.
            folder: Where checkpoints go.
            checkpoint: To resume from; None: from the start.

        Returns:
            Nothing; the trained adapter is in the slot.
        """
        if checkpoint is not None:
            self._optimizer.load(checkpoint)
            # A copy to the host has to wait for the loaded weights too.
            self._weights_event = record_event(self._slot.device)
        save_every = resolve_steps(self._config.trainer.save_steps, self._total)
        checkpoint_limit = self._config.trainer.extra.get("save_total_limit", 1)
        lengths = self._rows.lengths
        steps = step_batches(lengths, self._config, self._total)
        progress = reporter.progress
        unreported: _TakenStep | None = None
        with reporter.live():
            yield from reporter.begin()
            for number, (step, following) in enumerate(with_next(steps), 1):
                if progress.stop is not None:
                    break
                # Before the checkpoint that the run resumes from.
                if number <= progress.step:
                    continue
                taken = yield from self._take(number, step, following, progress)
                if unreported is not None:
                    yield from self._report(unreported, reporter)
                    unreported = None
                is_save_due = bool(save_every) and number % save_every == 0
                # A step that has been taken can't be taken back: a run stops after it.
                is_stopping = following is None or progress.stop is not None
                is_due = (
                    is_save_due or reporter.is_checkpoint_due or number in self._rungs
                )
                if self._reports_late and not (is_stopping or is_due):
                    unreported = taken
                    continue
                yield from self._report(taken, reporter)
                is_last = number == self._total or progress.stop == "minutes"
                is_save_due = is_save_due or (bool(save_every) and is_last)
                is_due = is_save_due or reporter.is_checkpoint_due
                # An interrupted run is resumed after this very step.
                if is_due or progress.stop == "interrupted":
                    path = folder.checkpoints / f"checkpoint-{number}"
                    self._optimizer.save(path, self._weights_event)
                    reporter.complete_checkpoint(path, checkpoint_limit)

    def evaluate(
        self, rows: Sequence[Example], group_size: int | None = None
    ) -> RunSteps[Evaluation]:
        """Compute the adapter's losses on rows, in batches of rows of similar length.

        Args:
            rows: Tokenised rows, or sequences of rows.
            group_size: The rows come in groups of so many, whose common beginning is computed once
                for each group; None: once for each batch.

        Returns:
            The evaluation, with the rows in their order.
        """
        if len(rows) and "seq_lengths" in rows[0]:
            evaluation = yield from self.evaluate(rows_of(rows))
            return evaluation_of_sequences(evaluation, rows)
        examples = rows
        batch_size = self._config.trainer.per_device_eval_batch_size
        size = group_size or 1
        lengths = [computed_length(row) for row in examples]
        groups = [range(first, first + size) for first in range(0, len(examples), size)]
        groups.sort(key=lambda group: -max(lengths[index] for index in group))
        groups_at_once = max(batch_size // size, 1)
        losses = [0.0] * len(examples)
        tokens = [0] * len(examples)
        correct = [0] * len(examples)
        for start in range(0, len(groups), groups_at_once):
            batch_groups = groups[start : start + groups_at_once]
            batch_indices = [index for group in batch_groups for index in group]
            batch = [examples[index] for index in batch_indices]
            rounds = math.ceil((len(groups) - start) / groups_at_once)
            evaluation = yield Evaluate(
                self._slot, batch, group_size, self._rounds_to_answers(rounds)
            )
            for position, index in enumerate(batch_indices):
                losses[index] = evaluation.row_losses[position]
                tokens[index] = evaluation.row_tokens[position]
                correct[index] = evaluation.row_correct[position]
        return Evaluation(
            row_losses=tuple(losses),
            row_tokens=tuple(tokens),
            row_correct=tuple(correct),
        )

    def generate_answers(
        self,
        prompts: Sequence[Prompt],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_new_tokens: int | None,
        max_length: int | None = None,
        sampling: Sampling | None = None,
    ) -> RunSteps[list[str]]:
        """Generate an answer to each prompt, together with those of other runs.

        Arguments and answers are those of `finetune.engine.generation.generate_answers`.
        """
        encoded = encode_prompts(
            self._slot.bank.base,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            variables=self._config.model.template_kwargs,
            sampling=sampling,
        )
        answers = yield from self.answer(encoded)
        return decode_answers(tokenizer, answers)

    def answer(self, prompts: EncodedPrompts) -> RunSteps[Answers]:
        """Answer encoded prompts, together with those of other runs."""
        answers: Answers = yield Generate(self._slot, prompts)
        return answers

    def wait(self, will_ask: bool) -> RunSteps[None]:
        """Let other runs work while a thread of this run does.

        Args:
            will_ask: Whether the run will then ask for answers, so that others wait for them.
        """
        yield Wait(self._slot) if will_ask else None

    def weights_on_cpu(self) -> AbstractContextManager[None]:
        """Point `model` at a copy of its weights in host memory while the context lasts.

        The copy does not wait for passes of other slots that the GPU still computes.
        """
        return self._slot.weights_on_cpu(self._weights_event)

    def _rounds_to_answers(self, rounds: int) -> int | None:
        """Return how many requests from now the run asks for answers; None: never.

        Args:
            rounds: Requests that are left of the current step or evaluation.
        """
        for step in self._answer_steps:
            if step >= self._step_number:
                accumulation = self._config.trainer.gradient_accumulation_steps
                return (step - self._step_number) * accumulation + rounds
        return None

    def _prepare(self, step: Step) -> list[_PreparedBatch]:
        """Read and lay out the batches of a step."""
        noise_alpha = self._noise_alpha
        shares_prefixes = noise_alpha is None and self._slot.bank.shares_prefixes
        batches = []
        for indices in step.batches:
            rows = rows_of([self._rows[index] for index in indices])
            layout = lay_out(rows, None if shares_prefixes else 1)
            batches.append(_PreparedBatch(rows, layout))
        return batches

    def _prepare_next(self, step: Step) -> None:
        self._prepared = (step, self._prepare(step))

    def _take_prepared(self, step: Step) -> list[_PreparedBatch]:
        """The batches of a step, prepared by now or not."""
        prepared = self._prepared
        self._prepared = None
        if prepared is not None and prepared[0] is step:
            return prepared[1]
        return self._prepare(step)

    @property
    def _reports_late(self) -> bool:
        """Whether a step is reported when the next one has been queued.

        A GPU then never waits for the host. Only where the next step needs no figure of this one.
        """
        return self._slot.bank.is_asynchronous and self._budget.counts_steps

    def _take(
        self,
        number: int,
        step: Step,
        following: Step | None,
        progress: Progress,
    ) -> Generator[ForwardBackward, ForwardBackwardResult, "_TakenStep"]:
        """Run the batches of one optimizer step, and update the weights."""
        slot = self._slot
        self._step_number = number
        batches = self._take_prepared(step)
        prepare_next = None
        if following is not None:
            prepare_next = functools.partial(self._prepare_next, following)
        # Over all batches of the step, so that each answer token has the same weight, whatever
        # the batch that it is in.
        answer_tokens = sum(batch.layout.target_count for batch in batches)
        token_weight = 1 / max(answer_tokens, 1)
        loss_scale = self._optimizer.loss_scale
        # Counted over the whole run, so that no two batches have the same dropout masks.
        first_batch = number * self._config.trainer.gradient_accumulation_steps
        results = []
        accumulated = None
        for index, batch in enumerate(batches):
            result = yield ForwardBackward(
                slot=slot,
                rows=batch.rows,
                loss_weight=token_weight * loss_scale,
                dropout_step=first_batch + index,
                rounds_to_answers=self._rounds_to_answers(len(batches) - index),
                noise_alpha=self._noise_alpha,
                layout=batch.layout,
                prepare_next=prepare_next if index == len(batches) - 1 else None,
            )
            results.append(result)
            # The slot's gradient is that of the last batch only.
            if len(batches) > 1:
                accumulated = _accumulate(accumulated, slot.gradient)
        gradient, norm = slot.gradient, results[-1].device_norm
        host_norm = None
        if accumulated is not None:
            # The norm of a sum is not known from the norms of its terms.
            gradient = accumulated
            norm = GradientNorm.of(accumulated)
            host_norm = HostCopy(norm.value)
        # All steps before this one, also where the last of them is not reported yet.
        position = number - 1.0
        if not self._budget.counts_steps:
            position = self._budget.position(progress)
        learning_rate = self._optimizer.learning_rate(position)
        self._optimizer.update(gradient, norm, learning_rate)
        self._weights_event = record_event(slot.device)
        tokens = 0
        for batch in batches:
            tokens += sum(len(row["input_ids"]) for row in batch.rows)
        return _TakenStep(
            number, results, token_weight, host_norm, loss_scale, learning_rate, tokens
        )

    def _report(self, taken: "_TakenStep", reporter: Reporter) -> RunSteps[None]:
        """Report a step that has been taken."""
        loss = 0.0
        seconds = 0.0
        for result in taken.results:
            loss += result.loss * taken.token_weight
            seconds += result.seconds
        norm = taken.results[-1].norm
        if taken.norm is not None:
            norm = taken.norm.read().item()
        yield from reporter.report_step(
            step=taken.number,
            loss=loss,
            grad_norm=norm / taken.loss_scale,
            learning_rate=taken.learning_rate,
            tokens=taken.tokens,
            seconds=seconds,
        )


@dataclass(frozen=True)
class _TakenStep:
    """An optimizer step whose kernels are queued; on a GPU its figures may not be computed yet."""

    number: int
    results: list[ForwardBackwardResult]
    """Of its batches."""
    token_weight: float
    """1 / (answer tokens of all batches)."""
    norm: HostCopy | None
    """2-norm of the gradient of several batches; None: there is one batch, whose result has it."""
    loss_scale: float
    """The factor of the gradient."""
    learning_rate: float
    tokens: int


def _accumulate(total: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor:
    """Add a batch's gradient to the sum of those before it, in place; None: there are none."""
    if total is None:
        # The next batch overwrites the gradient.
        return gradient.clone()
    return total.add_(gradient)
