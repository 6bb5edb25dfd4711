"""Evaluate a run's adapter on other data: `python -m finetune.evaluate RUN --data FILE`.

The base is evaluated on the same rows, without the adapter.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from finetune.compat import import_model_libraries
from finetune.config.data_folder import ANY_FILE
from finetune.console import json_output, log_to_stderr, run_command
from finetune.data.rows import load_all_rows
from finetune.errors import refusal
from finetune.files.atomic import write_text
from finetune.files.find_run import find_run
from finetune.files.output_paths import output_file
from finetune.metrics.classification import confusion_lines
from finetune.metrics.load import load_metrics
from finetune.metrics.names import metric_notes
from finetune.run.load import load_run, read_run_config
from finetune.run_arguments import run_parser

if TYPE_CHECKING:
    from finetune.run.evaluate_rows import EvaluatedRows


log = logging.getLogger(__name__)

LOGGERS = (__name__, "finetune.data", "finetune.run.load")
"""Loggers whose lines the command prints: files of a folder that are read, and rows that are left
out, too."""

METRICS = ("loss", "perplexity", "accuracy")
"""Attributes of an `Evaluation`, in the order of the table."""


class EvaluationResult(TypedDict):
    """Metrics of a base alone and with its adapter, as `--json` prints them."""

    data: str
    """The path or hub id of the rows."""
    rows: int
    tokens: int
    """Tokens of the rows' answers."""
    base: dict[str, float]
    """Metrics of the base by name: loss and perplexity in nats per token, accuracy, scores."""
    adapter: dict[str, float]
    """The same with the adapter."""
    labels: NotRequired[list[str]]
    """Of a run with classification."""
    confusion: NotRequired[list[list[int]]]
    """Rows by their label and by the adapter's most likely one, in the order of `labels`."""


@dataclass(frozen=True)
class Comparison:
    """Metrics of a base alone and with its adapter, on the same rows."""

    data: str
    rows: int
    base: "EvaluatedRows"
    adapter: "EvaluatedRows"

    @property
    def names(self) -> list[str]:
        """The metrics, in the order of the table."""
        base_scores = self.base.evaluation.scores
        scores = [
            name for name in self.adapter.evaluation.scores if name in base_scores
        ]
        return [*METRICS, *scores]

    def to_dict(self) -> EvaluationResult:
        """Return the metrics as `--json` prints them."""
        content: EvaluationResult = {
            "data": self.data,
            "rows": self.rows,
            "tokens": self.adapter.evaluation.tokens,
            "base": {name: _value(self.base, name) for name in self.names},
            "adapter": {name: _value(self.adapter, name) for name in self.names},
        }
        classification = self.adapter.evaluation.classification
        if classification is not None:
            content["labels"] = list(classification.labels)
            content["confusion"] = classification.confusion()
        return content

    def answer_lines(self) -> Iterator[dict[str, Any]]:
        """Yield what the adapter answered to each prompt, with the row's answer and the scores."""
        adapter = self.adapter
        for index, answer in enumerate(adapter.answers):
            scores = {}
            for name, result in adapter.results.items():
                if isinstance(result.values, list):
                    scores[name] = result.values[index]
            line: dict[str, Any] = {
                "row": answer.row.place,
                "prompt": answer.prompt.text,
                "base": self.base.predictions[index],
                "prediction": adapter.predictions[index],
                "reference": answer.reference,
                "scores": scores,
            }
            if adapter.log_likelihoods:
                line["log_likelihoods"] = adapter.log_likelihoods[index]
            yield line


def _value(evaluated: "EvaluatedRows", name: str) -> float:
    if name in METRICS:
        value: float = getattr(evaluated.evaluation, name)
        return value
    return evaluated.evaluation.scores[name].value


def main() -> None:
    """Read the command line, evaluate base and adapter on the rows, print both."""
    arguments = _parse_arguments()
    log_to_stderr(*LOGGERS)
    folder = find_run("RUN", arguments.run)
    with json_output(arguments.json) as print_json:
        comparison = compare(folder, arguments.data, arguments.answers)
        if arguments.json:
            print_json(comparison.to_dict())
        else:
            _print_table(comparison)


def _parse_arguments() -> argparse.Namespace:
    description = "Evaluate the adapter of a run and its base on other data."
    parser = run_parser("finetune.evaluate", description, "latest --data test.jsonl")
    parser.add_argument(
        "--data",
        metavar="DATA",
        required=True,
        help=f"a {ANY_FILE}, its URL, a hub id, or a folder: its test files, or all its files if "
        "none is named test",
    )
    parser.add_argument(
        "--answers",
        metavar="FILE",
        help="write each row's prediction, reference and scores as JSON lines; of a run with "
        "evaluation.metrics",
    )
    return parser.parse_args()


def compare(folder: Path, data: str, answers_file: str | None = None) -> Comparison:
    """Evaluate a run's base without and with the adapter.

    Args:
        folder: the run folder.
        data: the path or hub id of the rows.
        answers_file: where answers are written; None: nowhere.

    Raises:
        ConfigError: a metric can't be loaded, or answers are to be written and none generated.
    """
    config = read_run_config(folder)
    metrics = load_metrics(config.evaluation)
    answers_rows = any(metric.task_metric is None for metric in metrics)
    if answers_file is not None and not answers_rows:
        reason = "the run has no evaluation.metrics of its rows' answers"
        raise refusal("--answers", answers_file, reason)
    answers_path = None
    if answers_file is not None:
        answers_path = output_file("--answers", answers_file)
    settings = config.dataset.of_other("--data", data)
    rows = load_all_rows("--data", settings)

    # Imports torch, so only after all that is refused without it.
    import_model_libraries()
    from finetune.run.other_rows import evaluator

    run = load_run(folder)
    evaluate = evaluator(run, rows, settings, metrics)
    # The base first: attaching the adapter may change it.
    log.info("evaluating the base")
    base = evaluate(run.base)
    log.info("evaluating the adapter")
    adapter = evaluate(run.with_adapter())
    comparison = Comparison(data, len(base.evaluation.row_tokens), base, adapter)
    if answers_path is not None:
        lines = map(json.dumps, comparison.answer_lines())
        write_text(answers_path, "".join(f"{line}\n" for line in lines))
    return comparison


def _print_table(comparison: Comparison) -> None:
    tokens = comparison.adapter.evaluation.tokens
    print(f"{comparison.rows} rows, {tokens} answer tokens of {comparison.data}")
    rows = [("", "base", "adapter", "change")]
    for name in comparison.names:
        base = _value(comparison.base, name)
        adapter = _value(comparison.adapter, name)
        rows.append((name, f"{base:.4f}", f"{adapter:.4f}", change_cell(base, adapter)))
    # A perplexity may have any number of digits.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        line = name.ljust(widths[0])
        for cell, width in zip(cells, widths[1:], strict=True):
            line += f"  {cell:>{width}}"
        print(line)
    print("\n".join(metric_notes(comparison.names)))
    classification = comparison.adapter.evaluation.classification
    if classification is not None:
        print("\n".join(confusion_lines(classification)))


def change_cell(base: float, adapter: float) -> str:
    """Format the relative change of a metric; "-" where there is none, as from 0."""
    if not base or not math.isfinite(adapter / base):
        return "-"
    return f"{adapter / base - 1:+.1%}"


if __name__ == "__main__":
    run_command(main)
