"""Length and rhythm of a training."""

from dataclasses import dataclass
from typing import Any, Literal

from finetune.config.sections.section import Section
from finetune.errors import refusal

KEEPS_BASE = {
    "lr_scheduler_kwargs", "neftune_noise_alpha", "optim_args", "save_total_limit",
}  # fmt: skip
"""Arguments in `trainer.extra` that concern a run alone, not its base; both engines have them."""

Checkpointing = bool | Literal["partial"]
"""Values of `trainer.gradient_checkpointing` once it is decided."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(Section):
    """Length of the training, batches, evaluations, checkpoints."""

    section = "trainer"

    engine: Literal["auto", "packed", "trl"]
    """packed: trains many trials on one base; trl: TRL's SFTTrainer; auto: packed where it supports
    the config."""

    num_train_epochs: float
    """Passes over the training rows, where `max_steps` is -1."""

    max_steps: int
    """Optimizer steps; -1: as many as `num_train_epochs` takes."""

    per_device_train_batch_size: int
    """Rows in one batch of training."""

    per_device_eval_batch_size: int
    """Rows in one batch of evaluation."""

    gradient_accumulation_steps: int
    """Batches in one optimizer step."""

    gradient_checkpointing: Checkpointing | Literal["auto"]
    """Whether activations are computed again in the backward pass, which saves memory and takes
    time; partial: with the project's kernels on one GPU only those for which there is no memory,
    else as true; auto: partial where not all fit and that helps, else false."""

    group_by_length: bool
    """Whether rows of similar length are put into the same batch."""

    eval_steps: float | list[float]
    """Evaluate every this many optimizer steps; below 1: every such share of all steps; a list:
    after each of those steps or shares; 0: only before and after training; auto: 0.25, and in a
    study [0.1112, 0.3334]."""

    save_steps: float
    """Write a checkpoint every this many optimizer steps; below 1: every such share of all steps;
    0: none."""

    logging_steps: int
    """Log training metrics every this many optimizer steps."""

    early_stopping_patience: int | None
    """Stop after this many evaluations without a better objective; null: never."""

    extra: dict[str, Any]
    """Further arguments of `trl.SFTConfig`."""

    max_tokens: int | None = None
    """Training ends after the optimizer step that reaches this many tokens, or earlier by
    `num_train_epochs` or `max_steps`; null: no limit. Padding does not count."""
    # These defaults are for run folders that were written before the keys existed.

    max_minutes: float | None = None
    """Training ends after the optimizer step in which this many minutes have passed, without those
    of evaluations and checkpoints, or earlier; null: no limit. The learning rate's schedule follows
    the largest of the shares of steps, tokens and minutes."""

    save_minutes: float | None = None
    """Write a checkpoint, too, whenever this many minutes have passed since the last one, so that
    killed work goes on from there; null: by `save_steps` alone."""

    gpus: int | Literal["auto"] = "auto"
    """GPUs that the base is spread over, layer by layer, where it is larger than one; auto: one,
    and in a study `hydra.sweeper.gpus_per_worker`."""

    @property
    def checkpointing(self) -> Checkpointing:
        """`gradient_checkpointing`; false where `auto` is not decided yet."""
        if self.gradient_checkpointing == "auto":
            return False
        return self.gradient_checkpointing

    def __post_init__(self) -> None:
        has_gpus = self.gpus == "auto" or self.gpus >= 1
        self.require("gpus", has_gpus, "must be at least 1, or auto")
        self.require("num_train_epochs", self.num_train_epochs > 0, "must be above 0")
        has_limit = self.max_steps >= 1
        allowed = "must be at least 1, or -1: by epochs"
        self.require("max_steps", has_limit or self.max_steps == -1, allowed)
        allowed = "must be a whole number of at least 1"
        for field in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
        ):
            count = getattr(self, field)
            self.require(field, count >= 1, allowed)
        allowed = (
            "must be a whole number of steps, a share of them from 0.001 to below 1, "
            "or 0: none"
        )
        steps = self.eval_steps
        intervals = steps if isinstance(steps, list) else [steps]
        are_valid = all(_is_interval(steps) for steps in intervals)
        self.require("eval_steps", are_valid, f"{allowed}; or a list of those")
        self.require("save_steps", _is_interval(self.save_steps), allowed)
        patience = self.early_stopping_patience
        is_valid = patience is None or patience >= 1
        allowed = "must be at least 1, or null"
        self.require("early_stopping_patience", is_valid, allowed)
        tokens = self.max_tokens
        allowed = "must be a whole number of at least 1, or null"
        self.require("max_tokens", tokens is None or tokens >= 1, allowed)
        minutes = self.max_minutes
        allowed = "must be above 0, or null"
        self.require("max_minutes", minutes is None or minutes > 0, allowed)
        minutes = self.save_minutes
        self.require("save_minutes", minutes is None or minutes > 0, allowed)
        self._check_extra()

    def _check_extra(self) -> None:
        limit = self.extra.get("save_total_limit")
        is_count = isinstance(limit, int) and not isinstance(limit, bool)
        if limit is not None and not (is_count and limit >= 0):
            allowed = "must be a whole number of at least 0 (0: all), or null: all"
            raise refusal("trainer.extra.save_total_limit", limit, allowed)
        noise = self.extra.get("neftune_noise_alpha")
        is_number = isinstance(noise, int | float) and not isinstance(noise, bool)
        if noise is not None and not (is_number and noise > 0):
            allowed = "must be a number above 0, or null"
            raise refusal("trainer.extra.neftune_noise_alpha", noise, allowed)

    @property
    def effective_batch_size(self) -> int:
        """Rows in one optimizer step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def _is_interval(steps: float) -> bool:
    """Whether a number is 0, a whole number of steps, or a share of all steps."""
    is_share = 0.001 <= steps < 1
    is_count = steps >= 1 and steps == int(steps)
    return steps == 0 or is_share or is_count
