"""One run, from its checked config to its result: rows, base, adapter, training, evaluation, samples, summary.

Whatever happens on the way, the folder's `result.json` says it.
"""

import contextlib
import dataclasses
import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finetune.cli import Interrupted, brief, note_traceback, one_line, quiet_libraries
from finetune.config import RunConfig, refusal
from finetune.data import Rows
from finetune.hub import BaseSource
from finetune.progress import Interrupt, Observer, Progress, Reporter, Turns, alone, total_steps
from finetune.records import (
    Metrics,
    RunFolder,
    git_commit,
    peak_memory_bytes,
    read_json,
    reset_peak_memory,
    versions,
    write_json,
)
from finetune.samples import Samples
from finetune.supplies import Supplies, starts_as_base
from finetune.trackers import Label, Tracker, final_summary, open_tracker
from finetune.trained import read_run_config

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from finetune.packed_engine import PackedTraining
    from finetune.trl_engine import TrlTraining

    Training: TypeAlias = PackedTraining | TrlTraining

log = logging.getLogger(__name__)

Objective = float | tuple[float, ...] | None
"""What a run is judged by: one value, one for each of several objectives, or None without held-out rows."""


@dataclass(frozen=True)
class Part:
    """How a run takes part in something larger; by default it stands alone."""

    observer: Observer = field(default_factory=Observer)
    supplies: Supplies = field(default_factory=Supplies)
    label: Label = field(default_factory=Label)
    alone: bool = True
    """Whether the run has the terminal for itself, and ends with the sample prompts.

    A study asks for these of few of its trials, by `finetune.last_word`.
    """
    tests: bool = True
    """Whether the run ends with the test rows: not where a choice could see them."""
    interrupt: Interrupt = field(default_factory=Interrupt)
    slots: int = 1
    """How many runs may train together with this one, itself counted."""
    saving: Sequence[object] = ()
    """Bases, by their `base_key`, on which `trainer.gradient_checkpointing=auto` is true, decided for all of these."""
    companions: set[str] = field(default_factory=set)
    """Names of the runs that have trained together with this one; whoever brings them together adds to it."""


@dataclass
class Result:
    """What `result.json` holds; filled in as the run goes on."""

    config: RunConfig
    part: Part
    engine: str | None = None
    status: str = "running"
    metrics: Metrics = field(default_factory=dict)
    error: str | None = None
    progress: Progress | None = None
    base: BaseSource | None = None
    rows: Rows | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows without an answer's token within `max_length`, by part."""

    def to_dict(self) -> dict[str, Any]:
        """As the file has it."""
        seconds = self.progress.train_seconds if self.progress else 0.0
        tokens = self.progress.train_tokens if self.progress else 0
        objectives = [{"name": name, "value": self.metrics.get(name)} for name in self.config.objectives]
        return {
            "status": self.status,
            "objective": objectives[0] if len(objectives) == 1 else objectives or None,
            "metrics": self.metrics,
            "error": self.error,
            "step": self.progress.step if self.progress else 0,
            "seed": self.config.seed,
            "engine": self.engine,
            "slots": self.part.slots,
            "companions": sorted(self.part.companions),
            "effective_batch_size": self.config.trainer.effective_batch_size,
            "train_tokens": tokens,
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None,
            "peak_memory_bytes": peak_memory_bytes() if self.progress else None,
            "versions": versions(),
            "git_commit": git_commit(),
            "base_model": self.base.identity if self.base else None,
            "dataset_fingerprint": self.rows.fingerprint if self.rows else None,
            "rows": {**self.rows.counts, "left_out": self.left_out} if self.rows else None,
        }


def run(config: RunConfig, path: str | Path, part: Part | None = None) -> Objective:
    """Train, evaluate and record one run in a folder, and return its objective (None without held-out rows).

    A folder with a checkpoint is gone on with. Raises ConfigError for what the user can mend, Interrupted
    after Ctrl-C, and what went wrong otherwise; `result.json` is written in each case.
    """
    return alone(take_turns(config, RunFolder(path), part or Part()))


def take_turns(config: RunConfig, folder: RunFolder, part: Part) -> Turns[Objective]:
    """`run`, as work that takes turns with other runs'."""
    with folder.locked():
        _require_same_run(folder, _identity(config, None, None))
        done = read_json(folder.result)
        if done is not None and done["status"] == "completed":
            log.info("%s: this run is completed already", folder.path)
            return _objective(config, done["metrics"])
        result, tracker = Result(config, part), Tracker()
        try:
            rows = result.rows = part.supplies.rows(config.dataset)
            source = part.supplies.source(config.model)
            identity = _identity(config, rows, source)
            result.base = source  # now that its weights could be read
            _require_same_run(folder, identity)
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
        if part.alone:
            _summarise(folder, result, numbers, tracker)
        return _objective(config, result.metrics)


def resume(path: str | Path) -> Objective:
    """Go on with the run that began in a folder, with its own config, from its last checkpoint."""
    config = read_run_config(path)
    plain, dated = logging.StreamHandler(), logging.FileHandler(Path(path) / "train.log")
    dated.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[plain, dated])
    return run(config, path)


def _identity(config: RunConfig, rows: Rows | None, base: BaseSource | None) -> dict[str, Any]:
    """What makes a run this run and no other; kept in its folder as `run.json`."""
    return {
        "config": config.anchored().to_dict(),
        "dataset_fingerprint": rows.fingerprint if rows else None,
        "base_model": base.identity if base else None,
    }


FREE = ("name", "resume", "tracker.", "hub.", "sample_")
"""Keys that may change while a run, or a study, goes on: they change no number."""


def _require_same_run(folder: RunFolder, identity: dict[str, Any]) -> None:
    """Refuse to go on with another run than the one that began in the folder. Where its metrics go may change."""
    known = read_json(folder.identity)
    if known is None:
        return
    then, now = flat(known), flat(identity)
    for key, value in now.items():
        free = key.removeprefix("config.").startswith(FREE)
        if not free and value != then.get(key) and (value is not None or key.startswith("config.")):
            allowed = f"the run that began in {folder.path} has {then.get(key)}; give another hydra.run.dir or name"
            raise refusal(key.removeprefix("config."), value, allowed)


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def _objective(config: RunConfig, metrics: Metrics) -> Objective:
    values = tuple(metrics[name] for name in config.objectives)
    return values if len(values) > 1 else values[0] if values else None


def _train(result: Result, folder: RunFolder, tracker: Tracker) -> Turns[None]:
    """Everything that needs torch: it is imported only once the rows are known to be sound."""
    config, part = result.config, result.part
    quiet_libraries(bars=part.alone)
    from finetune.base import load_adapter, take_device

    take_device(0)  # before bitsandbytes is imported, which looks for GPUs
    data = _prepare(result)
    config = result.config
    checkpoint = folder.last_checkpoint()
    progress = result.progress = Progress.load(checkpoint) if checkpoint else Progress()
    assert result.engine is not None
    while not part.supplies.has_room(config, result.engine):
        yield None
    with contextlib.ExitStack() as held:
        training = yield from _training(result, folder, data, held)
        folder.rewind(progress.step if checkpoint else -1)
        samples = Samples(config, folder, data.rows, training.speaking, part.supplies) if part.alone else None
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
            bar=part.alone,
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
        if part.tests and data.test and progress.stop != "pruned":
            evaluation = yield from training.measure(data.test)
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
        tracker.tag(part.observer.on_completed(result.metrics))
        if config.tracker.adapters == "all" or (config.tracker.adapters == "best" and part.alone):
            tracker.adapter(folder.adapter)


def _save(training: "Training", data: "_Data", folder: Path) -> None:
    """The adapter as it is now, in a folder."""
    from finetune.base import save_adapter

    with training.on_host():
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
    from finetune.base import check_targets, lora_config
    from finetune.packed_engine import choose
    from finetune.plan import fitted
    from finetune.tokens import left_out

    config, rows, supplies = result.config, result.rows, result.part.supplies
    assert rows is not None
    source = supplies.source(config.model)
    tokenizer = supplies.tokenizer(config.model)
    targets = (config.model, config.lora.target_modules)
    if not supplies.known("checked targets", targets):
        check_targets(source, config.model, config.lora)
        supplies.put("checked targets", targets, True)
    lora_config(config.lora)
    result.engine = choose(config, source)
    result.config = config = fitted(config, result.engine, supplies, result.part.saving)
    parts = {"train": rows.train, "eval": rows.evaluation, "test": rows.test}
    tokens = {name: supplies.tokens(name, part, config) for name, part in parts.items()}
    result.left_out = {name: left_out(part) for name, part in tokens.items()}
    train, held_out, test = tokens.values()
    return _Data(rows, tokenizer, train, held_out, test, total_steps(config, len(train)))


def _training(result: Result, folder: RunFolder, data: _Data, held: contextlib.ExitStack) -> "Turns[Training]":
    """The run's engine at work on its base, which it holds as long as the context lasts."""
    config, supplies = result.config, result.part.supplies
    reset_peak_memory()
    if result.engine == "packed":
        from finetune.packed_engine import PackedTraining

        place = held.enter_context(supplies.slot(config))
        yield None  # others train a step while the adapter is drawn
        return PackedTraining(config, place(), data.train, data.steps)
    from finetune.trl_engine import TrlTraining, training_arguments

    arguments = training_arguments(config, folder.checkpoints, data.steps)  # refused before the base is loaded
    model = held.enter_context(supplies.model(config))
    return TrlTraining(config, arguments, model, data.tokenizer, data.train)


def _held_out_metrics(result: Result, training: "Training", held_out: "Dataset") -> Turns[Metrics]:
    """A fresh adapter answers as its base does, which the first run measures for all."""
    config, progress, supplies = result.config, result.progress, result.part.supplies
    assert progress is not None
    batch_size = config.trainer.per_device_eval_batch_size
    if progress.step > 0 or not starts_as_base(config.lora):
        return (yield from training.measure(held_out)).metrics("eval")
    kind, key = "base's metrics", (config.model, config.quantization, config.dataset, batch_size, result.engine)
    while supplies.known(kind, key) == MEASURING:
        yield None
    known: Metrics | None = supplies.known(kind, key)
    if known is None:
        supplies.put(kind, key, MEASURING)
        try:
            known = (yield from training.measure(held_out)).metrics("eval")
        finally:
            supplies.put(kind, key, known)  # None where it failed: the next run measures
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
            log.warning("hub.push=true: not pushed (%s); the adapter is in the run folder", brief(error))


def _summarise(folder: RunFolder, result: Result, numbers: dict[str, Any], tracker: Tracker) -> None:
    """The end of the run on the terminal: what was learnt, what it took, where it is, how to use it."""
    metrics, rows = result.metrics, result.rows
    assert rows is not None
    facts = []
    if result.progress and result.progress.rungs:
        before, after = result.progress.rungs[0]["metrics"]["eval/loss"], metrics["eval/loss"]
        change = f"{before:.3f} -> {after:.3f} ({after / before - 1:+.1%})"
        facts.append(("held-out loss", f"{change} on {len(rows.evaluation)} rows"))
    if "test/loss" in metrics:
        facts.append(("test loss", f"{metrics['test/loss']:.3f} on {len(rows.test)} rows that no choice has seen"))
    if numbers["tokens_per_second"]:
        work = f"{numbers['train_tokens']} tokens in {numbers['train_seconds']:.0f} s"
        facts.append(("speed", f"{numbers['tokens_per_second']:.0f} tokens/s: {work}"))
        facts.append(("peak memory", f"{numbers['peak_memory_bytes'] / 2**30:.1f} GiB"))
    for sample in read_json(folder.samples) or []:
        facts.append(("prompt", sample["prompt"]))
        facts += [(f"  {when}", " ".join(sample.get(when, "").split())) for when in ("before", "after")]
    facts.append(("adapter", os.path.relpath(folder.adapter)))
    place = shlex.quote(os.path.relpath(folder.path))
    facts.append(("use it", f'python -m finetune.generate {place} --prompt "…"'))
    facts += [("look at it", line) for line in tracker.where()]
    lines = [f"{result.status}: {result.config.name}", *(f"  {name:14} {text}" for name, text in facts)]
    log.info("%s", "\n".join(lines))
