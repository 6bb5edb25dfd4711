"""The packed engine's training loop: one run as a generator of requests to the bank."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune.config.schema import RunConfig
from finetune.data.encoding import IGNORED
from finetune.data.lengths import computed_length
from finetune.data.token_file import Example, Tokens
from finetune.data.types import Prompt
from finetune.engine.evaluation import Evaluation
from finetune.engine.loaded_model import LoadedModel
from finetune.engine.packed.batch import Row
from finetune.engine.packed.optimizer import SlotOptimizer
from finetune.engine.packed.requests import (
    Evaluate,
    ForwardBackward,
    ForwardBackwardResult,
)
from finetune.engine.packed.slot import Slot
from finetune.engine.reporter import Reporter
from finetune.engine.schedule import Step, resolve_steps, step_batches
from finetune.engine.steps import RunSteps
from finetune.files.run_folder import RunFolder
from finetune.model.device import record_event

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)


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
        self._optimizer = SlotOptimizer(config, slot, total)
        self._weights_event = record_event(slot.bank.device)
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
            self._weights_event = record_event(self._slot.bank.device)
        save_every = resolve_steps(self._config.trainer.save_steps, self._total)
        checkpoint_limit = self._config.trainer.extra.get("save_total_limit", 1)
        lengths = self._rows.lengths
        steps = step_batches(lengths, self._config, self._total)
        progress = reporter.progress
        with reporter.live():
            yield from reporter.begin()
            for number, step in enumerate(steps, 1):
                if progress.stop is not None:
                    break
                # Before the checkpoint that the run resumes from.
                if number <= progress.step:
                    continue
                yield from self._step(number, step, reporter)
                is_last = number == self._total
                is_due = save_every and (number % save_every == 0 or is_last)
                # An interrupted run is resumed after this very step.
                if is_due or progress.stop == "interrupted":
                    path = folder.checkpoints / f"checkpoint-{number}"
                    self._optimizer.save(path)
                    reporter.complete_checkpoint(path, checkpoint_limit)

    def evaluate(self, rows: Sequence[Example]) -> RunSteps[Evaluation]:
        """Compute the adapter's losses on rows, in batches of rows of similar length.

        Args:
            rows: Tokenised rows.

        Returns:
            The evaluation, with the rows in their order.
        """
        examples = rows
        batch_size = self._config.trainer.per_device_eval_batch_size
        lengths = [computed_length(row) for row in examples]
        indices = range(len(examples))
        order = sorted(indices, key=lambda index: -lengths[index])
        losses = [0.0] * len(examples)
        tokens = [0] * len(examples)
        correct = [0] * len(examples)
        for start in range(0, len(order), batch_size):
            batch_indices = order[start : start + batch_size]
            batch = [examples[index] for index in batch_indices]
            evaluation: Evaluation = yield Evaluate(self._slot, batch)
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
        max_new_tokens: int,
    ) -> RunSteps[list[str]]:
        """Generate an answer to each prompt with the run's adapter; other runs train in between.

        Args:
            prompts: The prompts.
            tokenizer: The base's tokenizer.
            max_new_tokens: Limit of an answer, in tokens.

        Returns:
            The answers, in the order of the prompts.
        """
        answers: list[str] = []
        batch_size = self._config.trainer.per_device_eval_batch_size
        for start in range(0, len(prompts), batch_size):
            yield None
            batch = prompts[start : start + batch_size]
            with self.generation_model() as model:
                loaded = LoadedModel(self._config, model)
                answers += yield from loaded.generate_answers(
                    batch, tokenizer, max_new_tokens=max_new_tokens
                )
        return answers

    def weights_on_cpu(self) -> AbstractContextManager[None]:
        """Point `model` at a copy of its weights in host memory while the context lasts.

        The copy does not wait for passes of other slots that the GPU still computes.
        """
        return self._slot.weights_on_cpu(self._weights_event)

    def generation_model(self) -> "AbstractContextManager[PreTrainedModel]":
        """The base with the run's adapter applied, for text generation."""
        return self._slot.bank.generation_model(self._slot)

    def _step(
        self,
        number: int,
        step: Step,
        reporter: Reporter,
    ) -> RunSteps[None]:
        """Run the batches of one optimizer step, update the weights and report."""
        slot = self._slot
        batches = []
        for indices in step.batches:
            batches.append([self._rows[index] for index in indices])
        # Over all batches of the step, so that each answer token has the same weight, whatever
        # the batch that it is in.
        answer_tokens = sum(map(count_answer_tokens, batches))
        token_weight = 1 / max(answer_tokens, 1)
        loss_scale = self._optimizer.loss_scale
        # Counted over the whole run, so that no two batches have the same dropout masks.
        first_batch = number * self._config.trainer.gradient_accumulation_steps
        loss = 0.0
        seconds = 0.0
        norm = 0.0
        accumulated = None
        for index, batch in enumerate(batches):
            result: ForwardBackwardResult = yield ForwardBackward(
                slot=slot,
                rows=batch,
                loss_weight=token_weight * loss_scale,
                dropout_step=first_batch + index,
            )
            loss += result.loss * token_weight
            seconds += result.seconds
            norm = result.norm
            # The slot's gradient is that of the last batch only.
            if len(batches) > 1:
                accumulated = _accumulate(accumulated, slot.gradient)
        # The norm of a sum is not known from the norms of its terms.
        if accumulated is not None:
            norm = float(accumulated.norm())
        norm /= loss_scale
        gradient = slot.gradient if accumulated is None else accumulated
        learning_rate = self._optimizer.learning_rate(number)
        self._optimizer.update(gradient, norm, learning_rate)
        self._weights_event = record_event(slot.bank.device)
        tokens = 0
        for batch in batches:
            tokens += sum(len(row["input_ids"]) for row in batch)
        yield from reporter.report_step(
            step=number,
            loss=loss,
            grad_norm=norm,
            learning_rate=learning_rate,
            tokens=tokens,
            seconds=seconds,
        )


def _accumulate(total: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor:
    """Add a batch's gradient to the sum of those before it, in place; None: there are none."""
    if total is None:
        # The next batch overwrites the gradient.
        return gradient.clone()
    return total.add_(gradient)


def count_answer_tokens(rows: list[Row]) -> int:
    """Count the tokens that the loss counts."""
    count = 0
    for row in rows:
        # No token predicts the first one.
        predicted = row["labels"][1:]
        count += sum(label != IGNORED for label in predicted)
    return count
