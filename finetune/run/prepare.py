"""The first stage of a run: everything that is checked and computed before the base is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.data.rows import Rows
from finetune.data.token_file import Tokens
from finetune.engine.optimizer_check import check_optimizer, check_schedule
from finetune.engine.schedule import total_steps
from finetune.engine.selection import choose_engine
from finetune.errors import refusal
from finetune.metrics.answers import answers_of
from finetune.metrics.labels import LabelledRows, Labels
from finetune.metrics.load import load_metrics
from finetune.metrics.metric import Metric
from finetune.model.base_config import read_base_config
from finetune.model.lora_config import lora_config
from finetune.run.context import RunContext
from finetune.run.harness_prompts import check_tasks
from finetune.run.memory_plan import resolve_checkpointing
from finetune.run.sizes import check_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """What a run trains with, and what it trains and is evaluated on."""

    config: RunConfig
    """The config with every `auto` decided."""
    engine: str
    """packed or trl."""
    rows: Rows
    tokenizer: "PreTrainedTokenizerBase"
    train: Tokens
    """Tokenised training rows: `input_ids` and `labels`."""
    held_out: Tokens
    """Tokenised rows for the evaluations during training; may be empty."""
    test: Tokens
    """Tokenised test rows; may be empty."""
    total_steps: int
    """Optimizer steps of the whole run."""
    metrics: list[Metric]
    """Metrics of answers."""
    labels: Labels | None
    """The labels of the training rows; None without the metric `classification`."""
    labelled_held_out: LabelledRows | None
    labelled_test: LabelledRows | None

    @property
    def left_out(self) -> dict[str, int]:
        """Rows without an answer's token within `dataset.max_length`, by split."""
        return {
            "train": self.train.report.left_out.total(),
            "eval": self.held_out.report.left_out.total(),
            "test": self.test.report.left_out.total(),
        }


def prepare(config: RunConfig, rows: Rows, context: RunContext) -> Prepared:
    """Tokenise the rows, choose the engine, and check all that needs no weights of the base.

    Args:
        config: The run's config, its learning rate a number.
        rows: The rows of `config.dataset`.
        context: Shares tokenizer and tokens with other runs.

    Raises:
        ConfigError: A target module does not exist, rows have tokens or positions that the base
            does not have, an argument of LoRA or of TRL is unknown, the engine that
            was asked for does not support the config, no row has an answer within `max_length`,
            rows without answers are to be scored, their answers are no labels, or a task of
            lm-evaluation-harness does not suit the base.
    """
    resources = context.resources
    source = resources.source(config.model)
    tokenizer = resources.tokenizer(config.model)
    resources.check_targets(config)
    lora_config(config.lora)  # raises for unknown arguments
    check_optimizer(config)
    engine = choose_engine(config, source)
    config = resolve_checkpointing(
        config, engine, resources, context.checkpointed_bases
    )
    train = resources.tokens("train", rows.train, config)
    held_out = resources.tokens("eval", rows.evaluation, config)
    test = resources.tokens("test", rows.test, config)
    check_sizes(
        config,
        source,
        tokenizer,
        {"train": train, "eval": held_out, "test": test},
    )
    if config.evaluation.has_tasks:
        check_tasks(config, tokenizer, read_base_config(source, config.model))
    steps = total_steps(config, train.lengths)
    check_schedule(config, steps)
    if engine == "trl":
        _check_trl_arguments(config, steps)
    metrics = load_metrics(config.evaluation)
    if any(metric.task_metric is None for metric in metrics):
        _require_answers(config, rows)
    labels = None
    if any(metric.reads_labels for metric in metrics):
        labels = resources.labels(rows.train, config)
    return Prepared(
        config,
        engine,
        rows,
        tokenizer,
        train,
        held_out,
        test,
        steps,
        metrics,
        labels,
        resources.labelled_rows("eval", rows.evaluation, labels, config),
        resources.labelled_rows("test", rows.test, labels, config),
    )


def _check_trl_arguments(config: RunConfig, steps: int) -> None:
    """Raise ConfigError where `trainer.extra` has arguments that TRL does not accept."""
    # Imported late: a packed run does not need TRL.
    from finetune.engine.trl.arguments import training_arguments

    training_arguments(config, Path("checkpoints"), steps)


def _require_answers(config: RunConfig, rows: Rows) -> None:
    """Refuse metrics of answers where held-out rows, or test rows, have no answer."""
    for split, part in (("held-out", rows.evaluation), ("test", rows.test)):
        if len(part) and not answers_of(part, config.evaluation):
            reason = (
                f"needs prompts with answers, which the {split} rows do not have "
                f"(format {', '.join(part.format_names)})"
            )
            paths = ",".join(config.evaluation.metrics)
            raise refusal("evaluation.metrics", f"[{paths}]", reason)
