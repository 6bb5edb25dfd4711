"""The engine `packed`: a run as a plain loop that yields its batches to the bank, so that many share one base."""

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from finetune.bank import Learning, Learnt, Measuring, Slot
from finetune.base import compute_dtype, on_gpu, read_base_config, told
from finetune.config import RunConfig, refusal
from finetune.evaluation import Evaluation
from finetune.hub import BaseSource
from finetune.layout import Row, needed
from finetune.progress import Reporter, Turns, steps_of
from finetune.records import RunFolder, named
from finetune.tokens import IGNORED, epoch_order, listed

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
"""Architectures whose decoder's last state goes through one linear head, and into the loss as it is."""

ADAMW = {"adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"}
"""Spellings of the same mathematics."""

STATE = "slot.safetensors"
"""A checkpoint's weights and optimizer state, flat."""


def choose(config: RunConfig, source: BaseSource) -> str:
    """The engine of a run: `packed` wherever it does what the config asks for, else `trl`.

    Raises ConfigError where `trainer.engine=packed` is asked for in vain.
    """
    wanted = config.trainer.engine
    if wanted == "trl":
        return wanted
    reason = unsupported(config, read_base_config(source, config.model))
    if reason is None:
        return "packed"
    if wanted == "packed":
        raise refusal("trainer.engine", wanted, f"does not do {reason}; allowed: auto, trl")
    log.info("engine: trl, as packed does not do %s", reason)
    return "trl"


def unsupported(config: RunConfig, base: "PreTrainedConfig") -> str | None:
    """Why a run is not for this engine, as `key=value`; None: it is."""
    lora, optimizer, trainer, quantization = config.lora, config.optimizer, config.trainer, config.quantization
    targets = lora.target_modules
    pattern = targets if isinstance(targets, str) else "|".join(map(re.escape, targets))
    computed = str(compute_dtype(quantization)).removeprefix("torch.")
    half = config.quantization.bnb_4bit_compute_dtype == "float16"
    reasons = {
        f"model.name_or_path={config.model.name_or_path} (of type {base.model_type})": base.model_type
        not in LLAMA_LIKE,
        f"model.dtype={config.model.dtype}": config.model.dtype not in ("auto", computed),
        f"model.attn_implementation={config.model.attn_implementation}": config.model.attn_implementation
        not in (None, "sdpa"),
        f"model.extra={config.model.extra}": bool(config.model.extra.keys() - {"device_map"}),
        f"the model's attention_dropout={getattr(base, 'attention_dropout', 0)}": bool(
            getattr(base, "attention_dropout", 0)
        ),
        "lora.use_dora=true": lora.use_dora,
        f"lora.bias={lora.bias}": lora.bias != "none",
        f"lora.init_lora_weights={lora.init_lora_weights}": lora.init_lora_weights not in (True, False, "gaussian"),
        f"lora.extra={lora.extra}": bool(lora.extra),
        f"lora.target_modules={lora.target_modules} (with the head)": bool(re.fullmatch(pattern, "lm_head")),
        f"optimizer.name={optimizer.name}": optimizer.name not in ADAMW,
        f"trainer.extra={trainer.extra}": bool(trainer.extra.keys() - {"lr_scheduler_kwargs", "save_total_limit"}),
        "dataset.packing=true": config.dataset.packing,
        f"quantization.bnb_4bit_compute_dtype={quantization.bnb_4bit_compute_dtype}": half and not on_gpu(),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@dataclass(frozen=True)
class Step:
    """The rows of an optimizer step, batch by batch."""

    epoch: int
    batches: list[list[int]]


def steps(lengths: list[int], config: RunConfig, total: int) -> Iterator[Step]:
    """The rows of each optimizer step, in the order that both engines have; an epoch's last step may be smaller."""
    trainer = config.trainer
    rows, batches = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    done = epoch = 0
    while done < total:
        order = epoch_order(lengths, trainer.effective_batch_size, config.seed, epoch, trainer.group_by_length)
        parts = [order[start : start + rows] for start in range(0, len(order), rows)]
        for start in range(0, len(parts), batches):
            if done < total:
                yield Step(epoch, parts[start : start + batches])
                done += 1
        epoch += 1


class PackedTraining:
    """One run's weights, optimizer and order, on its slot."""

    def __init__(self, config: RunConfig, slot: Slot, rows: "Dataset", total: int) -> None:
        self._config, self._slot, self._rows, self._total = config, slot, listed(rows), total
        self.model = slot.model
        optimizer = config.optimizer
        self._weights = torch.nn.Parameter(slot.vector)
        self._optimizer = torch.optim.AdamW(
            [self._weights],
            lr=optimizer.learning_rate,
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
        self._settled = told(slot.bank.device)
        """Behind the last change of the weights."""

    def train(self, reporter: Reporter, folder: RunFolder, checkpoint: Path | None) -> Turns[None]:
        """Train from a checkpoint if one is given, as the reporter lets it; the adapter stays in the slot."""
        if checkpoint is not None:
            self._load(checkpoint)
        save_every = steps_of(self._config.trainer.save_steps, self._total)
        keep = self._config.trainer.extra.get("save_total_limit", 1)
        lengths = [len(row["input_ids"]) for row in self._rows]
        with reporter.live():
            yield from reporter.begin()
            for number, step in enumerate(steps(lengths, self._config, self._total), 1):
                if reporter.state.stop is not None:
                    break
                if number <= reporter.state.step:
                    continue
                yield from self._step(number, step, reporter)
                due = save_every and (number % save_every == 0 or number == self._total)
                if due or reporter.state.stop == "interrupted":
                    self._save(folder.checkpoints / f"checkpoint-{number}", reporter, keep)

    def measure(self, rows: "Dataset") -> Turns[Evaluation]:
        """What the adapter makes of rows, so many at a time, by length."""
        examples, batch_size = listed(rows), self._config.trainer.per_device_eval_batch_size
        order = sorted(range(len(examples)), key=lambda index: -needed(examples[index]))
        losses, tokens, right = [0.0] * len(order), [0] * len(order), 0.0
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found: Evaluation = yield Measuring(self._slot, [examples[index] for index in batch])
            for index, loss, count in zip(batch, found.row_losses, found.row_tokens, strict=True):
                losses[index], tokens[index] = loss, count
            right += found.accuracy * found.tokens
        return Evaluation(tuple(losses), tuple(tokens), right / max(sum(tokens), 1))

    def on_host(self) -> "AbstractContextManager[None]":
        """The model with its weights on the host, whatever the GPU computes for others."""
        return self._slot.on_host(self._settled)

    def speaking(self) -> "AbstractContextManager[PreTrainedModel]":
        """The model with the adapter, to be asked."""
        return self._slot.bank.speaking(self._slot)

    def _step(self, number: int, step: Step, reporter: Reporter) -> Turns[None]:
        config, slot = self._config, self._slot
        batches = [[self._rows[index] for index in batch] for batch in step.batches]
        share = 1 / max(sum(map(answers, batches)), 1)
        scale = self._scale.value if self._scale else 1.0
        loss = seconds = norm = 0.0
        gradient = None
        for index, batch in enumerate(batches):
            draw = number * config.trainer.gradient_accumulation_steps + index
            learnt: Learnt = yield Learning(slot, batch, share * scale, draw)
            loss += learnt.loss * share
            seconds += learnt.seconds
            norm = learnt.norm
            if len(batches) > 1:  # the slot's gradient is the last batch's
                gradient = slot.gradient.clone() if gradient is None else gradient.add_(slot.gradient)
        if gradient is not None:
            norm = float(gradient.norm())
        norm /= scale
        rate = config.optimizer.learning_rate * self._factor(number - 1)
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
        self._settled = told(self._slot.bank.device)

    def _save(self, checkpoint: Path, reporter: Reporter, keep: int | None) -> None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        state = self._optimizer.state[self._weights]
        tensors = {"weights": self._slot.vector, **state}
        if self._scale is not None:
            tensors["loss_scale"] = torch.tensor([self._scale.value, self._scale.good_steps])
        with named(checkpoint / STATE):
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
        self._settled = told(self._slot.bank.device)


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


def answers(rows: list[Row]) -> int:
    """Tokens that the loss counts."""
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])
