"""The gate of a promotion: is a study's winner better than the deployed adapter, on the same rows?

Both adapters are put on the winner's base, one after the other, and get the same prompts, so that
their difference by row is that of the adapters. The gate compares the lower end of the gain's 95 %
interval.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.config.sections.evaluation import (
    BUILT_IN,
    LOSS_METRICS,
    is_task,
)
from finetune.data.row_file import StoredRows
from finetune.data.rows import load_all_rows
from finetune.data.types import ListDigest, canonical_text
from finetune.errors import ConfigError, did_you_mean, refusal
from finetune.files.atomic import read_json
from finetune.files.find_run import find_run
from finetune.files.run_folder import RunFolder
from finetune.metrics.load import load_metrics
from finetune.metrics.metric import Metric, Score
from finetune.metrics.row_interval import MIN_EFFECTIVE_ROWS
from finetune.model.adapter_files import ADAPTER_CONFIG, WEIGHTS, weights_digest
from finetune.model.memory import free_memory
from finetune.model.packaged import PACKAGED_MODELS
from finetune.run.load import load_run, read_labels
from sweeps.answer.compare import Comparison, compare_adapters

if TYPE_CHECKING:
    from finetune.engine.evaluation import Evaluation

log = logging.getLogger(__name__)

TEST = "test/"


@dataclass(frozen=True)
class Gate:
    """What is asked of a winner."""

    data: str
    """The rows: a file, its URL, a folder, or a hub id."""
    metric: str
    """As `test/exact_match`."""
    min_gain: float
    """The lower end of the gain's interval must be above it."""

    @property
    def name(self) -> str:
        """The metric's name without `test/`."""
        return self.metric.removeprefix(TEST)


@dataclass(frozen=True)
class Verdict:
    """A winner compared with the deployed adapter."""

    rows: int
    """Those that have a value of the metric on both sides."""
    data_fingerprint: str
    """Hash of the rows."""
    winner: float
    deployed: float
    gain: float
    """By how much the winner is better: the difference in the metric's direction."""
    interval: tuple[float, float]
    """95 % confidence interval of the gain, over rows."""
    is_met: bool


@dataclass(frozen=True)
class Deployed:
    """The adapter that a winner is compared with."""

    given: str
    """As the command names it."""
    adapter: Path
    digest: str

    @property
    def name(self) -> str:
        """Its folder's name without the path, for files that others get."""
        return Path(self.given).absolute().name


def find_deployed(name: str) -> Deployed:
    """Find the deployed adapter: a run folder, or a folder of PEFT's.

    Raises:
        ConfigError: It is neither, or no LoRA adapter, or has no weights in safetensors.
    """
    folder = Path(name).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        folder = RunFolder(find_run("--against", name)).adapter
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise refusal("--against", name, f"has no adapter: {ADAPTER_CONFIG}, {WEIGHTS}")
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise refusal(
            "--against", name, f"its {ADAPTER_CONFIG} is not that of a LoRA adapter"
        )
    return Deployed(name, folder, weights_digest(folder))


def require_same_base(winner: Path, deployed: Deployed) -> None:
    """Refuse a deployed adapter of another base than the winner's.

    Args:
        winner: The winner's run folder.
        deployed: The deployed adapter.
    """
    bases = []
    for adapter in (RunFolder(winner).adapter, deployed.adapter):
        config = read_json(adapter / ADAPTER_CONFIG)
        run = read_json(RunFolder(adapter.parent).identity) or {}
        hashes = (run.get("base_model") or {}).get("sha256")
        name = config.get("base_model_name_or_path")
        # Adapters of earlier versions have a packaged model's own name.
        packaged = PACKAGED_MODELS.get(name)
        name = name if packaged is None else packaged.hub_id
        bases.append((name, config.get("revision"), hashes))
    (name, revision, sha256), (other, other_revision, other_sha256) = bases
    reason = None
    if other is None:
        reason = f"its {ADAPTER_CONFIG} names no base (base_model_name_or_path)"
    elif name != other:
        reason = f"its base is {other}, the winner's {name}"
    elif None not in (revision, other_revision) and revision != other_revision:
        reason = f"its base {name} is at {other_revision}, the winner's at {revision}"
    elif None not in (sha256, other_sha256) and sha256 != other_sha256:
        reason = f"its base {name} has other weights than the winner's"
    if reason is not None:
        raise refusal("--against", deployed.given, reason)


def find_metric(gate: Gate, config: RunConfig, folder: Path) -> list[Metric]:
    """Return what computes the gate's metric: nothing but the loss, or one metric of answers.

    Args:
        gate: The gate.
        config: The winner's config, whose metrics may be used, and the built-in ones.
        folder: The winner's run folder.

    Raises:
        ConfigError: There is no such metric, or it is of a benchmark, which has rows of its own.
    """
    row_metrics = [path for path in config.evaluation.metrics if not is_task(path)]
    if gate.metric.startswith(TEST):
        if gate.name in LOSS_METRICS:
            return []
        if is_task(gate.name):
            reason = "is of the benchmark's documents, not of the rows of --data"
            raise refusal("--metric", gate.metric, reason)
        for path in dict.fromkeys([*row_metrics, *BUILT_IN]):
            # Before it is loaded: one of a package that is missing may be another one.
            if path in BUILT_IN and gate.name not in BUILT_IN[path]:
                continue
            settings = dataclasses.replace(config.evaluation, metrics=[path])
            metrics = load_metrics(settings)
            if any(gate.name in metric.names for metric in metrics):
                _require_labels(gate, metrics, folder)
                return metrics
    settings = dataclasses.replace(config.evaluation, metrics=row_metrics)
    names = [*LOSS_METRICS, *settings.names]
    for built_in in BUILT_IN.values():
        names += built_in
    allowed = did_you_mean(gate.metric, {f"{TEST}{name}" for name in names})
    raise refusal("--metric", gate.metric, allowed)


def _require_labels(gate: Gate, metrics: Sequence[Metric], folder: Path) -> None:
    needs_labels = any(metric.reads_labels for metric in metrics)
    if needs_labels and read_labels(RunFolder(folder)) is None:
        reason = "needs a study with evaluation=classification, which has the labels"
        raise refusal("--metric", gate.metric, reason)


def read_rows(gate: Gate, config: RunConfig) -> StoredRows:
    """Read the gate's rows as the winner's run reads its rows.

    Raises:
        ConfigError: They can't be read, or are too few.
    """
    rows = load_all_rows("--data", config.dataset.of_other("--data", gate.data))
    if len(rows) < MIN_EFFECTIVE_ROWS:
        raise _too_few_rows(gate)
    return rows


def _too_few_rows(gate: Gate) -> ConfigError:
    reason = f"too few rows: an interval needs {MIN_EFFECTIVE_ROWS} of similar length"
    return refusal("--data", gate.data, reason)


def pass_gate(
    gate: Gate,
    winner: Path,
    config: RunConfig,
    rows: StoredRows,
    metrics: Sequence[Metric],
    deployed: Deployed,
) -> Verdict:
    """Evaluate both adapters on the gate's rows, and compare them.

    Args:
        gate: The gate.
        winner: The winner's run folder.
        config: The winner's config.
        rows: As `read_rows` returns them.
        metrics: As `find_metric` returns them.
        deployed: The adapter to compare with.

    Raises:
        ConfigError: The rows are too few, or the metric is no mean over rows.
    """
    settings = config.dataset.of_other("--data", gate.data)
    digest = ListDigest()
    digest.begin_list()
    for row in rows:
        digest.update(canonical_text(row))

    # Imports torch, so only after all that is refused without it.
    from finetune.model.adapter import attach_adapter
    from finetune.run.other_rows import evaluator

    evaluations: list[Evaluation] = []
    for name, adapter in (
        ("the winner", RunFolder(winner).adapter),
        ("the deployed adapter", deployed.adapter),
    ):
        # Loaded for each: attaching an adapter may change its base (PiSSA).
        run = load_run(winner)
        evaluate = evaluator(run, rows, settings, metrics)
        model = attach_adapter(run.base, adapter)
        model.eval()
        log.info("evaluating %s", name)
        evaluations.append(evaluate(model).evaluation)
        del run, evaluate, model
        free_memory()
    ours, theirs = evaluations
    score, other_score = ours.score(gate.name), theirs.score(gate.name)
    if score is None or other_score is None:
        raise refusal("--metric", gate.metric, "has no value on these rows")
    for value in (score.value, other_score.value):
        if not math.isfinite(value):
            raise refusal("--metric", gate.metric, "is not a number on these rows")
    comparison = compare_adapters(ours, theirs, gate.name)
    gain, interval = _gain(gate, comparison, score.higher_is_better)
    return Verdict(
        rows=_common_rows(score, other_score),
        data_fingerprint=digest.fingerprint,
        winner=score.value,
        deployed=other_score.value,
        gain=gain,
        interval=interval,
        is_met=interval[0] > gate.min_gain,
    )


def _common_rows(ours: Score, theirs: Score) -> int:
    """Count the rows that have a value on both sides."""
    counts = zip(ours.row_counts, theirs.row_counts, strict=True)
    return sum(min(pair) > 0 for pair in counts)


def _gain(
    gate: Gate, comparison: Comparison, higher_is_better: bool
) -> tuple[float, tuple[float, float]]:
    """Return a comparison's difference and interval so that more is better."""
    low, high = comparison.low, comparison.high
    if low is None or high is None:
        if comparison.verdict == "too few rows to say":
            raise _too_few_rows(gate)
        reason = "is one number for all rows, without the interval that a gate needs"
        raise refusal("--metric", gate.metric, reason)
    if higher_is_better:
        return comparison.difference, (low, high)
    return -comparison.difference, (-high, -low)
