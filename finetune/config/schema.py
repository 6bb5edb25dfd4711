"""The border: a composed Hydra config becomes one frozen, typed, checked `RunConfig`; past it no DictConfig exists.

What each key means and its unit stands beside it in `conf/config.yaml`; what it may be stands here. Every
refusal is a `ConfigError` of one line that names the key, the value and what is allowed.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from finetune.config.convert import build
from finetune.config.data_folder import has_evaluation_files
from finetune.config.paths import PLAIN_NAME, is_plain_name
from finetune.config.secrets import refuse_secrets
from finetune.errors import ConfigError, refusal

if TYPE_CHECKING:
    from omegaconf import DictConfig


PYTHON_DOCS_LIMIT = 240
"""Training rows of `python_docs` with `dataset.limit=auto`: an epoch of a few minutes on two CPU cores."""


OptimizerName = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "adafactor", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "sgd",
]  # fmt: skip


ScheduleName = Literal[
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
    "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip


MetricName = Literal["eval/loss", "eval/accuracy", "train/loss", "train/seconds", "adapter/parameters"]


DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class Section:
    """A part of the config; `section` is the path that its keys have in it."""

    section: ClassVar[str]

    def require(self, field: str, holds: bool, allowed: str) -> None:
        """Raise the refusal of a field's value unless the condition holds."""
        if not holds:
            path = f"{self.section}.{field}" if self.section else field
            raise refusal(path, getattr(self, field), allowed)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    section = "model"
    name_or_path: str
    revision: str | None
    trust_remote_code: bool
    attn_implementation: str | None
    dtype: DtypeName
    chat_template: str | None
    extra: dict[str, Any]
    # Runs that began before there was this key have a number in optimizer.learning_rate.
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        self.require("learning_rate", self.learning_rate is None or self.learning_rate > 0, "must be above 0, or null")
        self.require("name_or_path", bool(self.name_or_path), "must be a hub id, a folder, or smollm2_135m")


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings(Section):
    section = "quantization"
    load_in_4bit: bool
    load_in_8bit: bool
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_compute_dtype: DtypeName
    bnb_4bit_use_double_quant: bool

    def __post_init__(self) -> None:
        both = self.load_in_4bit and self.load_in_8bit
        self.require("load_in_8bit", not both, "load_in_4bit is true as well; a base is either 4-bit or 8-bit")


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Section):
    section = "lora"
    r: int
    alpha: float
    dropout: float
    target_modules: str | list[str]
    bias: Literal["none", "all", "lora_only"]
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str
    extra: dict[str, Any]

    def __post_init__(self) -> None:
        self.require("r", self.r >= 1, "must be a whole number of at least 1")
        self.require("alpha", self.alpha > 0, "must be above 0")
        self.require("dropout", 0 <= self.dropout < 1, "must be at least 0 and below 1")
        self.require("target_modules", bool(self.target_modules), "must be all-linear or a list of module names")

    @property
    def leaves_base_unchanged(self) -> bool:
        """Whether training and loading the adapter leave all weights of the base as they are.

        Trained biases and initializations that split off a part of the base's weights do not; an
        argument in `extra` might not.
        """
        initial = self.init_lora_weights in (True, False, "gaussian")
        return self.bias == "none" and initial and not self.extra

    @property
    def starts_at_zero(self) -> bool:
        """Whether a new adapter changes nothing yet, because its matrix B is zero."""
        return self.leaves_base_unchanged and self.init_lora_weights is not False


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Section):
    section = "optimizer"
    name: OptimizerName
    learning_rate: float | None
    weight_decay: float
    max_grad_norm: float
    lr_scheduler_type: ScheduleName
    warmup_ratio: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float

    def __post_init__(self) -> None:
        self.require("learning_rate", self.learning_rate is None or self.learning_rate > 0, "must be above 0")
        self.require("weight_decay", self.weight_decay >= 0, "must be at least 0")
        self.require("max_grad_norm", self.max_grad_norm >= 0, "must be at least 0 (0: no clipping)")
        self.require("warmup_ratio", 0 <= self.warmup_ratio < 1, "must be a share of all steps, in [0, 1)")
        for field in ("adam_beta1", "adam_beta2"):
            self.require(field, 0 <= getattr(self, field) < 1, "must be at least 0 and below 1")
        self.require("adam_epsilon", self.adam_epsilon > 0, "must be above 0")

    @property
    def resolved_learning_rate(self) -> float:
        """The rate that a run trains with: a number once `finetune.learning_rate` has resolved a null."""
        assert self.learning_rate is not None, "a run resolves its learning rate before it trains"
        return self.learning_rate


@dataclass(frozen=True, kw_only=True)
class DatasetSettings(Section):
    section = "dataset"
    path: str
    name: str | None
    split: str
    format: Literal["auto", "text", "chat", "prompt_completion", "alpaca"]
    text_field: str
    max_length: int | None
    packing: bool
    limit: int | None
    eval_fraction: float
    eval_path: str | None
    test_fraction: float
    test_path: str | None
    split_seed: int

    def __post_init__(self) -> None:
        self.require("path", bool(self.path), "must be a hub id, a file, a folder, or python_docs")
        for field, least in (("max_length", 2), ("limit", 1)):
            value = getattr(self, field)
            self.require(field, value is None or value >= least, f"must be a whole number of at least {least}, or null")
        for field in ("eval_fraction", "test_fraction"):
            self.require(field, 0 <= getattr(self, field) < 1, "must be at least 0 and below 1 (0: no such rows)")
        together = (0 if self.eval_path else self.eval_fraction) + (0 if self.test_path else self.test_fraction)
        self.require(
            "test_fraction", together < 1, f"with eval_fraction={self.eval_fraction} leaves no rows to train on"
        )
        self.require("packing", not self.packing or self.max_length is not None, "needs dataset.max_length")

    @property
    def holds_out(self) -> bool:
        """Whether there are rows to evaluate on."""
        has_rows = self.eval_path is not None or self.eval_fraction > 0
        return has_rows or has_evaluation_files(self.path, self.test_path)


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(Section):
    section = "trainer"
    engine: Literal["auto", "packed", "trl"]
    num_train_epochs: float
    max_steps: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool | Literal["auto"]
    group_by_length: bool
    eval_steps: float | list[float]
    save_steps: float
    logging_steps: int
    early_stopping_patience: int | None
    extra: dict[str, Any]

    def __post_init__(self) -> None:
        self.require("num_train_epochs", self.num_train_epochs > 0, "must be above 0")
        self.require("max_steps", self.max_steps >= 1 or self.max_steps == -1, "must be at least 1, or -1: by epochs")
        for field in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
        ):
            self.require(field, getattr(self, field) >= 1, "must be a whole number of at least 1")
        for field in ("eval_steps", "save_steps"):
            value = getattr(self, field)
            parts = value if isinstance(value, list) else [value]
            sound = all(part == 0 or 0.001 <= part < 1 or (part >= 1 and part == int(part)) for part in parts)
            allowed = "a whole number of steps, a share of them from 0.001 to below 1, or 0: none"
            self.require(field, sound, f"must be {allowed}{'; or a list of those' if field == 'eval_steps' else ''}")
        patience = self.early_stopping_patience
        self.require("early_stopping_patience", patience is None or patience >= 1, "must be at least 1, or null")

    @property
    def effective_batch_size(self) -> int:
        """Rows in one optimizer step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True)
class TrackerSettings(Section):
    section = "tracker"
    name: Literal["wandb", "tensorboard", "both", "none"]
    project: str | None
    entity: str | None
    mode: Literal["auto", "online", "offline", "disabled"]
    tags: list[str]
    # Runs that began before there were these keys have none written down.
    adapters: Literal["none", "best", "all"] = "none"
    workspace: bool = False


@dataclass(frozen=True, kw_only=True)
class HubSettings(Section):
    section = "hub"
    push: bool
    model_id: str | None
    private: bool


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """One run, whole: what `conf/` composed, checked once and trusted from here on."""

    section = ""
    name: str
    seed: int
    resume: str | None
    objective: MetricName | list[MetricName]
    objective_at: Literal["last", "best"]
    sample_prompts: list[str] | None
    sample_max_length: int | None
    model: ModelSettings
    quantization: QuantizationSettings
    lora: LoraSettings
    optimizer: OptimizerSettings
    dataset: DatasetSettings
    trainer: TrainerSettings
    tracker: TrackerSettings
    hub: HubSettings
    # Runs that began before there was this key are bounded by sample_max_length alone.
    sample_max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        self.require("name", is_plain_name(self.name), PLAIN_NAME)
        self.require("seed", 0 <= self.seed < 2**32, "must be a whole number from 0 to 4294967295")
        for field in ("sample_max_new_tokens", "sample_max_length"):
            bound = getattr(self, field)
            self.require(field, bound is None or bound >= 1, "must be a whole number of at least 1, or null")
        bounded = self.sample_max_new_tokens is not None or self.sample_max_length is not None
        self.require("sample_max_new_tokens", bounded, "needs sample_max_length")
        self.require("objective", bool(self.objective), "must be a metric's name, or a list of them")
        if not self.dataset.holds_out:
            needs = "needs held-out rows: dataset.eval_fraction above 0, or dataset.eval_path"
            self.require("objective_at", self.objective_at == "last", needs)
            self.trainer.require("early_stopping_patience", self.trainer.early_stopping_patience is None, needs)
        prompts = self.sample_prompts
        self.require("sample_prompts", prompts is None or all(prompts), "must be texts that are not empty, or null")
        schedule, given = self.optimizer.lr_scheduler_type, "lr_scheduler_kwargs" in self.trainer.extra
        needs_more = schedule in ("cosine_with_min_lr", "warmup_stable_decay") and not given
        self.optimizer.require("lr_scheduler_type", not needs_more, "needs trainer.extra.lr_scheduler_kwargs")
        quantized = self.quantization.load_in_4bit or self.quantization.load_in_8bit
        by_weights = str(self.lora.init_lora_weights).startswith(("pissa", "corda", "orthogonal", "loftq"))
        needs_plain = "needs the base's own weights: quantization=none"
        self.lora.require("init_lora_weights", not (quantized and by_weights), needs_plain)
        if self.objective_at == "best" or self.trainer.early_stopping_patience:
            by = "objective_at=best and early stopping need one of eval/loss, eval/accuracy"
            self.require("objective", self.objective in ("eval/loss", "eval/accuracy"), by)

    @classmethod
    def from_hydra(cls, composed: "DictConfig") -> "RunConfig":
        """Check a composed config. Raises ConfigError for the first thing wrong with it."""
        from omegaconf import OmegaConf

        # Hydra's part is no run's, and a search space is for a sweeper to read: nothing of it is resolved here.
        composed = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in ("hydra", "search")])
        for key in sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError(f"{key}: must be given, as {key}=…")
        values = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(values, dict)
        _select_rate_of_base(values)
        return cls.from_dict({str(key): value for key, value in values.items()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`, checked as from Hydra."""
        refuse_secrets(values)
        return build(cls, "", _resolve_limit(values))

    def anchored(self) -> "RunConfig":
        """The same run wherever it is looked at from: files and folders by their absolute paths."""

        def anchor(path: str | None) -> str | None:
            local = path and path != "python_docs" and Path(path).expanduser().exists()
            return str(Path(path).expanduser().absolute()) if path and local else path

        data = self.dataset
        return dataclasses.replace(
            self,
            model=dataclasses.replace(self.model, name_or_path=anchor(self.model.name_or_path) or ""),
            dataset=dataclasses.replace(
                data, path=anchor(data.path) or "", eval_path=anchor(data.eval_path), test_path=anchor(data.test_path)
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The config as nested plain values, as trackers and files take it."""
        return dataclasses.asdict(self)

    @property
    def objectives(self) -> list[str]:
        """The names of the metrics that the run returns; none without rows to measure an evaluation's on."""
        names: list[str] = [self.objective] if isinstance(self.objective, str) else list(self.objective)
        return [name for name in names if self.dataset.holds_out or not name.startswith("eval/")]


def _resolve_limit(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with `dataset.limit=auto` as a number or null: the limit depends on the path, however it is given."""
    dataset = values.get("dataset")
    if not isinstance(dataset, Mapping) or dataset.get("limit") != "auto":
        return values
    limit = PYTHON_DOCS_LIMIT if dataset.get("path") == "python_docs" else None
    return {**values, "dataset": {**dataset, "limit": limit}}


def _select_rate_of_base(values: dict[Any, Any]) -> None:
    """Of rates by the base's name take the one of the run's base: a model's YAML speaks of no other base."""
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("learning_rate"), Mapping):
        model["learning_rate"] = model["learning_rate"].get(model.get("name_or_path"))
