"""Evaluate rows: their losses, the answers that a model generates to them, and their scores."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from finetune.config.data_folder import local_path
from finetune.config.schema import RunConfig
from finetune.config.sections.evaluation import BITS_PER_BYTE
from finetune.data.token_file import Tokens
from finetune.data.types import Row
from finetune.engine.encoded_prompts import Sampling
from finetune.engine.evaluation import Evaluation
from finetune.engine.steps import RunSteps
from finetune.metrics.answers import answers_of
from finetune.metrics.bits_per_byte import bits_per_byte
from finetune.metrics.classification import UNSCORED, Classification
from finetune.metrics.labels import LabelledRows
from finetune.metrics.metric import Answer, Metric, Score
from finetune.metrics.scores import Result, score_answers, scores_by_source
from finetune.run.background import POLL_SECONDS, start_thread
from finetune.run.evaluated_model import EvaluatedModel
from finetune.run.harness import evaluate_tasks
from finetune.run.harness_prompts import Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvaluatedRows:
    """An evaluation, and the answers that were generated for it."""

    evaluation: Evaluation
    answers: list[Answer] = field(default_factory=list)
    predictions: list[str] = field(default_factory=list)
    """The generated answers; where nothing is generated, the most likely labels."""
    results: Mapping[str, Result] = field(default_factory=dict)
    """The scores of the answers by name."""
    log_likelihoods: list[Mapping[str, float] | None] = field(default_factory=list)
    """Of each answer's labels, in nats; None: the row is not classified."""


def evaluate_rows(
    model: EvaluatedModel,
    tokens: Tokens,
    rows: Sequence[Row],
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    metrics: Sequence[Metric],
    labelled: LabelledRows | None = None,
    documents: Documents = "eval",
    limits_answers: bool = True,
) -> RunSteps[EvaluatedRows]:
    """Evaluate rows.

    Args:
        model: The model.
        tokens: The rows, tokenised.
        rows: The rows in the common form.
        config: The run's config.
        tokenizer: The base's tokenizer.
        metrics: The metrics of answers; without any, nothing is generated.
        labelled: The same rows with their labels, for the metric `classification`.
        documents: Which documents of a task of lm-evaluation-harness are evaluated.
        limits_answers: Whether only the first `evaluation.limit` rows get answers.

    Returns:
        The evaluation; its scores are those of `metrics`, and of each source where there are
        several.

    Raises:
        ConfigError: A metric failed; the message names its row.
    """
    evaluation = yield from model.evaluate(tokens)
    sources = _sources(config, rows)
    scores = _losses_by_source(evaluation, tokens, rows, sources)
    if f"eval/{BITS_PER_BYTE}" in config.objectives:
        scores[BITS_PER_BYTE] = bits_per_byte(evaluation.row_losses, tokens, tokenizer)
    task_metrics = [metric for metric in metrics if metric.task_metric is not None]
    scores |= yield from evaluate_tasks(
        model, task_metrics, config, tokenizer, documents
    )
    if len(task_metrics) == len(metrics):
        return EvaluatedRows(replace(evaluation, scores=scores))
    settings = config.evaluation
    if not limits_answers:
        settings = replace(settings, limit=None)
    answers = answers_of(rows, settings)
    evaluated = EvaluatedRows(evaluation, answers)
    label_metrics = [metric for metric in metrics if metric.reads_labels]
    if label_metrics:
        assert labelled is not None
        evaluated = yield from _classify(model, evaluated, labelled)
        results = score_answers(label_metrics, answers, evaluated.predictions)
        scores |= scores_by_source(results, answers, evaluated.predictions, sources)
        evaluated = replace(evaluated, results=results)
    generated_metrics = [metric for metric in metrics if metric.is_generated]
    if generated_metrics:
        prompts = [answer.prompt for answer in answers]
        predictions = yield from model.generate_answers(
            prompts,
            tokenizer,
            max_new_tokens=settings.max_new_tokens,
            sampling=_sampling(config),
        )
        results, answer_scores = yield from _score(
            generated_metrics, answers, predictions, sources
        )
        scores |= answer_scores
        results = {**evaluated.results, **results}
        evaluated = replace(evaluated, predictions=predictions, results=results)
    evaluation = replace(evaluated.evaluation, scores=scores)
    return replace(evaluated, evaluation=evaluation)


def _score(
    metrics: Sequence[Metric],
    answers: list[Answer],
    predictions: list[str],
    sources: Mapping[str, str],
) -> RunSteps[tuple[dict[str, Result], dict[str, Score]]]:
    """Score answers, all and by source, in a thread beside the other runs' training."""

    def score() -> tuple[dict[str, Result], dict[str, Score]]:
        results = score_answers(metrics, answers, predictions)
        return results, scores_by_source(results, answers, predictions, sources)

    # A function of the user's may take long, or wait for a service.
    future = start_thread(score)
    while not future.done():
        wait([future], timeout=POLL_SECONDS)
        yield None
    return future.result()


def _classify(
    model: EvaluatedModel, evaluated: EvaluatedRows, labelled: LabelledRows
) -> RunSteps[EvaluatedRows]:
    """Compute each label's likelihood as the answer; the most likely one is the prediction."""
    labels = list(labelled.labels)
    candidates = labelled.candidates
    losses = yield from model.evaluate(candidates, len(labels))
    likelihoods: list[Mapping[str, float] | None] = [None] * len(labelled.answers)
    predictions = [UNSCORED] * len(labelled.answers)
    numbers: list[int | None] = [None] * len(labelled.answers)
    for position, answer in enumerate(candidates.answers):
        first = position * len(labels)
        row_losses = losses.row_losses[first : first + len(labels)]
        # Of labels that are as likely, the first in alphabetical order.
        best = row_losses.index(min(row_losses))
        numbers[answer] = best
        predictions[answer] = labels[best]
        likelihoods[answer] = dict(
            zip(labels, (-loss for loss in row_losses), strict=True)
        )
    references = [labels.index(answer.reference) for answer in labelled.answers]
    classification = Classification(tuple(labels), tuple(references), tuple(numbers))
    return replace(
        evaluated,
        evaluation=replace(evaluated.evaluation, classification=classification),
        predictions=predictions,
        log_likelihoods=likelihoods,
    )


def _sampling(config: RunConfig) -> Sampling | None:
    """Return how answers are drawn: alike in all trials of a study, whatever their seeds."""
    settings = config.evaluation
    if settings.temperature == 0:
        return None
    seed = config.dataset.split_seed
    return Sampling(settings.temperature, settings.top_p, seed)


def _sources(config: RunConfig, rows: Sequence[Row]) -> dict[str, str]:
    """Return the name of the source of each file that rows come from.

    Empty with a single source, and for rows that `dataset.eval_path` or `test_path` names.
    """
    names = config.dataset.source_names
    if not names:
        return {}
    sources: dict[str, str] = {}
    for row in rows:
        if row.source in sources:
            continue
        for path, name in names.items():
            if row.source == path or _is_in(row.source, path):
                sources[row.source] = name
    return sources


def _is_in(file: str, folder: str) -> bool:
    """Whether a file of a folder is named by its path."""
    return file.startswith(os.path.join(local_path(folder), ""))


def _losses_by_source(
    evaluation: Evaluation,
    tokens: Tokens,
    rows: Sequence[Row],
    sources: Mapping[str, str],
) -> dict[str, Score]:
    """The loss and the accuracy of each source's rows; none of packed sequences of rows."""
    if not sources or not tokens or "seq_lengths" in tokens[0]:
        return {}
    numbers: dict[str, list[int]] = {}
    for number, position in enumerate(tokens.row_positions):
        name = sources.get(rows[position].source)
        if name is not None:
            numbers.setdefault(name, []).append(number)
    scores = {}
    for name, chosen in numbers.items():
        of_source = Evaluation(
            tuple(evaluation.row_losses[number] for number in chosen),
            tuple(evaluation.row_tokens[number] for number in chosen),
            tuple(evaluation.row_correct[number] for number in chosen),
        )
        for metric in ("loss", "accuracy"):
            score = of_source.score(metric)
            assert score is not None
            scores[f"{name}/{metric}"] = score
    return scores
