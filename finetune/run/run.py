"""One run, from its checked config to its result: rows, base, adapter, training, evaluation, samples, summary.

Whatever happens on the way, the folder's `result.json` says it.
"""

import contextlib
import dataclasses
import logging
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from finetune.config.schema import RunConfig, starts_as_base
from finetune.console import note_traceback, one_line, quiet_libraries, summary_line
from finetune.data.types import Rows
from finetune.engine.checkpoint import Progress
from finetune.engine.reporter import Reporter
from finetune.engine.schedule import total_steps
from finetune.engine.steps import RunSteps, drive
from finetune.errors import Interrupted
from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import Metrics, RunFolder
from finetune.model.memory import reset_peak_memory
from finetune.run.context import RunContext
from finetune.run.identity import require_same_run, run_identity
from finetune.run.learning_rate import resolve_learning_rate
from finetune.run.load import read_run_config
from finetune.run.result import Objective, Result
from finetune.run.samples import Samples
from finetune.run.summary import summarize
from finetune.tracking.open import open_tracker
from finetune.tracking.tracker import Tracker, final_summary

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from finetune.engine.packed.training import PackedTraining
    from finetune.engine.trl import TrlTraining

    Training: TypeAlias = PackedTraining | TrlTraining


log = logging.getLogger(__name__)


def run(config: RunConfig, path: str | Path, part: RunContext | None = None) -> Objective:
    """Train, evaluate and record one run in a folder, and return its objective (None without held-out rows).

    A folder with a checkpoint is gone on with. Raises ConfigError for what the user can mend, Interrupted
    after Ctrl-C, and what went wrong otherwise; `result.json` is written in each case.
    """
    return drive(run_steps(config, RunFolder(path), part or RunContext()))


def run_steps(config: RunConfig, folder: RunFolder, part: RunContext) -> RunSteps[Objective]:
    """`run`, as work that takes turns with other runs'."""
    with folder.locked():
        if folder.identity.exists():  # which has the rate as a number
            config = resolve_learning_rate(config, part.resources)
        require_same_run(folder, run_identity(config, None, None))
        done = read_json(folder.result)
        if done is not None and done["status"] == "completed":
            log.info("%s: this run is completed already", folder.path)
            return _objective(config, done["metrics"])
        result, tracker = Result(config, part), Tracker()
        try:
            rows = result.rows = part.resources.rows(config.dataset)
            source = part.resources.source(config.model)
            config = result.config = resolve_learning_rate(config, part.resources)
            identity = run_identity(config, rows, source)
            result.base = source  # now that its weights could be read
            require_same_run(folder, identity)
            write_json(folder.identity, identity)
            tracker = open_tracker(config, folder, part.label)
            yield from _train(result, folder, tracker)
        except BaseException as error:
            ended = isinstance(error, KeyboardInterrupt | Interrupted | GeneratorExit)
            result.status = "interrupted" if ended else "failed"
            result.error = one_line(error)
            note_traceback(error)
            raise
        finally:
            numbers = result.to_dict()
            try:
                write_json(folder.result, numbers)
            finally:
                tracker.finish(result.status, final_summary(numbers))
        if part.interactive:
            summarize(folder, result, numbers, tracker)
        return _objective(config, result.metrics)


def resume(path: str | Path) -> Objective:
    """Go on with the run that began in a folder, with its own config, from its last checkpoint."""
    config = read_run_config(path)
    plain, dated = logging.StreamHandler(), logging.FileHandler(Path(path) / "train.log")
    dated.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[plain, dated])
    return run(config, path)


def _objective(config: RunConfig, metrics: Metrics) -> Objective:
    values = tuple(metrics[name] for name in config.objectives)
    return values if len(values) > 1 else values[0] if values else None


def _train(result: Result, folder: RunFolder, tracker: Tracker) -> RunSteps[None]:
    """Everything that needs torch: it is imported only once the rows are known to be sound."""
    config, part = result.config, result.part
    quiet_libraries(bars=part.interactive)
    from finetune.model.adapter import load_adapter
    from finetune.model.device import take_device

    take_device(0)  # before bitsandbytes is imported, which looks for GPUs
    data = _prepare(result)
    config = result.config
    checkpoint = folder.last_checkpoint()
    progress = result.progress = Progress.load(checkpoint) if checkpoint else Progress()
    assert result.engine is not None
    while not part.resources.has_room(config, result.engine):
        yield None
    with contextlib.ExitStack() as held:
        training = yield from _training(result, folder, data, held)
        folder.rewind(progress.step if checkpoint else -1)
        samples = (
            Samples(config, folder, data.rows, training.generation_model, part.resources) if part.interactive else None
        )
        if samples is not None:
            samples.before()
        reporter = Reporter(
            config,
            progress,
            data.steps,
            folder,
            tracker,
            part.observer,
            part.interrupt,
            evaluate=(lambda: _held_out_metrics(result, training, data.held_out)) if data.held_out else None,
            keep_best=lambda step: _save(training, data, folder.best(step)),
            bar=part.interactive,
        )
        steps, batch = data.steps, config.trainer.effective_batch_size
        log.info("training on %d rows: %d steps of %d", len(data.train), steps, batch)
        if checkpoint:
            log.info("going on from step %d", progress.step)
        yield from training.train(reporter, folder, checkpoint)
        if progress.stop == "interrupted":
            hint = shlex.quote(f"resume={os.path.relpath(folder.path)}")
            raise Interrupted(f"interrupted after step {progress.step}; python -m finetune {hint} goes on from there")
        if config.objective_at == "best":
            load_adapter(training.model, folder.best(progress.best_step))  # which waits for its copies
        _save(training, data, folder.adapter)
        result.metrics = progress.final_metrics(best=config.objective_at == "best")
        trained = (weight.numel() for weight in training.model.parameters() if weight.requires_grad)
        final: Metrics = {"adapter/parameters": sum(trained)}
        if part.evaluate_test_rows and data.test and progress.stop != "pruned":
            evaluation = yield from training.evaluate(data.test)
            write_json(folder.test_rows, dataclasses.asdict(evaluation))
            final |= evaluation.metrics("test")
        if samples is not None and progress.stop != "pruned":
            samples.after(tracker, progress.step)
            _push(config, training.model)
    result.metrics |= final
    folder.log(progress.step, final)
    tracker.log(progress.step, final)
    result.status = "pruned" if progress.stop == "pruned" else "completed"
    if result.status == "completed":
        tracker.add_tags(part.observer.on_completed(result.metrics))
        if config.tracker.adapters == "all" or (config.tracker.adapters == "best" and part.interactive):
            tracker.log_adapter(folder.adapter)


def _save(training: "Training", data: "_Data", folder: Path) -> None:
    """The adapter as it is now, in a folder."""
    from finetune.model.adapter import save_adapter

    with training.weights_on_cpu():
        save_adapter(training.model, data.tokenizer, folder)


@dataclass(frozen=True)
class _Data:
    """What a run trains on and is measured by, as tokens."""

    rows: Rows
    tokenizer: "PreTrainedTokenizerBase"
    train: "Dataset"
    held_out: "Dataset"
    test: "Dataset"
    steps: int


def _prepare(result: Result) -> _Data:
    """The run's rows as tokens, and its engine. What is wrong with them is said before the base is loaded."""
    from finetune.data.tokens import left_out_count
    from finetune.engine.selection import choose_engine
    from finetune.model.adapter import check_targets, lora_config
    from finetune.run.memory_plan import resolve_checkpointing

    config, rows, resources = result.config, result.rows, result.part.resources
    assert rows is not None
    source = resources.source(config.model)
    tokenizer = resources.tokenizer(config.model)
    targets = (config.model, config.lora.target_modules)
    if not resources.known("checked targets", targets):
        check_targets(source, config.model, config.lora)
        resources.put("checked targets", targets, True)
    lora_config(config.lora)
    result.engine = choose_engine(config, source)
    result.config = config = resolve_checkpointing(config, result.engine, resources, result.part.checkpointed_bases)
    parts = {"train": rows.train, "eval": rows.evaluation, "test": rows.test}
    tokens = {name: resources.tokens(name, part, config) for name, part in parts.items()}
    result.left_out = {name: left_out_count(part) for name, part in tokens.items()}
    train, held_out, test = tokens.values()
    return _Data(rows, tokenizer, train, held_out, test, total_steps(config, len(train)))


def _training(result: Result, folder: RunFolder, data: _Data, held: contextlib.ExitStack) -> "RunSteps[Training]":
    """The run's engine at work on its base, which it holds as long as the context lasts."""
    config, resources = result.config, result.part.resources
    reset_peak_memory()
    if result.engine == "packed":
        from finetune.engine.packed.training import PackedTraining

        place = held.enter_context(resources.slot(config))
        yield None  # others train a step while the adapter is drawn
        return PackedTraining(config, place(), data.train, data.steps)
    from finetune.engine.trl import TrlTraining, training_arguments

    arguments = training_arguments(config, folder.checkpoints, data.steps)  # refused before the base is loaded
    model = held.enter_context(resources.model(config))
    return TrlTraining(config, arguments, model, data.tokenizer, data.train)


def _held_out_metrics(result: Result, training: "Training", held_out: "Dataset") -> RunSteps[Metrics]:
    """A fresh adapter answers as its base does, which the first run measures for all."""
    config, progress, resources = result.config, result.progress, result.part.resources
    assert progress is not None
    batch_size = config.trainer.per_device_eval_batch_size
    if progress.step > 0 or not starts_as_base(config.lora):
        return (yield from training.evaluate(held_out)).metrics("eval")
    kind, key = "base's metrics", (config.model, config.quantization, config.dataset, batch_size, result.engine)
    while resources.known(kind, key) == MEASURING:
        yield None
    known: Metrics | None = resources.known(kind, key)
    if known is None:
        resources.put(kind, key, MEASURING)
        try:
            known = (yield from training.evaluate(held_out)).metrics("eval")
        finally:
            resources.put(kind, key, known)  # None where it failed: the next run measures
        yield None  # the others have waited, and go on from here at the same time
    return dict(known)


MEASURING = "measuring"
"""Stands for the base's metrics while a run measures them."""


def _push(config: RunConfig, model: "PeftModel") -> None:
    """Upload the adapter if wanted; the run is not lost if that fails."""
    if config.hub.push:
        try:
            model.push_to_hub(config.hub.model_id or config.name, private=config.hub.private)
        except Exception as error:
            log.warning("hub.push=true: not pushed (%s); the adapter is in the run folder", summary_line(error))
