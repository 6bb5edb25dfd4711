"""The optimizer and its learning rate."""

from dataclasses import dataclass
from typing import Literal

from finetune.config.sections.section import Section

OptimizerName = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "adafactor", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    "sgd",
]  # fmt: skip


ScheduleName = Literal[
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
    "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Section):
    """The optimizer and the schedule of its learning rate."""

    section = "optimizer"

    name: OptimizerName
    """One of transformers' optimizers."""

    learning_rate: float | None
    """Highest learning rate of the schedule; null: the rate that suits the base, from
    `model.learning_rate` or a rule of its hidden size."""

    weight_decay: float
    """Decoupled weight decay; 0: none."""

    max_grad_norm: float
    """The gradient is scaled down to this norm where it is larger; 0: no clipping."""

    lr_scheduler_type: ScheduleName
    """One of transformers' schedules; its further arguments are
    `trainer.extra.lr_scheduler_kwargs`."""

    warmup_ratio: float
    """Share of all optimizer steps in which the rate rises from 0, in [0, 1)."""

    adam_beta1: float
    """Decay rate of the gradient's moving average, in [0, 1)."""

    adam_beta2: float
    """Decay rate of the squared gradient's moving average, in [0, 1)."""

    adam_epsilon: float
    """Added to the denominator of the update."""

    lora_plus_ratio: float | None = None
    """LoRA+ (arXiv 2402.12354): the matrices B have this many times the learning rate; null: all
    have the same."""
    # The default is for run folders that were written before the key existed.

    def __post_init__(self) -> None:
        ratio = self.lora_plus_ratio
        allowed = "must be at least 1, or null"
        self.require("lora_plus_ratio", ratio is None or ratio >= 1, allowed)
        rate = self.learning_rate
        self.require("learning_rate", rate is None or rate > 0, "must be above 0")
        self.require("weight_decay", self.weight_decay >= 0, "must be at least 0")
        allowed = "must be at least 0 (0: no clipping)"
        self.require("max_grad_norm", self.max_grad_norm >= 0, allowed)
        allowed = "must be a share of all steps, in [0, 1)"
        self.require("warmup_ratio", 0 <= self.warmup_ratio < 1, allowed)
        allowed = "must be at least 0 and below 1"
        for field in ("adam_beta1", "adam_beta2"):
            decay = getattr(self, field)
            self.require(field, 0 <= decay < 1, allowed)
        self.require("adam_epsilon", self.adam_epsilon > 0, "must be above 0")

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate, once `finetune.run.learning_rate` has replaced a null."""
        assert self.learning_rate is not None, (
            "a run resolves its learning rate before it trains"
        )
        return self.learning_rate
