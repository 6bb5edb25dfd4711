"""The third stage of a run: final metrics, test rows, sample prompts.

The test rows of a study's trials are evaluated at the study's end, in `final_evaluation`.
"""

import logging

from finetune.engine.checkpoint import Progress
from finetune.engine.steps import RunSteps
from finetune.files.run_folder import Metrics, RunFolder
from finetune.run.context import RunContext
from finetune.run.evaluate_rows import evaluate_rows
from finetune.run.prepare import Prepared
from finetune.run.recorded_evaluation import write_test_evaluation
from finetune.run.train import Training, constant_metrics, sample_prompts
from finetune.tracking.tracker import Tracker

log = logging.getLogger(__name__)


def conclude(
    prepared: Prepared,
    training: Training,
    progress: Progress,
    folder: RunFolder,
    tracker: Tracker,
    context: RunContext,
) -> RunSteps[Metrics]:
    """Evaluate the test rows, and answer the sample prompts.

    A pruned run only counts its adapter's weights.

    Returns:
        The metrics that no evaluation during training has: `adapter/parameters`, `test/…`.
    """
    metrics = constant_metrics(training)
    if progress.stop == "pruned":
        return metrics
    if context.evaluate_test_rows and prepared.test:
        if context.interactive:
            log.info("evaluating %d test rows", len(prepared.test))
        metrics |= yield from evaluate_test_rows(prepared, training, folder)
    if context.interactive:
        samples = sample_prompts(prepared, training, folder, context)
        if samples.asked:
            log.info("answering %d sample prompts after training", samples.asked)
        yield from samples.after(tracker, progress.step)
    return metrics


def evaluate_test_rows(
    prepared: Prepared, training: Training, folder: RunFolder
) -> RunSteps[Metrics]:
    """Evaluate the adapter on the test rows, and write each row's loss to `test_rows.json`.

    The same for a run of a study, once every choice is made, is `final_evaluation`.
    """
    evaluated = yield from evaluate_rows(
        training,
        prepared.test,
        prepared.rows.test,
        prepared.config,
        prepared.tokenizer,
        prepared.metrics,
        prepared.labelled_test,
        documents="test",
    )
    write_test_evaluation(folder, evaluated.evaluation)
    return evaluated.evaluation.metrics("test")
