"""The config of a run: a composed Hydra config becomes one frozen, typed, checked `RunConfig`.

Past this conversion no DictConfig exists. Every refusal is a `ConfigError` of one line that names
the key, the value and what is allowed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from finetune.config.command_secrets import command_words, refuse_secrets_in_command
from finetune.config.convert import build
from finetune.config.mirror_address import refuse_secrets_in_mirror
from finetune.config.paths import PLAIN_NAME, is_plain_name
from finetune.config.plain_values import (
    expand_task_objectives,
    pick_learning_rate,
    resolve_eval_steps,
    resolve_limit,
    simplify_sources,
)
from finetune.config.secrets import refuse_secrets
from finetune.config.sections.dataset import DatasetSettings, SourceSettings
from finetune.config.sections.evaluation import (
    BITS_PER_BYTE,
    HARNESS,
    LOSS_METRICS,
    EvaluationSettings,
    is_task,
)
from finetune.config.sections.lora import LoraSettings
from finetune.config.sections.model import ModelSettings, QuantizationSettings
from finetune.config.sections.notify import NotifySettings
from finetune.config.sections.optimizer import OptimizerSettings
from finetune.config.sections.section import Section
from finetune.config.sections.tracker import HubSettings, TrackerSettings
from finetune.config.sections.trainer import TrainerSettings
from finetune.errors import ConfigError, did_you_mean, refusal

if TYPE_CHECKING:
    from omegaconf import DictConfig


FINAL_METRICS = ("train/loss", "train/seconds", "adapter/parameters")
"""Metrics that a run has at its end, not at each evaluation."""

CONSTANT_METRICS = ("adapter/parameters",)
"""Those of them that do not change while the run trains: they are known before its first step."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """The whole config of one run."""

    section = ""

    name: str
    """Name of the run folder, the tracker's run and the adapter: letters, digits, `.`, `_`, `-`."""

    seed: int
    """Seed of the adapter's initialization, dropout and data order."""

    resume: str | None
    """A run folder, on the command line only: continue that run from its last checkpoint, with its
    own config."""

    objective: str | list[str]
    """The metric that a run returns to a sweeper, or a list of them: eval/loss, eval/accuracy (of
    answer tokens, given the right beginning), eval/bits_per_byte (the loss by the bytes of the
    answers, which compares bases), eval/NAME of `evaluation.metrics`, train/loss, train/seconds,
    adapter/parameters. With several sources also eval/SOURCE/NAME. harness/TASK stands for
    eval/harness/TASK, and adds the task to `evaluation.metrics`."""

    objective_at: Literal["last", "best"]
    """The evaluation whose metrics count; best: also keeps the adapter of the best checkpoint."""

    sample_prompts: list[str] | None
    """Prompts answered before and after training; null: the first two held-out prompts."""

    sample_max_length: int | None
    """Limit of a sample prompt and its answer together, in tokens; null: none."""

    model: ModelSettings
    quantization: QuantizationSettings
    lora: LoraSettings
    optimizer: OptimizerSettings
    dataset: DatasetSettings
    trainer: TrainerSettings
    tracker: TrackerSettings
    hub: HubSettings

    sample_max_new_tokens: int | None = None
    """Limit of an answer to a sample prompt, in tokens; null: only `sample_max_length`."""
    # These defaults are for run folders that were written before the keys existed.

    mirror: str | None = None
    """A folder, or an address of fsspec (s3://, gs://, …), to which finished files of runs and
    studies are copied; a resumed one fetches from it what is missing here. null: none."""

    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    notify: NotifySettings = field(default_factory=NotifySettings)

    def __post_init__(self) -> None:
        self.require("name", is_plain_name(self.name), PLAIN_NAME)
        # `numpy.random.seed`, which transformers calls, takes no larger number.
        allowed = "must be a whole number from 0 to 4294967295"
        self.require("seed", 0 <= self.seed < 2**32, allowed)
        if self.mirror is not None:
            refuse_secrets_in_mirror(self.mirror)
        self._check_sample_limits()
        allowed = "must be a metric's name, or a list of them"
        self.require("objective", bool(self.objective), allowed)
        self._check_objectives()
        self._require_held_out_rows()
        prompts = self.sample_prompts
        allowed = "must be texts that are not empty, or null"
        self.require("sample_prompts", prompts is None or all(prompts), allowed)
        self._require_schedule_arguments()
        self._require_unquantized_base()
        self._require_one_eval_objective()

    def _check_objectives(self) -> None:
        allowed = self.allowed_objectives(self.evaluation.names)
        names = self._objective_names
        if len(set(names)) < len(names):
            raise refusal("objective", names, "must be different metrics")
        for name in names:
            # A function's scores are known once it is imported: `finetune.metrics.load`.
            if self.evaluation.has_functions and name.startswith("eval/"):
                continue
            # So are the further metrics of a task.
            if self.evaluation.has_tasks and name.startswith(f"eval/{HARNESS}"):
                continue
            if name not in allowed:
                raise refusal("objective", name, did_you_mean(name, allowed))

    def allowed_objectives(self, scores: Sequence[str]) -> list[str]:
        """Return the names of all metrics that can be an objective.

        Args:
            scores: The names of the scores of generated answers.
        """
        names = [f"eval/{name}" for name in (*LOSS_METRICS, *scores)]
        # The documents of a task belong to no source.
        of_rows = [name for name in scores if not is_task(name)]
        for source in self.dataset.source_names.values():
            names += [f"eval/{source}/{name}" for name in (*LOSS_METRICS, *of_rows)]
        return [*names, f"eval/{BITS_PER_BYTE}", *FINAL_METRICS]

    def _check_sample_limits(self) -> None:
        allowed = "must be a whole number of at least 1, or null"
        has_limit = False
        for key in ("sample_max_new_tokens", "sample_max_length"):
            limit = getattr(self, key)
            self.require(key, limit is None or limit >= 1, allowed)
            has_limit = has_limit or limit is not None
        # Without a limit, an answer that never ends would keep the run from its end.
        self.require("sample_max_new_tokens", has_limit, "needs sample_max_length")

    def _require_held_out_rows(self) -> None:
        if self.dataset.holds_out:
            return
        reason = (
            "needs held-out rows: dataset.eval_fraction above 0, or dataset.eval_path"
        )
        self.require("objective_at", self.objective_at == "last", reason)
        stops_early = self.trainer.early_stopping_patience is not None
        self.trainer.require("early_stopping_patience", not stops_early, reason)

    def _require_schedule_arguments(self) -> None:
        needs_arguments = ("cosine_with_min_lr", "warmup_stable_decay")
        if self.optimizer.lr_scheduler_type in needs_arguments:
            has_arguments = "lr_scheduler_kwargs" in self.trainer.extra
            reason = "needs trainer.extra.lr_scheduler_kwargs"
            self.optimizer.require("lr_scheduler_type", has_arguments, reason)

    def _require_unquantized_base(self) -> None:
        impossible = self.quantization.is_quantized and self.lora.is_computed_from_base
        reason = "needs the base's own weights: quantization=none"
        self.lora.require("init_lora_weights", not impossible, reason)

    def _require_one_eval_objective(self) -> None:
        if self.objective_at == "best" or self.trainer.early_stopping_patience:
            names = [f"eval/{name}" for name in (*LOSS_METRICS, *self.evaluation.names)]
            reason = (
                f"objective_at=best and early stopping need one of {', '.join(names)}"
            )
            objective = self.objective
            is_evaluated = isinstance(objective, str) and objective.startswith("eval/")
            self.require("objective", is_evaluated, reason)

    @classmethod
    def from_hydra(cls, composed: "DictConfig") -> "RunConfig":
        """Check a composed config. Raises ConfigError for the first value that is not allowed."""
        from omegaconf import OmegaConf

        # Hydra's own keys and the search space are not part of a run: they are not resolved here.
        keys = [str(key) for key in composed if key not in ("hydra", "search")]
        composed = OmegaConf.masked_copy(composed, keys)
        # Before a reference to the environment is resolved.
        written = OmegaConf.to_container(composed, resolve=False)
        assert isinstance(written, dict)
        refuse_secrets_in_command(command_words(written.get("notify")))
        for key in sorted(OmegaConf.missing_keys(composed)):
            raise ConfigError(f"{key}: must be given, as {key}=…")
        values = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(values, dict)
        pick_learning_rate(values)
        plain = {str(key): value for key, value in values.items()}
        return cls.from_dict(plain)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Check nested plain values, as `to_dict` returns them.

        Raises:
            ConfigError: the first value that is not allowed, or a credential.
        """
        refuse_secrets(values)
        simplified = simplify_sources(values)
        expanded = expand_task_objectives(simplified)
        return build(cls, "", resolve_eval_steps(resolve_limit(expanded)))

    def with_absolute_paths(self) -> "RunConfig":
        """Return the config with absolute paths of existing files and folders."""
        model = dataclasses.replace(
            self.model, name_or_path=_absolute_path(self.model.name_or_path)
        )
        dataset = dataclasses.replace(
            self.dataset,
            path=_absolute_sources(self.dataset.path),
            eval_path=_absolute_path(self.dataset.eval_path),
            test_path=_absolute_path(self.dataset.test_path),
        )
        lora = dataclasses.replace(self.lora, adapter=_absolute_path(self.lora.adapter))
        evaluation = dataclasses.replace(
            self.evaluation, harness_path=_absolute_path(self.evaluation.harness_path)
        )
        return dataclasses.replace(
            self, model=model, lora=lora, dataset=dataset, evaluation=evaluation
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as nested plain values, for trackers and files."""
        return dataclasses.asdict(self)

    @property
    def objectives(self) -> list[str]:
        """Names of the metrics that the run returns; `eval/…` only if there are held-out rows."""
        names = self._objective_names
        if self.dataset.holds_out:
            return [*names]
        return [name for name in names if not name.startswith("eval/")]

    @property
    def _objective_names(self) -> list[str]:
        return [self.objective] if isinstance(self.objective, str) else self.objective


PathOrNone = TypeVar("PathOrNone", str, str | None)


def _absolute_path(path: PathOrNone) -> PathOrNone:
    """Return the absolute path of an existing file or folder; anything else as it is."""
    if not path or path == "python_docs":
        return path
    expanded = Path(path).expanduser()
    return str(expanded.absolute()) if expanded.exists() else path


def _absolute_sources(
    path: str | list[str | SourceSettings],
) -> str | list[str | SourceSettings]:
    """Return `dataset.path` with absolute paths of existing files and folders."""
    if isinstance(path, str):
        return _absolute_path(path)
    sources: list[str | SourceSettings] = []
    for item in path:
        if isinstance(item, str):
            sources.append(_absolute_path(item))
        else:
            absolute_path = _absolute_path(item.path)
            sources.append(dataclasses.replace(item, path=absolute_path))
    return sources
