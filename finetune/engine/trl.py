"""What a run leaves in its folder, written so that a kill at any instant loses nothing that was finished."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from finetune.config.schema import RunConfig
from finetune.engine.evaluation import Evaluation, evaluate
from finetune.engine.reporter import Reporter
from finetune.engine.schedule import epoch_order, resolve_steps
from finetune.engine.steps import RunSteps, drive
from finetune.errors import ConfigError, refusal
from finetune.files.run_folder import RunFolder
from finetune.model.adapter import load_adapter
from finetune.model.device import on_gpu
from finetune.model.quantization import compute_dtype

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class Stopwatch:
    """Seconds of what is measured, apart from what is not: evaluations, checkpoints."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        return elapsed


_OURS = {
    "activation_checkpointing", "do_eval", "eval_on_start", "eval_steps", "gradient_checkpointing",
    "load_best_model_at_end", "logging_first_step", "logging_strategy", "warmup_ratio",
}  # fmt: skip
"""Further arguments of SFTConfig that would change what the reporter counts on."""


_FIELDS = {field.name for field in dataclasses.fields(SFTConfig)}


def training_arguments(config: RunConfig, checkpoints: Path, steps: int) -> SFTConfig:
    """TRL's arguments for a run. Logging and evaluation are the reporter's, so TRL logs every step to it alone."""
    trainer, optimizer = config.trainer, config.optimizer
    dtype = compute_dtype(config.quantization)
    save_every = resolve_steps(trainer.save_steps, steps)
    # transformers 5.23 calls it activation checkpointing, and warns of the old name
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"
    arguments: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "seed": config.seed,
        "num_train_epochs": trainer.num_train_epochs,
        "max_steps": trainer.max_steps,
        "per_device_train_batch_size": trainer.per_device_train_batch_size,
        "per_device_eval_batch_size": trainer.per_device_eval_batch_size,
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        checkpointing: trainer.gradient_checkpointing,
        "train_sampling_strategy": "group_by_length" if trainer.group_by_length else "random",
        "optim": optimizer.name,
        "learning_rate": optimizer.resolved_learning_rate,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": optimizer.lr_scheduler_type,
        "warmup_steps": optimizer.warmup_ratio,  # below 1 it is a ratio; warmup_ratio itself is gone
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_epsilon": optimizer.adam_epsilon,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if save_every else "no",
        "save_steps": save_every or 1,
        "eval_strategy": "no",
        "report_to": "none",
        "use_cpu": not on_gpu(),
        "bf16": on_gpu() and dtype == torch.bfloat16,
        "fp16": on_gpu() and dtype == torch.float16,
        "max_length": config.dataset.max_length,
        "packing": config.dataset.packing,
        "dataset_text_field": config.dataset.text_field,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    for name in trainer.extra:
        if name in (arguments.keys() | _OURS) - {"fp16", "bf16"}:
            raise refusal(
                f"trainer.extra.{name}", trainer.extra[name], "has a key of its own, or is the project's to set"
            )
    try:
        # checkpoints are removed by the project itself, after the next one is whole
        return SFTConfig(**arguments | trainer.extra | {"save_total_limit": None})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer.extra={trainer.extra}: {' '.join(str(error).split())}") from None


class TrlTraining:
    """One run's model and trainer."""

    def __init__(
        self,
        config: RunConfig,
        arguments: SFTConfig,
        model: "PeftModel",
        tokenizer: "PreTrainedTokenizerBase",
        rows: "Dataset",
    ) -> None:
        self.model = model
        self._config, self._arguments, self._tokenizer, self._rows = config, arguments, tokenizer, rows

    def train(self, reporter: Reporter, folder: RunFolder, checkpoint: Path | None) -> RunSteps[None]:
        """Train from a checkpoint if one is given, as the reporter lets it; the adapter stays on the model."""
        if checkpoint is not None and reporter.state.step >= reporter.total:
            load_adapter(self.model, checkpoint)  # killed after its last step: the Trainer would train one more
            return
        yield from ()  # it takes no turns: nobody else can use the base meanwhile
        # TRL casts a quantised base's adapter to bfloat16, where steps of 2e-4 are lost: put the float32 weights back.
        exact = {name: weight.detach().clone() for name, weight in self._trained()}
        trainer = _Trainer(
            model=self.model,
            args=self._arguments,
            train_dataset=self._rows,
            processing_class=self._tokenizer,
            callbacks=[_Reporting(reporter, keep=self._config.trainer.extra.get("save_total_limit", 1))],
        )
        for name, weight in self.model.named_parameters():
            if name in exact:
                weight.data = exact[name]
        trainer.order = _Order([len(ids) for ids in self._rows["input_ids"]], self._config)
        trainer.remove_callback(PrinterCallback)  # the reporter shows progress
        trainer.remove_callback(ProgressCallback)
        with reporter.live():
            drive(reporter.begin())
            if reporter.state.stop is None:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)

    def evaluate(self, rows: "Dataset") -> RunSteps[Evaluation]:
        """What the adapter makes of rows."""
        yield from ()
        config = self._config
        return evaluate(self.model, rows, config.trainer.per_device_eval_batch_size, config.quantization)

    def weights_on_cpu(self) -> "AbstractContextManager[None]":
        """Nothing else is computed, so the model's weights may stay where they are."""
        return nullcontext()

    def generation_model(self) -> "AbstractContextManager[PeftModel]":
        """The model with the adapter, to be asked."""
        return nullcontext(self.model)


class _Order(Sampler[int]):
    """The rows of each epoch in the project's order."""

    def __init__(self, lengths: list[int], config: RunConfig) -> None:
        self._lengths, self._epoch, self._config = lengths, 0, config

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate when an epoch begins, resumed ones too."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        trainer = self._config.trainer
        batch, grouped = trainer.effective_batch_size, trainer.group_by_length
        return iter(epoch_order(self._lengths, batch, self._config.seed, self._epoch, grouped))

    def __len__(self) -> int:
        return len(self._lengths)


class _Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with an order of our own."""

    order: _Order

    def _get_train_sampler(self, train_dataset: "Dataset | None" = None) -> Sampler[int]:
        return self.order


class _Reporting(TrainerCallback):  # type: ignore[misc]
    """Hands each step's figures to the reporter, and saves its state with each checkpoint."""

    def __init__(self, reporter: Reporter, keep: int | None) -> None:
        self._reporter, self._keep = reporter, keep
        self._tokens_seen = 0.0
        self._watch = Stopwatch()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._watch.lap()  # what came before is no training time

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        tokens, self._tokens_seen = logs["num_tokens"] - self._tokens_seen, logs["num_tokens"]
        norm, seconds = logs.get("grad_norm"), self._watch.lap()
        drive(self._reporter.step(state.global_step, logs["loss"], norm, logs["learning_rate"], int(tokens), seconds))
        self._watch.lap()
        stop = self._reporter.state.stop
        if stop is not None:
            control.should_training_stop = True
            control.should_save = stop == "interrupted"

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._reporter.saved(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._keep)
        self._watch.lap()
