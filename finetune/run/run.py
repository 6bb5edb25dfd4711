"""One run, from its checked config to its result: prepare, train, conclude.

Each stage has a file of its own beside this one. Whatever happens on the way, the run folder's
`result.json` says it.
"""

import contextlib
import dataclasses
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from finetune.compat import fast_imports, import_model_libraries
from finetune.config.schema import RunConfig
from finetune.console import LOG_FORMAT, error_line, log_traceback, quiet_libraries
from finetune.engine.checkpoint import Progress
from finetune.engine.steps import RunSteps, drive
from finetune.errors import Interrupted
from finetune.files.atomic import read_json, write_json
from finetune.files.mirror import Mirror
from finetune.files.run_folder import Metrics, RunFolder
from finetune.metrics.load import check_metrics
from finetune.metrics.names import format_metric
from finetune.notification import Event, notify
from finetune.run.context import RunContext
from finetune.run.identity import require_same_run, run_identity
from finetune.run.interruption import explain_interruption
from finetune.run.learning_rate import resolve_learning_rate
from finetune.run.load import read_run_config
from finetune.run.quantization import quantization_method, resolve_quantization
from finetune.run.result import Objective, Result, objective_of
from finetune.run.summary import print_summary
from finetune.tracking.open import check_trackers, open_tracker
from finetune.tracking.tracker import Tracker, final_summary

if TYPE_CHECKING:
    from finetune.run.prepare import Prepared

log = logging.getLogger(__name__)


def run(
    config: RunConfig, path: str | Path, context: RunContext | None = None
) -> Objective:
    """Train, evaluate and record one run. If its folder has a checkpoint, it resumes from there.

    Args:
        config: The checked config.
        path: The run folder.
        context: The run's surroundings; None: it is alone on the terminal.

    Returns:
        The objective; None if it is an evaluation's and there are no held-out rows.

    Raises:
        ConfigError: The user can mend it.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint is written.
    """
    return drive(fetched_run_steps(config, RunFolder(path), context or RunContext()))


def fetched_run_steps(
    config: RunConfig, folder: RunFolder, context: RunContext
) -> RunSteps[Objective]:
    """Do what `run_steps` does, with the copy in the mirror of a run that is not here."""
    mirror = Mirror(config.mirror)
    mirror.check()
    with folder.locked():
        if not folder.identity.exists():
            mirror.fetch_run(folder)
        return (yield from run_steps(config, folder, context))


def run_steps(
    config: RunConfig, folder: RunFolder, context: RunContext
) -> RunSteps[Objective]:
    """Do what `run` does, as a generator, so that many runs can train together in one process.

    Nothing is fetched from a mirror: that would bring back what was removed for another attempt.
    """
    mirror = Mirror(config.mirror)
    with folder.locked():
        # Compare the config before rows and base are read. The recorded one has its rate resolved.
        if folder.identity.exists():
            config = resolve_learning_rate(config, context.resources)
            config = resolve_quantization(config, context.resources)
        require_same_run(folder, run_identity(config, rows=None, base=None))
        metrics = _completed_metrics(folder)
        if metrics is not None:
            log.info("%s: this run is completed already", folder.path)
            mirror.copy_run(folder.path)
            Mirror.finish()
            return objective_of(config, metrics)
        result = Result(config, context)
        goes_on_elsewhere = False
        try:
            yield from _run_and_record(result, folder)
        except Interrupted as error:
            goes_on_elsewhere = error.goes_on_elsewhere
            raise
        finally:
            _notify(result, folder)
            if not goes_on_elsewhere:
                mirror.copy_run(folder.path)
            if context.interactive:
                Mirror.finish()
        return objective_of(config, result.metrics)


def _run_and_record(result: Result, folder: RunFolder) -> RunSteps[None]:
    """Go through all stages, and write `result.json` however they end."""
    # Shows nothing: an error may come before the config's tracker is open.
    tracker = Tracker()
    try:
        with explain_interruption(result, folder):
            identity = _read_inputs(result, folder)
            prepared = _prepare(result)
            # Only now, when nothing but the weights can refuse the run: a refused one leaves
            # no folder. From here on, the folder holds a run that can be resumed.
            write_json(folder.identity, identity)
            tracker = open_tracker(prepared.config, folder, result.context.label)
            yield from _train_and_conclude(result, prepared, folder, tracker)
    except BaseException as error:
        # GeneratorExit: the pack closes its runs, because an error has ended them all.
        interrupted = isinstance(error, KeyboardInterrupt | Interrupted | GeneratorExit)
        result.status = "interrupted" if interrupted else "failed"
        result.error = error_line(error)
        log_traceback(error)
        raise
    finally:
        recorded = result.to_dict()
        try:
            write_json(folder.result, recorded)
        finally:
            # With a full disk too: an online tracker still shows how the run ended.
            summary = final_summary(recorded, result.config.tracker.text)
            tracker.finish(result.status, summary)
    if result.status == "completed":
        _remove_checkpoints(result.config, folder)
    if result.context.interactive:
        print_summary(folder, result, recorded, tracker)
        if result.status == "completed" and result.config.hub.push:
            _publish(folder)


def _publish(folder: RunFolder) -> None:
    """Publish the adapter on the hub, with a card of the result that is written by now."""
    # Loads Jinja and scipy, which other runs do not need.
    from finetune.sharing.publication import push_if_wanted

    line = push_if_wanted(folder.path)
    if line is not None:
        log.info("%s", line)


def _notify(result: Result, folder: RunFolder) -> None:
    """Tell of the end of a run that had begun: of a refused one, the error line tells."""
    if not result.context.notifies or not folder.identity.exists():
        return
    name = result.config.name
    message = f"run {name} {result.status}: {result.error or _describe(result)}"
    event = cast(Event, result.status)
    notify(result.config.notify, event, name, folder.result, message)


def _describe(result: Result) -> str:
    """Return the objectives of a completed run in a line."""
    values = [
        f"{name} {format_metric(result.metrics[name])}"
        for name in result.config.objectives
        if name in result.metrics
    ]
    return ", ".join(values) or "no held-out rows"


def _remove_checkpoints(config: RunConfig, folder: RunFolder) -> None:
    """Remove the checkpoints of a completed run, unless the user has chosen how many stay.

    Only now, when the result is on disk: until then, a killed run continues from the last one.
    """
    if "save_total_limit" not in config.trainer.extra:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)


def resume(path: str | Path, mirror: str | None = None) -> Objective:
    """Resume the run in a folder from its last checkpoint, with its own config.

    Args:
        path: The run folder.
        mirror: Takes the run's copies from now on; None: the config's does.

    Raises:
        ConfigError: No run began in the folder, or the user can mend what ended it.
        Interrupted: Ctrl-C or SIGTERM.
    """
    config = read_run_config(path)
    if mirror is not None:
        config = dataclasses.replace(config, mirror=mirror)
    # Hydra, which sets up the logging of a new run, is not started here.
    terminal = logging.StreamHandler()
    terminal.setFormatter(logging.Formatter("%(message)s"))
    file = logging.FileHandler(Path(path) / "train.log")
    file.setFormatter(logging.Formatter(LOG_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[terminal, file])
    return run(config, path, RunContext(notifies=True))


def _completed_metrics(folder: RunFolder) -> Metrics | None:
    """The metrics of a run that is completed already."""
    recorded = read_json(folder.result)
    if recorded is None or recorded["status"] != "completed":
        return None
    metrics: Metrics = recorded["metrics"]
    return metrics


def _read_inputs(result: Result, folder: RunFolder) -> dict[str, Any]:
    """Read the rows, find the base, and return the run's identity. It needs no torch."""
    resources = result.context.resources
    # First, because it takes no time: a function that is missing need not wait for the rows.
    check_metrics(result.config)
    check_trackers(result.config.tracker)
    rows = result.rows = resources.rows(result.config.dataset)
    source = resources.source(result.config.model)
    result.config = resolve_learning_rate(result.config, resources)
    result.config = resolve_quantization(result.config, resources)
    result.quantization = quantization_method(result.config, resources)
    # This hashes the weights; only then does the result name a base that could be read.
    identity = run_identity(result.config, rows, source)
    result.base = source
    # Again, now with the hashes: rows or base may have changed under the same names.
    require_same_run(folder, identity)
    return identity


def _prepare(result: Result) -> "Prepared":
    """Prepare the run. Torch is imported here, once the rows are sound."""
    context = result.context
    assert result.rows is not None
    with fast_imports():
        quiet_libraries(bars=context.interactive)
        from finetune.model.device import select_gpus

    gpus = result.config.trainer.gpus
    # Before bitsandbytes is imported, which looks for GPUs.
    select_gpus(_job_number(), gpus if isinstance(gpus, int) else 1)
    import_model_libraries()
    from finetune.run.prepare import prepare

    prepared = prepare(result.config, result.rows, context)
    result.config = prepared.config
    result.engine = prepared.engine
    result.left_out = prepared.left_out
    result.labels = prepared.labels
    return prepared


def _job_number() -> int:
    """Return the number of the run among the jobs of a multirun, which may have a process each."""
    if not HydraConfig.initialized():
        return 0
    job = HydraConfig.get().job
    # A single run has no number, and neither have jobs that train together in one process.
    return 0 if OmegaConf.is_missing(job, "num") else int(job.num)


def _train_and_conclude(
    result: Result, prepared: "Prepared", folder: RunFolder, tracker: Tracker
) -> RunSteps[None]:
    """Train and conclude a prepared run."""
    from finetune.run.conclude import conclude
    from finetune.run.train import start_training, train

    context = result.context
    checkpoint = folder.last_checkpoint()
    progress = result.progress = Progress.load(checkpoint) if checkpoint else Progress()
    # Runs on another base may still train: one base is loaded at a time.
    while not context.resources.has_room(prepared.config, prepared.engine):
        yield None
    with contextlib.ExitStack() as stack:
        training = yield from start_training(prepared, folder, context.resources, stack)
        yield from train(prepared, training, progress, folder, tracker, context)
        takes_best = prepared.config.objective_at == "best"
        result.metrics = progress.final_metrics(best=takes_best)
        final = yield from conclude(
            prepared, training, progress, folder, tracker, context
        )
        del training
    result.metrics |= final
    folder.log(progress.step, final)
    tracker.log(progress.step, final)
    result.status = "pruned" if progress.stop == "pruned" else "completed"
    if result.status == "completed":
        _mark_completed(result, folder, tracker)


def _mark_completed(result: Result, folder: RunFolder, tracker: Tracker) -> None:
    """Tag the tracker's run, and let the tracker keep the adapter if wanted."""
    context = result.context
    tracker.add_tags(context.observer.on_completed(result.metrics))
    uploads = result.config.tracker.adapters
    # best: of a study only the winner's, which the study uploads when it is known.
    if uploads == "all" or (uploads == "best" and context.interactive):
        tracker.log_adapter(folder.adapter)
