"""The end of a study's session: the winner beside the baseline, on rows that no choice has seen, and how to use it."""

import dataclasses
import logging
import math
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from finetune.config.schema import RunConfig, TrackerSettings
from finetune.console import summary_line
from finetune.errors import ConfigError
from finetune.files.atomic import replace_folder, write_json
from finetune.files.lock import file_lock
from finetune.files.run_folder import RunFolder
from finetune.run.final_evaluation import evaluate_finished_run, read_test_evaluation
from finetune.run.load import read_run_config
from finetune.run.resources import SharedResources
from finetune.tracking.wandb_finished import add_tag, remove_tag
from sweeps.answer.advice import Insight, insight
from sweeps.answer.compare import compare
from sweeps.answer.confirm import confirmation
from sweeps.answer.publish import publish
from sweeps.answer.report import ANSWER, write_report
from sweeps.study.formatting import commands, confirmation_lines, counts, parameters, test_lines
from sweeps.study.pack import runs_log_to_files
from sweeps.study.study import Study, role

log = logging.getLogger(__name__)


def conclude(study: Study, resources: SharedResources, tracker: TrackerSettings | None = None) -> None:
    """Take the winner, measure it and the baseline on the test rows, write both down, and say and show it all.

    `tracker` says what W&B shall have of it; None: what the winner began with. Two sessions conclude one after the
    other.
    """
    with file_lock(study.folder / ".answer.lock"), runs_log_to_files():
        _conclude(study, resources, tracker)


def _conclude(study: Study, resources: SharedResources, tracker: TrackerSettings | None) -> None:
    ranked = study.ranked()
    if not ranked:
        log.info("study %s: no trial is complete, so there is no answer", study.name)
        _report(study)
        return
    found = confirmation(study)
    number = found["winner"] if found else ranked[0].number
    winner, baseline = next(trial for trial in ranked if trial.number == number), study.baseline()
    source = _run_of(study, winner)
    if not source.adapter.is_dir():
        _report(study)
        if study.written_address is not None and not source.path.exists():
            log.info("study %s: trial %d wins; its machine has it: python -m sweeps best there", study.name, number)
            return
        gone = (
            f"study {study.name}: the adapter of its winner, trial {number}, is not in {study.folder_of(number).path}"
        )
        raise ConfigError(f"{gone}; best/ stays as it is")
    answer: dict[str, Any] = {
        "trial": winner.number,
        "run": os.path.relpath(source.path, study.folder),
        "params": winner.params,
        "objective": dict(zip(study.objectives, winner.values, strict=True)),
        "baseline": baseline.number if baseline else None,
        "test": _test(study, source, baseline if winner != baseline else None, resources),
    }
    write_json(study.folder / ANSWER, answer)
    for trial in study.finished():  # two that ended together may both have been the best so far
        if trial.number != winner.number:
            remove_tag(study.folder_of(trial.number), "best")
    if len(study.objectives) == 1:  # a confirmation may have found another than was the best when it ended
        add_tag(study.folder_of(winner.number), "best")
    keep_best(study, source, winner)
    known = insight(study)
    report = _report(study, known)
    say(study, ranked, answer, known, report)
    for line in publish(study, winner.number, answer["test"], report, tracker):
        log.info("  %s", line)


def _report(study: Study, known: Insight | None = None) -> Path | None:
    """The report; what can't be drawn does not cost the study its answer."""
    try:
        return write_report(study, known=known)
    except Exception as error:
        place = shlex.quote(os.path.relpath(study.folder))
        log.warning(
            "no report: %s; HYDRA_FULL_ERROR=1 python -m sweeps report %s shows where", summary_line(error), place
        )
        return None


def _run_of(study: Study, winner: FrozenTrial) -> RunFolder:
    """The winner's run; where its adapter did not stay on disk, one that the confirmation has trained."""
    own = study.folder_of(winner.number)
    others = sorted((study.folder / "confirm").glob(f"{winner.number}-seed*"))
    runs = [own, *map(RunFolder, others)]
    return next((run for run in runs if run.adapter.is_dir()), own)


def _test(
    study: Study, source: RunFolder, baseline: FrozenTrial | None, resources: SharedResources
) -> dict[str, Any] | None:
    """The test losses of the winner and of the baseline; None without test rows. What was measured is not again."""
    log.info("the last word: the winner and the baseline on the test rows")
    of_winner = evaluate_finished_run(source.path, resources, answer_prompts=True)
    if of_winner is None or not math.isfinite(of_winner.loss):
        return None
    found: dict[str, Any] = {"rows": len(of_winner.row_losses), "winner": of_winner.loss}
    if baseline is not None:
        folder = study.folder_of(baseline.number)
        if not folder.adapter.is_dir() and not read_test_evaluation(folder):
            log.warning("trial %d, the baseline, is not measured: its adapter is gone", baseline.number)
            return found
        of_baseline = evaluate_finished_run(folder.path, resources, answer_prompts=False)
        if of_baseline is None or not math.isfinite(of_baseline.loss):
            return found
        result = compare([of_winner], [of_baseline])
        found |= {
            "baseline": of_baseline.loss,
            "difference": result.difference,
            "interval_95": [result.low, result.high],
            "verdict": result.verdict,
        }
    return found


def keep_best(study: Study, source: RunFolder, winner: FrozenTrial) -> None:
    """`best/`, the winner's run folder, and `experiment/best.yaml`, which reproduces it."""
    unneeded = shutil.ignore_patterns("checkpoints", "wandb", "tensorboard", ".lock")
    with replace_folder(study.folder / "best") as draft:
        shutil.copytree(source.path, draft, ignore=unneeded)
    config = dataclasses.replace(read_run_config(source.path), resume=None)
    experiment = study.folder / "experiment" / "best.yaml"
    experiment.parent.mkdir(exist_ok=True)
    head = (
        f"# @package _global_\n# Trial {winner.number} of study {study.name}, whole:\n"
        f"# python -m finetune --config-dir {shlex.quote(os.path.relpath(study.folder))} experiment=best\n"
    )
    experiment.write_text(head + OmegaConf.to_yaml(OmegaConf.create(_escaped(config))), encoding="utf-8")


def _escaped(config: RunConfig) -> dict[str, Any]:
    """The config's values, texts with `${` as they are: they were resolved once and shall not be again."""

    def escape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: escape(item) for key, item in value.items()}
        if isinstance(value, list):
            return [escape(item) for item in value]
        return value.replace("${", "\\${") if isinstance(value, str) else value

    escaped: dict[str, Any] = escape(config.to_dict())
    return escaped


def say(study: Study, ranked: list[FrozenTrial], answer: dict[str, Any], known: Insight, report: Path | None) -> None:
    """The study's end on the terminal."""
    names = study.objectives
    lines = [f"study {study.name}: {counts(study)}"]
    front = {trial.number for trial in study.optuna.best_trials} if len(names) > 1 else set()
    shown = ranked[:5]
    baseline = study.baseline()
    if baseline is not None and baseline not in shown:
        shown = [*shown, baseline]
    for trial in shown:
        values = "  ".join(f"{name} {value:.4f}" for name, value in zip(names, trial.values, strict=True))
        note = "  baseline" if role(trial) == "baseline" else ""
        note += "  (on the Pareto front)" if trial.number in front else ""
        lines.append(f"  trial {trial.number:<4} {values}  {parameters(trial)}{note}")
    if known.shares:
        said = (f"{name} {share.share:.0%} ({share.low:.0%}-{share.high:.0%})" for name, share in known.shares.items())
        lines.append(f"  what mattered  {', '.join(said)}")
    lines += _named("test loss", test_lines(answer))
    found = confirmation(study)
    lines += _named("confirmed", confirmation_lines(found) if found else [])
    lines += _named("next", known.advice)
    for trial in study.trials(TrialState.FAIL):
        lines.append(f"  trial {trial.number:<4} failed: {trial.user_attrs.get('error')}")
    place = shlex.quote(os.path.relpath(study.folder))
    own = answer["run"] == f"trials/{answer['trial']}"
    whose = "'s run folder" if own else f" trained anew, {answer['run']}: its first adapter did not stay on disk"
    lines.append(f"  the winner     {place}/best: trial {answer['trial']}{whose}")
    lines += [f"  {name:14} {command}" for name, command in commands(study)]
    if report is not None:
        lines.append(f"  report         {shlex.quote(os.path.relpath(report))}")
    log.info("%s", "\n".join(lines))


def _named(name: str, lines: list[str]) -> list[str]:
    """Lines under one name, which stands before the first."""
    return [f"  {name if index == 0 else '':14} {line}" for index, line in enumerate(lines)]
