"""The second stage of a run: the engine is started on the base, and trains.

The training loops themselves are `finetune.engine.packed.training` and
`finetune.engine.trl.training`.
"""

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from finetune.engine.checkpoint import Progress
from finetune.engine.early_stopping import EarlyStopping
from finetune.engine.evaluation import packed_sequences_hold
from finetune.engine.output import RunOutput
from finetune.engine.packed.training import PackedTraining
from finetune.engine.probes import Shortcut, base_of, model_type_of
from finetune.engine.reporter import Reporter
from finetune.engine.steps import RunSteps
from finetune.errors import Interrupted, refusal
from finetune.files.mirror import Mirror
from finetune.files.run_folder import Metrics, RunFolder
from finetune.metrics.load import higher_is_better
from finetune.model.adapter import load_adapter, save_adapter
from finetune.model.memory import reset_peak_memory
from finetune.run.context import RunContext
from finetune.run.held_out import held_out_evaluation
from finetune.run.interruption import resume_command
from finetune.run.prepare import Prepared
from finetune.run.resources import SharedResources
from finetune.run.samples import Samples
from finetune.tracking.tracker import Tracker

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.engine.trl.training import TrlTraining

Training: TypeAlias = "PackedTraining | TrlTraining"

log = logging.getLogger(__name__)


def start_training(
    prepared: Prepared,
    folder: RunFolder,
    resources: SharedResources,
    stack: contextlib.ExitStack,
) -> RunSteps[Training]:
    """Load the base if it is not loaded yet, and put a fresh adapter on it.

    Args:
        prepared: The run.
        folder: Where TRL writes checkpoints.
        resources: Hold the base.
        stack: Gives the slot, or the whole base, back when it is closed.

    Returns:
        The run's engine, ready to train.

    Raises:
        ConfigError: The base computes other losses for packed sequences, or in a packed batch.
    """
    config = prepared.config
    reset_peak_memory()
    if prepared.engine == "packed":
        create_slot = stack.enter_context(resources.slot(config))
        yield None  # the other runs train a step while the adapter is initialised
        return PackedTraining(
            config,
            create_slot(),
            prepared.train,
            prepared.total_steps,
        )
    from finetune.engine.trl.arguments import training_arguments
    from finetune.engine.trl.training import TrlTraining

    arguments = training_arguments(config, folder.checkpoints, prepared.total_steps)
    model = stack.enter_context(resources.model(config))
    if config.dataset.packing:
        _require_separate_rows(model, prepared)
    return TrlTraining(config, arguments, model, prepared.tokenizer, prepared.train)


def _require_separate_rows(model: "PeftModel", prepared: Prepared) -> None:
    """Refuse packed sequences on a base whose attention or recurrence ignores their boundaries.

    Raises:
        ConfigError: The rows of a sequence would see each other.
    """
    config = prepared.config
    longest = max(prepared.train.lengths)
    if packed_sequences_hold(model, longest, config.quantization):
        return
    reason = f"{Shortcut.PACKED_SEQUENCES.value} with this base ({model_type_of(base_of(model))})"
    raise refusal("dataset.packing", True, f"{reason}; allowed: false")


def train(
    prepared: Prepared,
    training: Training,
    progress: Progress,
    folder: RunFolder,
    tracker: Tracker,
    context: RunContext,
) -> RunSteps[None]:
    """Train from the last checkpoint to the last step, or until the run is stopped.

    Afterwards the model has the adapter that the run ends with, and the folder has it too, unless
    the run is pruned and its context saves no adapter then.

    Raises:
        Interrupted: The user interrupted the run; a checkpoint is written.
        Diverged: A loss is NaN or infinite.
    """
    config = prepared.config
    checkpoint = folder.last_checkpoint()
    folder.rewind(
        progress.step if checkpoint else -1
    )  # -1: the metrics of step 0 go too
    if context.interactive:
        yield from _answer_before_training(
            sample_prompts(prepared, training, folder, context)
        )
    reporter = _create_reporter(prepared, training, progress, folder, tracker, context)
    steps = prepared.total_steps
    batch_size = config.trainer.effective_batch_size
    log.info(
        "training on %d rows: %d steps of %d",
        len(prepared.train),
        steps,
        batch_size,
    )
    if config.trainer.max_minutes is not None:
        log.info("training for at most %g minutes", config.trainer.max_minutes)
    if checkpoint:
        log.info("resuming after step %d", progress.step)
    yield from training.train(reporter, folder, checkpoint)
    if progress.stop == "interrupted":
        command = resume_command(folder)
        raise Interrupted(
            f"interrupted after step {progress.step}; {command} resumes it"
        )
    if progress.stop == "pruned" and not context.saves_pruned_adapter:
        return
    if config.objective_at == "best":
        load_adapter(training.model, folder.best(progress.best_step))
    _save(training, prepared, folder.adapter)


def _answer_before_training(samples: Samples) -> RunSteps[None]:
    if samples.unasked:
        # On a CPU this takes a minute in which nothing else is shown.
        log.info("answering %d sample prompts before training", samples.unasked)
    yield from samples.before()


def _create_reporter(
    prepared: Prepared,
    training: Training,
    progress: Progress,
    folder: RunFolder,
    tracker: Tracker,
    context: RunContext,
) -> Reporter:
    """Create what logs, evaluates and stops the run while it trains."""
    config = prepared.config
    total = prepared.total_steps

    def save_best(step: int) -> None:
        _save(training, prepared, folder.best(step))

    return Reporter(
        config=config,
        progress=progress,
        total=total,
        output=RunOutput(folder, tracker, total, context.interactive),
        evaluate=held_out_evaluation(prepared, training, progress, context),
        early_stopping=EarlyStopping(
            config,
            progress,
            total,
            save_best,
            higher_is_better(str(config.objective), prepared.metrics),
        ),
        observer=context.observer,
        interrupt=context.interrupt,
        constants=constant_metrics(training),
        on_checkpoint=lambda: Mirror(config.mirror).copy_run(folder.path),
    )


def constant_metrics(training: Training) -> Metrics:
    """Return the final metrics that do not change while a run trains."""
    count = 0
    for weight in training.model.parameters():
        if weight.requires_grad:
            count += weight.numel()
    return {"adapter/parameters": count}


def sample_prompts(
    prepared: Prepared,
    training: Training,
    folder: RunFolder,
    context: RunContext,
) -> Samples:
    """Return what answers the sample prompts with the model's current weights."""
    return Samples(
        prepared.config,
        folder,
        prepared.rows,
        training,
        context.resources,
    )


def _save(training: Training, prepared: Prepared, folder: Path) -> None:
    """Save the adapter as it is now."""
    with training.weights_on_cpu():
        variables = prepared.config.model.template_kwargs
        save_adapter(training.model, prepared.tokenizer, folder, variables)
