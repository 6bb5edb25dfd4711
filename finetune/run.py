"""One run, from its checked config to its result: rows, base, adapter, training, evaluation, samples, summary.

Whatever happens on the way, the folder's `result.json` says it.
"""

import logging
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli import Interrupted, brief, note_traceback, one_line, quiet_libraries
from finetune.config import RunConfig, refusal
from finetune.data import Rows, load_rows
from finetune.hub import BaseSource, find_base
from finetune.records import Metrics, RunFolder, git_commit, peak_memory_bytes, read_json, versions, write_json
from finetune.tokens import tokenize
from finetune.trackers import Tracker, open_tracker
from finetune.trained import read_run_config

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel

    from finetune.progress import Observer, Progress

log = logging.getLogger(__name__)


@dataclass
class Result:
    """What `result.json` holds; filled in as the run goes on."""

    config: RunConfig
    status: str = "running"
    metrics: Metrics = field(default_factory=dict)
    error: str | None = None
    progress: "Progress | None" = None
    base: BaseSource | None = None
    rows: Rows | None = None

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
            "seed": self.config.seed,
            "engine": self.config.trainer.engine,
            "slots": 1,
            "effective_batch_size": self.config.trainer.effective_batch_size,
            "train_tokens": tokens,
            "train_seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else None,
            "peak_memory_bytes": peak_memory_bytes() if self.progress else None,
            "versions": versions(),
            "git_commit": git_commit(),
            "base_model": self.base.identity if self.base else None,
            "dataset_fingerprint": self.rows.fingerprint if self.rows else None,
            "rows": self.rows.counts if self.rows else None,
        }


def run(config: RunConfig, path: str | Path, observer: "Observer | None" = None) -> float | tuple[float, ...] | None:
    """Train, evaluate and record one run in a folder, and return its objective (None without held-out rows).

    A folder with a checkpoint is gone on with. Raises ConfigError for what the user can mend, Interrupted
    after Ctrl-C, and what went wrong otherwise; `result.json` is written in each case.
    """
    folder = RunFolder(path)
    with folder.locked():
        _require_same_run(folder, _identity(config, None, None))
        done = read_json(folder.result)
        if done is not None and done["status"] == "completed":
            log.info("%s: this run is completed already", folder.path)
            return _objective(config, done["metrics"])
        result, tracker = Result(config), Tracker()
        try:
            rows = result.rows = load_rows(config.dataset)
            source = result.base = find_base(config.model)
            identity = _identity(config, rows, source)
            _require_same_run(folder, identity)
            write_json(folder.identity, identity)
            tracker = open_tracker(config, folder)
            _train(config, folder, rows, source, result, tracker, observer)
        except BaseException as error:
            result.status = "interrupted" if isinstance(error, KeyboardInterrupt | Interrupted) else "failed"
            result.error = one_line(error)
            note_traceback(error)
            raise
        finally:
            try:
                write_json(folder.result, result.to_dict())
            finally:
                tracker.finish(result.status, {**result.metrics, "error": result.error})
        _summarise(folder, result, tracker)
        return _objective(config, result.metrics)


def resume(path: str | Path) -> float | tuple[float, ...] | None:
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


def _require_same_run(folder: RunFolder, identity: dict[str, Any]) -> None:
    """Refuse to go on with another run than the one that began in the folder. Where its metrics go may change."""
    known = read_json(folder.identity)
    if known is None:
        return
    then, now = flat(known), flat(identity)
    for key, value in now.items():
        free = key.startswith(("config.resume", "config.tracker", "config.hub"))
        if not free and value != then.get(key) and (value is not None or key.startswith("config.")):
            allowed = f"the run that began in {folder.path} has {then.get(key)}; give another hydra.run.dir or name"
            raise refusal(key.removeprefix("config."), value, allowed)


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def _objective(config: RunConfig, metrics: Metrics) -> float | tuple[float, ...] | None:
    values = tuple(metrics[name] for name in config.objectives)
    return values if len(values) > 1 else values[0] if values else None


def _train(
    config: RunConfig,
    folder: RunFolder,
    rows: Rows,
    source: BaseSource,
    result: Result,
    tracker: Tracker,
    observer: "Observer | None",
) -> None:
    """Everything that needs torch: it is imported only once the rows are known to be sound."""
    quiet_libraries()
    from finetune import trl_engine
    from finetune.base import (
        add_adapter,
        check_targets,
        load_adapter,
        load_base,
        load_tokenizer,
        lora_config,
        save_adapter,
    )
    from finetune.evaluation import evaluate
    from finetune.progress import Observer, Progress, Reporter, total_steps
    from finetune.samples import Samples

    tokenizer = load_tokenizer(source, config.model)
    check_targets(source, config.model, config.lora)
    parts = (("train", rows.train), ("eval", rows.evaluation), ("test", rows.test))
    train, held_out, test = (tokenize(part, content, tokenizer, config.dataset) for part, content in parts)
    total = total_steps(config, len(train))
    lora_config(config.lora)  # like the trainer's, its unknown arguments are refused before the base is loaded
    arguments = trl_engine.training_arguments(config, folder.checkpoints, total)
    model = add_adapter(load_base(source, config), config.lora, config.seed)

    def measure(tokens: "Dataset", part: str) -> Metrics:
        return evaluate(model, tokens, config.trainer.per_device_eval_batch_size, config.quantization).metrics(part)

    checkpoint = folder.last_checkpoint()
    progress = result.progress = Progress.load(checkpoint) if checkpoint else Progress()
    folder.rewind(progress.step if checkpoint else -1)
    reporter = Reporter(
        config,
        progress,
        total,
        folder,
        tracker,
        observer or Observer(),
        evaluate=(lambda: measure(held_out, "eval")) if len(held_out) else None,
        keep_best=lambda step: save_adapter(model, tokenizer, folder.best(step)),
    )
    samples = Samples(config, folder, rows, model, tokenizer)
    samples.before()
    log.info("training on %d rows: %d steps of %d", len(train), reporter.total, config.trainer.effective_batch_size)
    if checkpoint:
        log.info("going on from step %d", progress.step)
    trl_engine.train(config, arguments, model, tokenizer, train, reporter, checkpoint)

    if progress.stop == "interrupted":
        hint = shlex.quote(f"resume={os.path.relpath(folder.path)}")
        raise Interrupted(f"interrupted after step {progress.step}; python -m finetune {hint} goes on from there")
    if config.objective_at == "best":
        load_adapter(model, folder.best(progress.best_step))
    save_adapter(model, tokenizer, folder.adapter)
    result.metrics = progress.final_metrics(best=config.objective_at == "best")
    result.metrics["adapter/parameters"] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if progress.stop != "pruned":
        if len(test):
            result.metrics |= measure(test, "test")
        samples.after(tracker, progress.step)
        _push(config, model)
    final = {name: value for name, value in result.metrics.items() if name.startswith(("test/", "adapter/"))}
    folder.log(progress.step, final)
    tracker.log(progress.step, final)
    result.status = "pruned" if progress.stop == "pruned" else "completed"


def _push(config: RunConfig, model: "PeftModel") -> None:
    """Upload the adapter if wanted; the run is not lost if that fails."""
    if config.hub.push:
        try:
            model.push_to_hub(config.hub.model_id or config.name, private=config.hub.private)
        except Exception as error:
            log.warning("hub.push=true: not pushed (%s); the adapter is in the run folder", brief(error))


def _summarise(folder: RunFolder, result: Result, tracker: Tracker) -> None:
    """The end of the run on the terminal: what was learnt, what it took, where it is, how to use it."""
    numbers, metrics, rows = result.to_dict(), result.metrics, result.rows
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
