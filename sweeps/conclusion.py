"""The end of a study's session: the winner beside the baseline, on rows that no choice has seen, and how to use it."""

import dataclasses
import logging
import os
import shlex
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState

from finetune.config import RunConfig
from finetune.records import read_json, write_json
from finetune.run import say_last_word
from finetune.supplies import Supplies
from finetune.trackers import untag
from finetune.trained import read_run_config
from sweeps.importance import importances
from sweeps.study import Study, role
from sweeps.text import parameters

if TYPE_CHECKING:
    from finetune.evaluation import Evaluation

log = logging.getLogger(__name__)

ANSWER = "answer.json"
RESAMPLES = 10_000


def conclude(study: Study, supplies: Supplies) -> None:
    """Take the winner, measure it and the baseline on the test rows, write both down, and say it all."""
    ranked = study.ranked()
    if not ranked:
        log.info("study %s: no trial is complete, so there is no answer", study.name)
        return
    winner, baseline = ranked[0], study.baseline()
    answer = {
        "trial": winner.number,
        "params": winner.params,
        "objective": dict(zip(study.objectives, winner.values, strict=True)),
        "baseline": baseline.number if baseline else None,
        "test": _test(study, winner, baseline, supplies),
    }
    write_json(study.folder / ANSWER, answer)
    for trial in study.finished():  # two that ended together may both have been the best so far
        if trial.number != winner.number:
            untag(study.folder_of(trial.number), "best")
    keep_best(study, winner)
    say(study, ranked, answer)


def _test(study: Study, winner: FrozenTrial, baseline: FrozenTrial | None, supplies: Supplies) -> dict[str, Any] | None:
    """The test losses of the winner and of the baseline; None without test rows. What was measured is not again."""
    known = read_json(study.folder / ANSWER)
    if known and known["trial"] == winner.number and known["baseline"] == (baseline.number if baseline else None):
        before: dict[str, Any] | None = known["test"]
        return before
    log.info("the last word: trial %d, the winner, and the baseline on the test rows", winner.number)
    of_winner = say_last_word(study.folder_of(winner.number).path, supplies, ask=True)
    if of_winner is None:
        return None
    found: dict[str, Any] = {"rows": len(of_winner.row_losses), "winner": of_winner.loss}
    if baseline is not None and baseline.number != winner.number:
        of_baseline = say_last_word(study.folder_of(baseline.number).path, supplies, ask=False)
        assert of_baseline is not None
        low, high = difference_interval(of_winner, of_baseline)
        found |= {
            "baseline": of_baseline.loss,
            "difference": of_winner.loss - of_baseline.loss,
            "interval_95": [low, high],
        }
    return found


def difference_interval(one: "Evaluation", other: "Evaluation") -> tuple[float, float]:
    """The 95 % confidence interval of the difference of two losses on the same rows, by the paired bootstrap.

    Rows are drawn anew with replacement; a row's two losses stay together (Efron and Tibshirani, 1993).
    """
    differences = np.array(one.row_losses) - np.array(other.row_losses)
    tokens = np.array(one.row_tokens)
    rows = np.random.default_rng(0).integers(len(tokens), size=(RESAMPLES, len(tokens)))
    means = differences[rows].sum(1) / tokens[rows].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def keep_best(study: Study, winner: FrozenTrial) -> None:
    """`best/`, the winner's run folder, and `experiment/best.yaml`, which reproduces it."""
    source, best = study.folder_of(winner.number).path, study.folder / "best"
    draft = study.folder / ".best.draft"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft, ignore=shutil.ignore_patterns("checkpoints", "wandb", "tensorboard", ".lock"))
    shutil.rmtree(best, ignore_errors=True)
    draft.rename(best)
    config = dataclasses.replace(read_run_config(source), resume=None)
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


def say(study: Study, ranked: list[FrozenTrial], answer: dict[str, Any]) -> None:
    """The study's end on the terminal."""
    names = study.objectives
    counts = ", ".join(
        f"{len(study.trials(state))} {word}"
        for state, word in (
            (TrialState.COMPLETE, "complete"),
            (TrialState.PRUNED, "pruned"),
            (TrialState.FAIL, "failed"),
        )
    )
    lines = [f"study {study.name}: {counts}"]
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
    weights = importances(study.optuna)
    if weights:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in weights.items())
        lines.append(f"  what mattered  {shares}")
    lines += _test_lines(answer)
    for trial in study.trials(TrialState.FAIL):
        lines.append(f"  trial {trial.number:<4} failed: {trial.user_attrs.get('error')}")
    place = shlex.quote(os.path.relpath(study.folder))
    lines += [
        f"  the winner     {place}/best: trial {answer['trial']}'s run folder",
        f'  use it         python -m finetune.generate {place}/best --prompt "…"',
        f"  run it again   python -m finetune --config-dir {place} experiment=best",
        f"  look at all    python -m sweeps show {place}",
    ]
    if any(study.folder.glob("trials/*/wandb/offline-run-*")):
        lines.append(f"  W&B            offline; wandb sync {place}/trials/*/wandb/offline-run-*")
    log.info("%s", "\n".join(lines))


def _test_lines(answer: dict[str, Any]) -> list[str]:
    test = answer["test"]
    if test is None:
        return []
    rows = f"on {test['rows']} rows that no choice has seen"
    if "difference" not in test:
        same = ": the baseline itself" if answer["baseline"] == answer["trial"] else ""
        return [f"  test loss      {test['winner']:.4f} {rows}{same}"]
    low, high = test["interval_95"]
    sure = "better" if high < 0 else "worse" if low > 0 else "no clear difference"
    return [
        f"  test loss      {test['winner']:.4f}, baseline {test['baseline']:.4f} {rows}",
        f"                 {test['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}: {sure}",
    ]
