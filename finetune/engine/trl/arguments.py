"""TRL's arguments (`SFTConfig`) for a run, from the run's config."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from finetune.config.schema import RunConfig
from finetune.config.sections.optimizer import OptimizerSettings
from finetune.engine.schedule import resolve_steps
from finetune.errors import ConfigError, refusal
from finetune.model.device import on_gpu
from finetune.model.quantization import compute_dtype

RESERVED_ARGUMENTS = {
    "activation_checkpointing", "do_eval", "eval_on_start", "eval_steps", "gradient_checkpointing",
    "load_best_model_at_end", "logging_first_step", "logging_strategy", "warmup_ratio",
}  # fmt: skip
"""Arguments of SFTConfig that `trainer.extra` may not set, because the reporter relies on them."""

WITHOUT_EFFECT = {
    # Rows, which the project reads, tokenises and orders.
    "assistant_only_loss", "completion_only_loss", "data_seed", "dataset_num_proc", "eval_packing",
    "length_column_name", "shuffle_dataset", "truncation_mode",
    # Evaluations.
    "batch_eval_metrics", "bf16_full_eval", "do_predict", "do_train", "eval_accumulation_steps",
    "eval_delay", "eval_do_concat_batches", "eval_use_gather_object", "fp16_full_eval",
    "greater_is_better", "include_for_metrics", "metric_for_best_model", "prediction_loss_only",
    # The base, the progress bar, resuming and trackers.
    "disable_tqdm", "model_init_kwargs", "project", "resume_from_checkpoint", "run_name",
    "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "trust_remote_code",
}  # fmt: skip
"""Arguments of SFTConfig for what the project does itself, so that they would change nothing."""

OVERRIDABLE_ARGUMENTS = {"fp16", "bf16", "router_aux_loss_coef"}
"""Arguments that a run sets and `trainer.extra` may set otherwise."""


def training_arguments(config: RunConfig, checkpoints: Path, steps: int) -> SFTConfig:
    """Return TRL's arguments for a run.

    Args:
        config: The run's config.
        checkpoints: Folder of the run's checkpoints.
        steps: Optimizer steps of the whole run.

    Returns:
        The arguments, with those of `trainer.extra`.

    Raises:
        ConfigError: `trainer.extra` names an argument that has a key of its own, that has no
            effect, or that SFTConfig does not accept.
    """
    arguments = {
        "output_dir": str(checkpoints),
        "seed": config.seed,
        **_batch_arguments(config, steps),
        **_optimizer_arguments(config.optimizer),
        **_reporting_arguments(config, steps),
        **_precision_arguments(config),
        **_dataset_arguments(config),
        # TRL would add a loss that balances the experts, by the base's config: the routers, which
        # it is for, are frozen.
        "router_aux_loss_coef": 0.0,
    }
    extra = config.trainer.extra
    _check_extra(extra, arguments.keys())
    # The reporter removes old checkpoints itself, once the next one is complete.
    arguments |= {**extra, "save_total_limit": None}
    try:
        return SFTConfig(**arguments)
    except (TypeError, ValueError) as error:
        # In one line.
        reason = " ".join(str(error).split())
        raise ConfigError(f"trainer.extra={extra}: {reason}") from None


def _check_extra(extra: dict[str, Any], arguments: Iterable[str]) -> None:
    """Refuse further arguments that a run sets itself, or that change nothing."""
    refused = {*arguments, *RESERVED_ARGUMENTS} - OVERRIDABLE_ARGUMENTS
    for name, value in extra.items():
        if name in refused:
            allowed = "has a key of its own, or is the project's to set"
            raise refusal(f"trainer.extra.{name}", value, allowed)
        if name in WITHOUT_EFFECT:
            reason = "has no effect: the project, not TRL, does what it is for"
            raise refusal(f"trainer.extra.{name}", value, reason)


def _batch_arguments(config: RunConfig, steps: int) -> dict[str, Any]:
    trainer = config.trainer
    has_limit = trainer.max_tokens is not None
    strategy = "group_by_length" if trainer.group_by_length else "random"
    return {
        "num_train_epochs": trainer.num_train_epochs,
        "max_steps": steps if has_limit else trainer.max_steps,
        "per_device_train_batch_size": trainer.per_device_train_batch_size,
        "per_device_eval_batch_size": trainer.per_device_eval_batch_size,
        "gradient_accumulation_steps": trainer.gradient_accumulation_steps,
        "train_sampling_strategy": strategy,
        _checkpointing_argument(): bool(trainer.checkpointing),
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
        # transformers 5.23 has no `warmup_ratio`: a number below 1 is a share of all steps.
        "warmup_steps": optimizer.warmup_ratio,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "adam_epsilon": optimizer.adam_epsilon,
    }


def _reporting_arguments(config: RunConfig, steps: int) -> dict[str, Any]:
    """Let TRL report every step, to the reporter alone, and save at the run's interval."""
    save_steps = resolve_steps(config.trainer.save_steps, steps)
    return {
        "logging_steps": 1,
        # transformers would hide a loss of NaN, which ends the run.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if save_steps else "no",
        "save_steps": save_steps or 1,
        # The reporter evaluates. It also writes to the run's tracker: transformers' own W&B
        # callback expects one active run in a process.
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
        # The rows are tokenised already.
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
