"""The TRL engine: one run, trained by TRL's SFTTrainer, for configs that `packed` does not support.

`TrlTraining.train` starts the trainer; the training loop itself is transformers' `Trainer.train`.
Logging, evaluation and stopping are the `Reporter`'s, called from a trainer callback.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from trl import SFTConfig, SFTTrainer

from finetune.compat import set_train_sampler
from finetune.config.schema import RunConfig
from finetune.config.sections.optimizer import OptimizerSettings
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


RESERVED_ARGUMENTS = {
    "activation_checkpointing", "do_eval", "eval_on_start", "eval_steps", "gradient_checkpointing",
    "load_best_model_at_end", "logging_first_step", "logging_strategy", "warmup_ratio",
}  # fmt: skip
"""Arguments of SFTConfig that `trainer.extra` may not set, because the reporter relies on them."""

OVERRIDABLE_ARGUMENTS = {"fp16", "bf16"}
"""Arguments that a run sets and `trainer.extra` may set otherwise."""


def training_arguments(config: RunConfig, checkpoints: Path, steps: int) -> SFTConfig:
    """Return TRL's arguments for a run.

    Args:
        config: The run's config.
        checkpoints: Folder of the run's checkpoints.
        steps: Optimizer steps of the whole run.

    Raises:
        ConfigError: `trainer.extra` names an argument that has a key of its own, or that SFTConfig
            does not accept.
    """
    arguments = {
        "output_dir": str(checkpoints),
        "seed": config.seed,
        **_batch_arguments(config),
        **_optimizer_arguments(config.optimizer),
        **_reporting_arguments(config, steps),
        **_precision_arguments(config),
        **_dataset_arguments(config),
    }
    extra = config.trainer.extra
    _check_extra(extra, arguments.keys())
    # save_total_limit: the reporter removes old checkpoints, once the next one is complete.
    arguments |= {**extra, "save_total_limit": None}
    try:
        return SFTConfig(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer.extra={extra}: {' '.join(str(error).split())}") from None


def _check_extra(extra: dict[str, Any], arguments: Iterable[str]) -> None:
    """Refuse further arguments that a run sets itself."""
    refused = {*arguments, *RESERVED_ARGUMENTS} - OVERRIDABLE_ARGUMENTS
    for name, value in extra.items():
        if name in refused:
            allowed = "has a key of its own, or is the project's to set"
            raise refusal(f"trainer.extra.{name}", value, allowed)


def _batch_arguments(config: RunConfig) -> dict[str, Any]:
    trainer = config.trainer
    return {
        "num_train_epochs": trainer.num_train_epochs,
        "max_steps": trainer.max_steps,
        "per_device_train_batch_size": trainer.per_device_train_batch_size,
        "per_device_eval_batch_size": trainer.per_device_eval_batch_size,
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        "train_sampling_strategy": "group_by_length" if trainer.group_by_length else "random",
        _checkpointing_argument(): trainer.gradient_checkpointing,
    }


def _checkpointing_argument() -> str:
    """Return the name of the gradient checkpointing argument; transformers 5.23 renamed it."""
    names = {field.name for field in dataclasses.fields(SFTConfig)}
    new_name = "activation_checkpointing"
    return new_name if new_name in names else "gradient_checkpointing"


def _optimizer_arguments(optimizer: OptimizerSettings) -> dict[str, Any]:
    return {
        "optim": optimizer.name,
        "learning_rate": optimizer.resolved_learning_rate,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "lr_scheduler_type": optimizer.lr_scheduler_type,
        "warmup_steps": optimizer.warmup_ratio,  # a value below 1 is a share of all steps
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_epsilon": optimizer.adam_epsilon,
    }


def _reporting_arguments(config: RunConfig, steps: int) -> dict[str, Any]:
    """Let TRL report every step, to the reporter alone, and save at the run's interval."""
    save_steps = resolve_steps(config.trainer.save_steps, steps)
    return {
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 1,
        "eval_strategy": "no",
        "report_to": "none",
    }


def _precision_arguments(config: RunConfig) -> dict[str, Any]:
    dtype = compute_dtype(config.quantization)
    return {
        "use_cpu": not on_gpu(),
        "bf16": on_gpu() and dtype == torch.bfloat16,
        "fp16": on_gpu() and dtype == torch.float16,
    }


def _dataset_arguments(config: RunConfig) -> dict[str, Any]:
    return {
        "max_length": config.dataset.max_length,
        "packing": config.dataset.packing,
        "dataset_text_field": config.dataset.text_field,
        "dataset_kwargs": {"skip_prepare_dataset": True},  # the rows are tokenised already
    }


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
        """Set up the training of a run.

        Args:
            config: The run's config.
            arguments: From `training_arguments`.
            model: The base with a fresh adapter; no other run uses it meanwhile.
            tokenizer: The base's tokenizer.
            rows: The tokenised training rows.
        """
        self.model = model
        self._config = config
        self._arguments = arguments
        self._tokenizer = tokenizer
        self._rows = rows

    def train(
        self, reporter: Reporter, folder: RunFolder, checkpoint: Path | None
    ) -> RunSteps[None]:
        """Train until the last step or until the reporter stops the run.

        Args:
            reporter: Receives every step, evaluates, and decides when to stop.
            folder: The run's folder; checkpoints go where the training arguments say.
            checkpoint: To resume from; None: from the start.

        Returns:
            Nothing; the trained adapter is in `model`.
        """
        yield from ()  # no requests: the base can't be shared with other runs
        if checkpoint is not None and reporter.state.step >= reporter.total:
            load_adapter(self.model, checkpoint)  # the Trainer would train one more step
            return
        trainer = self._create_trainer(reporter)
        with reporter.live():
            drive(reporter.begin())
            if reporter.state.stop is None:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def evaluate(self, rows: "Dataset") -> RunSteps[Evaluation]:
        """Compute the adapter's losses on rows.

        Args:
            rows: Tokenised rows.

        Returns:
            The evaluation, with the rows in their order.
        """
        yield from ()
        batch_size = self._config.trainer.per_device_eval_batch_size
        return evaluate(self.model, rows, batch_size, self._config.quantization)

    def weights_on_cpu(self) -> "AbstractContextManager[None]":
        """Leave the weights where they are: no other run computes that a copy could wait for."""
        return nullcontext()

    def generation_model(self) -> "AbstractContextManager[PeftModel]":
        """Return the model with the adapter, for text generation."""
        return nullcontext(self.model)

    def _create_trainer(self, reporter: Reporter) -> SFTTrainer:
        # TRL casts a quantised base's adapter to bfloat16, in which an update of 2e-4 is rounded
        # away: the float32 weights are put back afterwards.
        weights = {
            name: weight.detach().clone()
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }
        checkpoint_limit = self._config.trainer.extra.get("save_total_limit", 1)
        trainer = SFTTrainer(
            model=self.model,
            args=self._arguments,
            train_dataset=self._rows,
            processing_class=self._tokenizer,
            callbacks=[_ReporterCallback(reporter, checkpoint_limit)],
        )
        for name, weight in self.model.named_parameters():
            if name in weights:
                weight.data = weights[name]
        lengths = [len(ids) for ids in self._rows["input_ids"]]
        set_train_sampler(trainer, EpochSampler(lengths, self._config))
        trainer.remove_callback(PrinterCallback)  # the reporter shows progress
        trainer.remove_callback(ProgressCallback)
        return trainer


class EpochSampler(Sampler[int]):
    """Draws the rows of each epoch in the order that both engines share (`epoch_order`)."""

    def __init__(self, lengths: list[int], config: RunConfig) -> None:
        """Draw training rows.

        Args:
            lengths: Tokens of each row.
            config: The run's config.
        """
        self._lengths = lengths
        self._config = config
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch. accelerate calls it when an epoch begins, a resumed one too."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        trainer = self._config.trainer
        order = epoch_order(
            self._lengths,
            trainer.effective_batch_size,
            self._config.seed,
            self._epoch,
            trainer.group_by_length,
        )
        return iter(order)

    def __len__(self) -> int:
        return len(self._lengths)


class _ReporterCallback(TrainerCallback):  # type: ignore[misc]
    """Passes each step's figures to the reporter, and lets it complete each checkpoint."""

    def __init__(self, reporter: Reporter, checkpoint_limit: int | None) -> None:
        self._reporter = reporter
        self._checkpoint_limit = checkpoint_limit
        self._total_tokens = 0.0
        self._training_since = time.perf_counter()
        """Evaluations and checkpoints move it forward, so that they don't count as training."""

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._training_since = time.perf_counter()

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        seconds = time.perf_counter() - self._training_since
        tokens = logs["num_tokens"] - self._total_tokens
        self._total_tokens = logs["num_tokens"]
        steps = self._reporter.step(
            state.global_step,
            logs["loss"],
            logs.get("grad_norm"),
            logs["learning_rate"],
            int(tokens),
            seconds,
        )
        drive(steps)
        self._training_since = time.perf_counter()
        stop = self._reporter.state.stop
        if stop is not None:
            control.should_training_stop = True
            control.should_save = stop == "interrupted"

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._reporter.saved(checkpoint, self._checkpoint_limit)
        self._training_since = time.perf_counter()
