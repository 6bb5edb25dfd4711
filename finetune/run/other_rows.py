"""A run's model on rows of other data than its own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.row_file import StoredRows
from finetune.data.tokens import tokenize
from finetune.engine.loaded_model import LoadedModel
from finetune.engine.steps import drive
from finetune.metrics.labels import LabelledRows
from finetune.metrics.metric import Metric
from finetune.run.evaluate_rows import EvaluatedRows, evaluate_rows
from finetune.run.load import TrainedRun, read_labels

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Evaluate = Callable[["PreTrainedModel | PeftModel"], EvaluatedRows]


def evaluator(
    run: TrainedRun,
    rows: StoredRows,
    settings: DatasetSettings,
    metrics: Sequence[Metric],
) -> "Evaluate":
    """Tokenise rows as a run does, and return the function that evaluates a model on them.

    All rows get answers: `evaluation.limit` is of the run's own rows.

    Args:
        run: The run.
        rows: The rows, in the common form.
        settings: Those of `rows`, as `DatasetSettings.of_other` returns them.
        metrics: The metrics of answers.
    """
    variables = run.config.model.template_kwargs
    tokens = tokenize("test", rows, run.tokenizer, settings, variables)
    config = dataclasses.replace(run.config, dataset=settings)
    labels = read_labels(run.folder)
    labelled = None
    if labels is not None:
        labelled = LabelledRows.create(
            rows,
            labels,
            dataclasses.replace(config.evaluation, limit=None),
            run.tokenizer,
            variables,
            settings.max_length,
        )

    def evaluate(model: "PreTrainedModel | PeftModel") -> EvaluatedRows:
        loaded = LoadedModel(config, model)
        steps = evaluate_rows(
            loaded,
            tokens,
            rows,
            config,
            run.tokenizer,
            metrics,
            labelled,
            documents="all",
            limits_answers=False,
        )
        return drive(steps)

    return evaluate
