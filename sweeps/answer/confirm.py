"""Confirm a study's winner: retrain the best trials with other seeds, and compare them again.

The winner is chosen by the held-out rows, as in the study. The test rows only show how much better
it is.
"""

import dataclasses
import itertools
import logging
import os
import shlex
import shutil
from collections.abc import Sequence
from typing import Any

from optuna.trial import FrozenTrial

from finetune.errors import ConfigError, Interrupted, NoAnswer
from finetune.files.atomic import write_json
from finetune.files.lock import file_lock
from finetune.files.mirror import Mirror
from finetune.files.run_folder import RunFolder
from finetune.run.load import read_run_config
from sweeps.answer.candidates import evaluate_candidates, repeats_of
from sweeps.space.feasibility import why_no_winner
from sweeps.study.inside import is_inside
from sweeps.study.repeats import Repeat, retrain
from sweeps.study.roles import role
from sweeps.study.study import CONFIRMATION, Study

log = logging.getLogger(__name__)


TOP = 3
"""Default number of best trials that are retrained; the baseline is always added."""


def confirm(study: Study, seeds: int, top: int = TOP) -> dict[str, Any]:
    """Retrain the best trials and the baseline with other seeds, and write `confirm.json`.

    Runs that an earlier call has trained are reused, so the same call resumes an interrupted one.
    A second call at the same time waits for the first.

    Args:
        study: the study.
        seeds: number of seeds for each trial.
        top: number of best trials.

    Returns:
        The content of `confirm.json`.

    Raises:
        ConfigError: if there is no complete trial, or no single best one.
        Interrupted: on SIGINT or SIGTERM.
    """
    # Two confirmations at once would train in the same folders.
    with file_lock(study.folder / ".confirm.lock"):
        return _confirm(study, seeds, top)


def _confirm(study: Study, seeds: int, top: int) -> dict[str, Any]:
    candidates = _select_candidates(study, top)
    repeats = _plan_repeats(study, candidates, seeds)
    names = ", ".join(f"trial {trial.number}" for trial in candidates)
    log.info(
        "confirming %s with %d other seeds: %d runs",
        names,
        seeds,
        len(repeats),
    )
    try:
        errors = retrain(study, repeats)
        confirmation = evaluate_candidates(study, candidates, repeats, errors)
        write_json(study.folder / CONFIRMATION, confirmation)
        with_adapter = _ensure_adapter(study, repeats, confirmation["winner"])
    except (Interrupted, KeyboardInterrupt):
        folder = shlex.quote(os.path.relpath(study.folder))
        command = f"python -m sweeps confirm {folder} --top {top} --seeds {seeds}"
        raise Interrupted(f"interrupted; resume with: {command}") from None
    # Last, because an interrupted call goes on from the checkpoints, and may need the adapters.
    _remove_unneeded_files(repeats, with_adapter)
    return confirmation


def _remove_unneeded_files(
    repeats: Sequence[Repeat], with_adapter: Sequence[Repeat]
) -> None:
    """Remove the checkpoints of all repeats, and the adapters of those that need none."""
    for repeat in repeats:
        shutil.rmtree(repeat.folder.checkpoints, ignore_errors=True)
        if repeat not in with_adapter:
            shutil.rmtree(repeat.folder.adapter, ignore_errors=True)
        Mirror(repeat.config.mirror).copy_run(repeat.folder.path)
    Mirror.finish()


def _select_candidates(study: Study, top: int) -> list[FrozenTrial]:
    """Select the best trials and the baseline."""
    if len(study.objectives) > 1:
        raise ConfigError(
            f"study {study.name}: has several objectives, so no single best trial"
        )
    ranked = study.ranked()
    if not ranked:
        raise NoAnswer(
            f"study {study.name}: {why_no_winner(study.trials())}; nothing to confirm"
        )
    best = list(itertools.islice(filter(is_inside, ranked), top))
    # In the order of the ranking: the first one is the winner before the confirmation.
    return [
        trial
        for trial in ranked
        if trial in best or trial == ranked[0] or role(trial) == "baseline"
    ]


def _plan_repeats(
    study: Study, candidates: Sequence[FrozenTrial], seeds: int
) -> list[Repeat]:
    """Plan one run for each seed and candidate, with seeds that no candidate has used."""
    folders = [study.folder_of(trial.number).path for trial in candidates]
    configs = [read_run_config(folder) for folder in folders]
    # Above the largest, because the seed itself may be searched.
    first_seed = max(config.seed for config in configs) + 1
    repeats = []
    for seed in range(first_seed, first_seed + seeds):
        for trial, config in zip(candidates, configs, strict=True):
            path = study.folder / "confirm" / f"{trial.number}-seed{seed}"
            config_with_seed = dataclasses.replace(config, seed=seed)
            repeat = Repeat(
                trial.number,
                seed,
                RunFolder(path),
                config_with_seed,
                "confirm",
            )
            repeats.append(repeat)
    return repeats


def _ensure_adapter(
    study: Study, repeats: Sequence[Repeat], winner: int
) -> list[Repeat]:
    """Ensure that the winner has an adapter, of the trial itself or of one of its repeats.

    An earlier confirmation, with another winner, may have removed the repeats' adapters too. Then
    one of them is trained again.

    Returns:
        The repeats whose adapters must stay: the winner's, if the trial's own adapter is gone.
    """
    if study.folder_of(winner).adapter.is_dir():
        return []
    winners = repeats_of(repeats, winner)
    if not any(repeat.folder.adapter.is_dir() for repeat in winners):
        winners[0].folder.clear()
        retrain(study, winners[:1])
    return winners
