"""The final evaluation of a finished run of a study: its test rows and its sample prompts.

The trials of a study don't see the test rows while they train. When every choice is made, the study
evaluates its winner and its baseline on them. A run alone evaluates its test rows in `conclude`.
"""

import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from finetune.config.schema import RunConfig
from finetune.data.token_file import Tokens
from finetune.engine.evaluation import Evaluation
from finetune.engine.loaded_model import LoadedModel
from finetune.engine.packed.training import PackedTraining
from finetune.engine.steps import drive
from finetune.files.atomic import read_json, read_json_list, write_json
from finetune.files.run_folder import RunFolder
from finetune.metrics.load import load_metrics
from finetune.model.adapter import load_adapter
from finetune.run.evaluate_rows import evaluate_rows
from finetune.run.load import read_labels, read_run_config
from finetune.run.recorded_evaluation import read_test_evaluation, write_test_evaluation
from finetune.run.resources import SharedResources
from finetune.run.samples import Samples, survive_samples
from finetune.tracking.tracker import Tracker

log = logging.getLogger(__name__)


def evaluate_finished_run(
    path: str | Path, resources: SharedResources, answer_prompts: bool
) -> Evaluation | None:
    """Evaluate a completed run's adapter on its test rows, and answer its sample prompts if wanted.

    What was done before is not done again. Afterwards the run's files hold what they would hold if
    the run had been alone.

    Args:
        path: The run folder.
        resources: Hold the base.
        answer_prompts: Whether to answer the sample prompts, before and after.

    Returns:
        The evaluation; None without test rows.
    """
    config = read_run_config(path)
    folder = RunFolder(path)
    rows = resources.rows(config.dataset)
    test = resources.tokens("test", rows.test, config)
    evaluation = read_test_evaluation(folder)
    needs_evaluation = bool(test) and evaluation is None
    needs_answers = answer_prompts and _lacks_answers(config, folder)
    if needs_evaluation or needs_answers:
        errors: AbstractContextManager[None] = contextlib.nullcontext()
        # Where only samples are missing, no error may end the study.
        if not needs_evaluation:
            errors = survive_samples("after training")
        with (
            errors,
            _open_adapter(config, folder, resources, test) as opened,
        ):
            samples = Samples(config, folder, rows, opened, resources)
            # The base's answers come first: the adapter is still fresh, and changes nothing.
            if needs_answers and samples.unasked:
                log.info("answering %d sample prompts with the base", samples.unasked)
                drive(samples.before())
            load_adapter(opened.model, folder.adapter)
            if needs_evaluation:
                metrics = load_metrics(config.evaluation)
                labels = read_labels(folder)
                steps = evaluate_rows(
                    opened,
                    test,
                    rows.test,
                    config,
                    resources.tokenizer(config.model),
                    metrics,
                    resources.labelled_rows("test", rows.test, labels, config),
                    documents="test",
                )
                evaluation = drive(steps).evaluation
                write_test_evaluation(folder, evaluation)
            if needs_answers and samples.asked:
                log.info("answering %d sample prompts with the adapter", samples.asked)
                drive(samples.after(Tracker(), 0))
    _record(evaluation, folder)
    return evaluation


def _lacks_answers(config: RunConfig, folder: RunFolder) -> bool:
    """Whether sample prompts are left to be answered."""
    if config.sample_prompts == []:
        return False
    samples = read_json_list(folder.samples)
    return not samples or any("after" not in sample for sample in samples)


def _record(evaluation: Evaluation | None, folder: RunFolder) -> None:
    """Add the test metrics to the run's `result.json` and `metrics.jsonl`."""
    result = read_json(folder.result)
    if evaluation is None or "test/loss" in result["metrics"]:
        return
    metrics = evaluation.metrics("test")
    result["metrics"] |= metrics
    folder.log(result["step"], metrics)
    # Last, because its `test/loss` says that the metrics are written.
    write_json(folder.result, result)


@contextlib.contextmanager
def _open_adapter(
    config: RunConfig,
    folder: RunFolder,
    resources: SharedResources,
    test: Tokens,
) -> "Iterator[PackedTraining | LoadedModel]":
    """Put a fresh adapter on the base, by the engine that trained the run.

    The other engine's losses would differ in their last digits.
    """
    if read_json(folder.result)["engine"] == "packed":
        with resources.slot(config) as create_slot:
            training = PackedTraining(
                config,
                create_slot(),
                test,
                1,
            )
            yield training
    else:
        with resources.model(config) as model:
            yield LoadedModel(config, model)
