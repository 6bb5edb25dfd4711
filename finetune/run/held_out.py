"""The evaluation of the held-out rows at a run's rungs."""

import functools
import logging
from collections.abc import Callable

from finetune.engine.checkpoint import Progress
from finetune.engine.steps import RunSteps
from finetune.files.run_folder import Metrics
from finetune.run.context import RunContext
from finetune.run.evaluate_rows import evaluate_rows
from finetune.run.evaluated_model import EvaluatedModel
from finetune.run.prepare import Prepared

log = logging.getLogger(__name__)


def held_out_evaluation(
    prepared: Prepared,
    model: EvaluatedModel,
    progress: Progress,
    context: RunContext,
) -> Callable[[bool], RunSteps[Metrics]] | None:
    """Return the function that evaluates the held-out rows, None where there are none.

    Its argument is whether answers are generated as well.
    """
    if not prepared.held_out:
        return None
    return functools.partial(_evaluate_held_out, prepared, model, progress, context)


def _evaluate_held_out(
    prepared: Prepared,
    model: EvaluatedModel,
    progress: Progress,
    context: RunContext,
    with_answers: bool,
) -> RunSteps[Metrics]:
    """Evaluate the held-out rows.

    Before the first step the adapter answers exactly as the base does: one run evaluates for all.
    """
    config = prepared.config

    def evaluate() -> RunSteps[Metrics]:
        if progress.step == 0 and context.interactive:
            log.info(
                "evaluating %d held-out rows before the first step",
                len(prepared.held_out),
            )
        evaluated = yield from evaluate_rows(
            model,
            prepared.held_out,
            prepared.rows.evaluation,
            config,
            prepared.tokenizer,
            prepared.metrics if with_answers else [],
            prepared.labelled_held_out,
        )
        return evaluated.evaluation.metrics("eval")

    if progress.step > 0 or not config.lora.starts_at_zero:
        return (yield from evaluate())
    base_metrics = context.resources.base_metrics(config, prepared.engine)
    return dict((yield from base_metrics.get(evaluate)))
