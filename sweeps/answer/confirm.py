"""Whether the best trial was luck: the best ones are trained anew with other seeds, and the answer may change.

Which trial wins is decided by the held-out rows, as in the study; the test rows only prove it.
"""

import dataclasses
import logging
import os
import shlex
import shutil
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from finetune.config.schema import RunConfig
from finetune.console import one_line
from finetune.engine.interrupt import Interrupt
from finetune.engine.steps import RunSteps
from finetune.errors import ConfigError, Interrupted
from finetune.files.atomic import read_json, write_json
from finetune.files.lock import file_lock
from finetune.files.run_folder import RunFolder
from finetune.run.context import RunContext
from finetune.run.final_evaluation import read_test_evaluation
from finetune.run.load import read_run_config
from finetune.run.resources import shared_resources
from finetune.run.run import run_steps
from finetune.tracking.tracker import Label
from sweeps.answer.compare import compare
from sweeps.study.pack import PackedRun, runs_log_to_files, train_together
from sweeps.study.study import CONFIRMATION, Study, role

if TYPE_CHECKING:
    from finetune.engine.evaluation import Evaluation


log = logging.getLogger(__name__)


TOP = 3
"""How many of the best trials are trained anew, where nothing else is said; the baseline is always with them."""


@dataclass(frozen=True)
class Repeat:
    """A trial to be trained once more, with another seed."""

    trial: int
    seed: int
    folder: RunFolder
    config: RunConfig


def confirm(study: Study, seeds: int, top: int = TOP) -> dict[str, Any]:
    """Train the best trials and the baseline with other seeds, and write down and return what came of it.

    What a session before has trained is kept, so the same call goes on after an interruption. Two calls at once come
    one after the other. Raises ConfigError where there is nothing to choose between.
    """
    with file_lock(study.folder / ".confirm.lock"):
        return _confirm(study, seeds, top)


def _confirm(study: Study, seeds: int, top: int) -> dict[str, Any]:
    candidates = _candidates(study, top)
    own = max(read_run_config(study.folder_of(trial.number).path).seed for trial in candidates)  # it may be searched
    repeats = [_repeat(study, trial, seed) for seed in range(own + 1, own + 1 + seeds) for trial in candidates]
    log.info(
        "confirming %s with %d other seeds: %d runs",
        ", ".join(f"trial {trial.number}" for trial in candidates),
        seeds,
        len(repeats),
    )
    try:
        found = _weigh(study, candidates, repeats, _train(study, repeats))
        write_json(study.folder / CONFIRMATION, found)
        kept = [] if study.folder_of(found["winner"]).adapter.is_dir() else _runs(repeats, found["winner"])
        if kept and not any(repeat.folder.adapter.is_dir() for repeat in kept):  # removed by a confirmation before
            kept[0].folder.clear()
            _train(study, kept[:1])
    except (Interrupted, KeyboardInterrupt):
        again = f"python -m sweeps confirm {shlex.quote(os.path.relpath(study.folder))} --top {top} --seeds {seeds}"
        raise Interrupted(f"interrupted; {again} goes on") from None
    for repeat in repeats:  # what they have come to is written down
        shutil.rmtree(repeat.folder.checkpoints, ignore_errors=True)
        if repeat not in kept:
            shutil.rmtree(repeat.folder.adapter, ignore_errors=True)
    return found


def _runs(repeats: Sequence[Repeat], trial: int) -> list[Repeat]:
    return [repeat for repeat in repeats if repeat.trial == trial]


def confirmation(study: Study) -> dict[str, Any] | None:
    """What a confirmation has found; None where there was none, or trials have since come out better than its first."""
    known: dict[str, Any] | None = read_json(study.folder / CONFIRMATION)
    ranked = study.ranked()
    return known if known and ranked and ranked[0].number == known["before"] else None


def _candidates(study: Study, top: int) -> list[FrozenTrial]:
    if len(study.objectives) > 1:
        raise ConfigError(f"study {study.name}: has several objectives, so there is no first to be confirmed")
    ranked, baseline = study.ranked(), study.baseline()
    if not ranked:
        raise ConfigError(f"study {study.name}: no trial is complete, so there is nothing to confirm")
    best = ranked[:top]
    return [*best, *([baseline] if baseline is not None and baseline not in best else [])]


def _repeat(study: Study, trial: FrozenTrial, seed: int) -> Repeat:
    config = dataclasses.replace(read_run_config(study.folder_of(trial.number).path), seed=seed)
    place = study.folder / "confirm" / f"{trial.number}-seed{seed}"
    return Repeat(trial.number, seed, RunFolder(place), config)


def _train(study: Study, repeats: Sequence[Repeat]) -> dict[Path, str]:
    """Train what is not trained yet, in the study's slots; returns what went wrong, by folder."""
    slots = int(study.optuna.user_attrs.get("slots", 1))
    interrupt, waiting, errors = Interrupt(), iter(repeats), dict[Path, str]()

    def work(repeat: Repeat, packed_with: set[str]) -> RunSteps[None]:
        label = Label(
            id=f"{study.uid}-{repeat.trial}-seed{repeat.seed}",
            name=f"{study.name}-{repeat.trial}-seed{repeat.seed}",
            group=study.name,
            job_type="confirm",
        )
        part = RunContext(
            resources=shared_resources,
            label=label,
            interactive=False,
            interrupt=interrupt,
            slots=slots,
            packed_with=packed_with,
        )
        try:
            yield from run_steps(repeat.config, repeat.folder, part)
        except Interrupted:
            raise
        except Exception as error:
            errors[repeat.folder.path] = one_line(error)
        known = read_json(repeat.folder.result)
        value = known["metrics"].get(study.objectives[0]) if known else None
        said = errors.get(repeat.folder.path) or f"{study.objectives[0]} {value:.4f}"
        log.info("trial %d with seed %d: %s", repeat.trial, repeat.seed, said)

    def take() -> PackedRun | None:
        repeat = next(waiting, None)
        if repeat is None:
            return None
        repeat.folder.path.mkdir(parents=True, exist_ok=True)
        packed_with: set[str] = set()
        return PackedRun(
            repeat.folder.path.name, work(repeat, packed_with), repeat.folder.path / "train.log", packed_with
        )

    with runs_log_to_files():
        train_together(take, slots)
    return errors


def _weigh(
    study: Study, candidates: Sequence[FrozenTrial], repeats: Sequence[Repeat], errors: dict[Path, str]
) -> dict[str, Any]:
    """Each candidate's mean and spread over the seeds, the winner among them, and its proof on the test rows."""
    name = study.objectives[0]
    seeds = sorted({repeat.seed for repeat in repeats})
    rows: list[dict[str, Any]] = []
    for trial in candidates:
        own = _runs(repeats, trial.number)
        results = [read_json(repeat.folder.result) for repeat in own if repeat.folder.path not in errors]
        values = [result["metrics"][name] for result in results]
        tests = [loss for result in results if (loss := result["metrics"].get("test/loss")) is not None]
        rows.append(
            {
                "trial": trial.number,
                "role": role(trial),
                "study": trial.value,
                "values": values,
                "mean": statistics.fmean(values) if values else None,
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "test": statistics.fmean(tests) if tests else None,
                "failed": [errors[repeat.folder.path] for repeat in own if repeat.folder.path in errors],
            }
        )
    whole = [row for row in rows if not row["failed"]] or [row for row in rows if row["values"]]
    if not whole:
        raise ConfigError(f"study {study.name}: no run of the confirmation ended well: {next(iter(errors.values()))}")
    winner: int = min(whole, key=lambda row: study.cost(row["mean"]))["trial"]
    return {
        "before": candidates[0].number,
        "winner": winner,
        "objective": name,
        "seeds": seeds,
        "candidates": rows,
        "comparisons": _comparisons(repeats, winner, [trial.number for trial in candidates]),
    }


def _comparisons(repeats: Sequence[Repeat], winner: int, others: Sequence[int]) -> list[dict[str, Any]]:
    """The winner against each other candidate on the test rows, over the seeds that both have."""
    measures: dict[int, dict[int, Evaluation]] = defaultdict(dict)
    for repeat in repeats:
        evaluation = read_test_evaluation(repeat.folder)
        if evaluation is not None:
            measures[repeat.trial][repeat.seed] = evaluation
    own, found = measures[winner], []
    for other in others:
        seeds = sorted(own.keys() & measures[other].keys())
        if other != winner and seeds:
            result = compare([own[seed] for seed in seeds], [measures[other][seed] for seed in seeds])
            rows = len(own[seeds[0]].row_losses)
            found.append({"trial": winner, "other": other, "rows": rows, **dataclasses.asdict(result)})
    return found
