"""The packed engine's training loop: one run as a generator of requests to the bank."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from finetune.config.schema import RunConfig
from finetune.data.encoding import IGNORED
from finetune.data.lengths import computed_length
from finetune.data.tokens import as_list
from finetune.engine.evaluation import Evaluation
from finetune.engine.packed.batch import Row
from finetune.engine.packed.requests import Evaluate, ForwardBackward, ForwardBackwardResult
from finetune.engine.packed.slot import Slot
from finetune.engine.reporter import Reporter
from finetune.engine.schedule import Step, resolve_steps, step_batches
from finetune.engine.steps import RunSteps
from finetune.files.atomic import name_file_in_errors
from finetune.files.run_folder import RunFolder
from finetune.model.device import record_event

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from datasets import Dataset
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


STATE = "slot.safetensors"
"""A checkpoint's weights and optimizer state, flat."""


class PackedTraining:
    """One run's weights, optimizer and order, on its slot."""

    def __init__(self, config: RunConfig, slot: Slot, rows: "Dataset", total: int) -> None:
        self._config, self._slot, self._rows, self._total = config, slot, as_list(rows), total
        self.model = slot.model
        optimizer = config.optimizer
        self._weights = torch.nn.Parameter(slot.vector)
        self._optimizer = torch.optim.AdamW(
            [self._weights],
            lr=optimizer.resolved_learning_rate,
            betas=(optimizer.adam_beta1, optimizer.adam_beta2),
            eps=optimizer.adam_epsilon,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        warmup = math.ceil(optimizer.warmup_ratio * total)
        scheduler = get_scheduler(
            optimizer.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total,
            scheduler_specific_kwargs=config.trainer.extra.get("lr_scheduler_kwargs"),
        )
        self._factor = scheduler.lr_lambdas[0]
        self._scale = LossScale() if slot.bank.dtype == torch.float16 else None
        self._settled = record_event(slot.bank.device)
        """Behind the last change of the weights."""

    def train(self, reporter: Reporter, folder: RunFolder, checkpoint: Path | None) -> RunSteps[None]:
        """Train from a checkpoint if one is given, as the reporter lets it; the adapter stays in the slot."""
        if checkpoint is not None:
            self._load(checkpoint)
        save_every = resolve_steps(self._config.trainer.save_steps, self._total)
        keep = self._config.trainer.extra.get("save_total_limit", 1)
        lengths = [len(row["input_ids"]) for row in self._rows]
        with reporter.live():
            yield from reporter.begin()
            for number, step in enumerate(step_batches(lengths, self._config, self._total), 1):
                if reporter.state.stop is not None:
                    break
                if number <= reporter.state.step:
                    continue
                yield from self._step(number, step, reporter)
                due = save_every and (number % save_every == 0 or number == self._total)
                if due or reporter.state.stop == "interrupted":
                    self._save(folder.checkpoints / f"checkpoint-{number}", reporter, keep)

    def evaluate(self, rows: "Dataset") -> RunSteps[Evaluation]:
        """What the adapter makes of rows, so many at a time, by length."""
        examples, batch_size = as_list(rows), self._config.trainer.per_device_eval_batch_size
        order = sorted(range(len(examples)), key=lambda index: -computed_length(examples[index]))
        losses, tokens, right = [0.0] * len(order), [0] * len(order), 0.0
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found: Evaluation = yield Evaluate(self._slot, [examples[index] for index in batch])
            for index, loss, count in zip(batch, found.row_losses, found.row_tokens, strict=True):
                losses[index], tokens[index] = loss, count
            right += found.accuracy * found.tokens
        return Evaluation(tuple(losses), tuple(tokens), right / max(sum(tokens), 1))

    def weights_on_cpu(self) -> "AbstractContextManager[None]":
        """The model with its weights on the host, whatever the GPU computes for others."""
        return self._slot.weights_on_cpu(self._settled)

    def generation_model(self) -> "AbstractContextManager[PreTrainedModel]":
        """The model with the adapter, to be asked."""
        return self._slot.bank.generation_model(self._slot)

    def _step(self, number: int, step: Step, reporter: Reporter) -> RunSteps[None]:
        config, slot = self._config, self._slot
        batches = [[self._rows[index] for index in batch] for batch in step.batches]
        share = 1 / max(sum(map(count_answer_tokens, batches)), 1)
        scale = self._scale.value if self._scale else 1.0
        loss = seconds = norm = 0.0
        gradient = None
        for index, batch in enumerate(batches):
            draw = number * config.trainer.gradient_accumulation_steps + index
            learnt: ForwardBackwardResult = yield ForwardBackward(slot, batch, share * scale, draw)
            loss += learnt.loss * share
            seconds += learnt.seconds
            norm = learnt.norm
            if len(batches) > 1:  # the slot's gradient is the last batch's
                gradient = slot.gradient.clone() if gradient is None else gradient.add_(slot.gradient)
        if gradient is not None:
            norm = float(gradient.norm())
        norm /= scale
        rate = config.optimizer.resolved_learning_rate * self._factor(number - 1)
        self._update(slot.gradient if gradient is None else gradient, norm, rate, scale)
        tokens = sum(len(row["input_ids"]) for batch in batches for row in batch)
        yield from reporter.step(number, loss, norm, rate, tokens, seconds)

    def _update(self, gradient: torch.Tensor, norm: float, rate: float, scale: float) -> None:
        """Take the optimizer's step, after the gradient is clipped. `norm` is the gradient's without the loss scale."""
        if self._scale is not None:
            gradient.div_(scale)
        limit = self._config.optimizer.max_grad_norm
        if limit and not norm + 1e-6 <= limit:
            gradient.mul_(limit / (norm + 1e-6))
        if self._scale is None or self._scale.update(math.isfinite(norm)):
            self._optimizer.param_groups[0]["lr"] = rate
            self._weights.grad = gradient
            self._optimizer.step()
            self._weights.grad = None
        self._settled = record_event(self._slot.bank.device)

    def _save(self, checkpoint: Path, reporter: Reporter, keep: int | None) -> None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        state = self._optimizer.state[self._weights]
        tensors = {"weights": self._slot.vector, **state}
        if self._scale is not None:
            tensors["loss_scale"] = torch.tensor([self._scale.value, self._scale.good_steps])
        with name_file_in_errors(checkpoint / STATE):
            save_file(tensors, checkpoint / STATE)
        reporter.saved(checkpoint, keep)

    def _load(self, checkpoint: Path) -> None:
        tensors = load_file(checkpoint / STATE, device=str(self._slot.bank.device))
        self._slot.vector.copy_(tensors.pop("weights"))
        scale = tensors.pop("loss_scale", None)
        if self._scale is not None and scale is not None:
            self._scale.value, self._scale.good_steps = float(scale[0]), int(scale[1])
        if tensors:
            self._optimizer.state[self._weights] = tensors
        self._settled = record_event(self._slot.bank.device)


class LossScale:
    """float16's loss scaling, each run's own, as `torch.amp.GradScaler` has it by default."""

    value = 65536.0
    good_steps = 0

    def update(self, finite: bool) -> bool:
        """Whether the step is to be taken; the scale for the next one."""
        if not finite:
            self.value, self.good_steps = self.value / 2, 0
            return False
        self.good_steps += 1
        if self.good_steps == 2000:
            self.value, self.good_steps = self.value * 2, 0
        return True


def count_answer_tokens(rows: list[Row]) -> int:
    """Tokens that the loss counts."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])
