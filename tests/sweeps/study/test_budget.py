"""A study's budget in training tokens: when it ends, how it goes on, and what counts."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial
from support.commands import Forked, Station, run_cli
from support.configs import study_overrides
from support.matrix import further
from support.studies import made_study
from support.study_folder import folder_of, result_of, told, trials_of

from sweeps.study.budget import describe_spent_tokens, has_spent_tokens, trained_tokens
from sweeps.study.claims import claim_trial
from sweeps.study.study import FINISHED, Study
from sweeps.study.waiting import enqueue_trials

WHOLE = ("hydra/sweeper/pruner=none", "trainer.save_steps=1")
"""Trials that run to their end, with a checkpoint after each step."""


def search(station: Station, base: Path, cwd: Path, *overrides: str) -> Forked | Any:
    return station.run(
        *study_overrides(base, "s"),
        "hydra.sweeper.n_trials=null",
        "hydra.sweeper.baseline_seeds=0",
        *overrides,
        cwd=cwd,
    )


def tokens_of(cwd: Path) -> list[int]:
    """Return the tokens of each trial's `result.json`."""
    return [result_of(cwd, trial.number)["train_tokens"] for trial in trials_of(cwd)]


@pytest.fixture(scope="module")
def tokens(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> int:
    """The tokens of one whole trial; all trials of a study train on the same rows."""
    cwd = tmp_path_factory.mktemp("one")
    ended = search(station, tiny_base, cwd, *WHOLE, "hydra.sweeper.max_tokens=1")
    assert ended.returncode == 0, ended.stderr
    (count,) = tokens_of(cwd)
    return count


@pytest.mark.parametrize(
    ("attributes", "result", "count"),
    [
        ({"train_tokens": 70}, {"train_tokens": 50}, 70),
        ({}, {"train_tokens": 50}, 50),
        ({}, {"status": "failed"}, 0),
        ({}, None, 0),
    ],
)
def test_finished_and_running_trials_count(
    attributes: dict[str, int],
    result: dict[str, Any] | None,
    count: int,
    tmp_path: Path,
) -> None:
    running = create_trial(
        state=TrialState.RUNNING, user_attrs={"train_tokens": 30, "steps": 9}
    )
    ended = create_trial(state=TrialState.FAIL, user_attrs=attributes)
    study = made_study(tmp_path / "s", [running, ended])
    folder = study.folder_of(1).path
    folder.mkdir(parents=True)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))

    assert trained_tokens(study) == 30 + count


def test_a_budget_is_spent_once_it_is_reached(tmp_path: Path) -> None:
    attributes = {"train_tokens": 1200}
    ended = create_trial(state=TrialState.PRUNED, user_attrs=attributes)
    study = made_study(tmp_path / "s", [ended])
    assert not has_spent_tokens(study)

    enqueue_trials(study, None, [], 1201)
    assert not has_spent_tokens(study)
    assert describe_spent_tokens(study) == ""
    enqueue_trials(study, None, [], 1200)
    assert has_spent_tokens(study)
    assert describe_spent_tokens(study) == (
        "the budget is spent (1,200 of 1,200 tokens trained); "
        "hydra.sweeper.max_tokens=2400 goes on"
    )


def test_without_a_number_of_trials_a_claim_adds_the_trial_that_it_needs(
    tmp_path: Path,
) -> None:
    study = made_study(tmp_path / "s", [])
    enqueue_trials(study, None, [("start", {"lora.r": 4})])
    assert len(study.trials()) == 1
    # The same command again has the same points.
    enqueue_trials(study, None, [("start", {"lora.r": 4})])
    assert len(study.trials()) == 1

    with claim_trial(study) as first, claim_trial(study) as second:
        assert first is not None
        assert second is not None
        assert (first.number, second.number) == (0, 1)
        with claim_trial(study, lambda _: False) as refused:
            assert refused is None
    assert len(study.trials()) == 2


@pytest.mark.fault
@pytest.mark.parametrize("workers", [*further(1), 2])
def test_claims_stop_once_the_budget_is_reached(
    workers: int, tokens: int, tiny_base: Path, tmp_path: Path
) -> None:
    budget = int(3.5 * tokens)
    ended = run_cli(
        *study_overrides(tiny_base, "s"),
        *WHOLE,
        "hydra.sweeper.n_trials=null",
        f"hydra.sweeper.max_tokens={budget}",
        f"hydra.sweeper.n_jobs={workers}",
        cwd=tmp_path,
        OMP_NUM_THREADS="1",
    )
    assert ended.returncode == 0, ended.stderr

    states = [trial.state for trial in trials_of(tmp_path)]
    assert states == [TrialState.COMPLETE] * len(states)
    # Each worker trains one trial at the limit, which goes on to its end.
    assert 4 <= len(states) <= 3 + workers
    counted = trained_tokens(Study.load(folder_of(tmp_path)))
    assert counted == sum(tokens_of(tmp_path)) == len(states) * tokens
    assert f"the budget is spent ({counted:,} of {budget:,}" in ended.stderr


@pytest.mark.fault
def test_a_spent_budget_trains_nothing_and_a_larger_one_goes_on(
    tokens: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    def run(budget: int, *overrides: str) -> str:
        maximum = f"hydra.sweeper.max_tokens={budget}"
        ended = search(station, tiny_base, tmp_path, *WHOLE, maximum, *overrides)
        assert ended.returncode == 0, ended.stderr
        return str(ended.stdout + ended.stderr)

    run(2 * tokens)
    first = [told(trial) for trial in trials_of(tmp_path)]
    assert len(first) == 2
    again = run(2 * tokens)
    assert f"2 trials, more until the budget is spent, {2 * tokens:,} of" in again
    assert f"hydra.sweeper.max_tokens={4 * tokens} goes on" in again
    assert [told(trial) for trial in trials_of(tmp_path)] == first
    # The budget ends the study before its number of trials too.
    run(2 * tokens, "hydra.sweeper.n_trials=3")
    assert [told(trial) for trial in trials_of(tmp_path, *FINISHED)] == first
    run(4 * tokens)
    assert [told(trial) for trial in trials_of(tmp_path)][:2] == first
    assert len(trials_of(tmp_path, TrialState.COMPLETE)) == 4


DIES_IN_ITS_SECOND_TRIAL = """
import os
from finetune.engine.packed.bank import Bank
learn = Bank.forward_backward
batches = []
def dies(self, requests):
    batches.append(1)
    if len(batches) == 6:
        os.kill(os.getpid(), 9)
    return learn(self, requests)
Bank.forward_backward = dies
"""
"""Each trial has three steps of one batch: the kill comes before the second trial's last one."""


@pytest.mark.fault
@pytest.mark.parametrize("overrun", [False, True], ids=["in budget", "spent before"])
def test_a_killed_trial_counts_once_and_goes_on_to_its_end(
    overrun: bool, tokens: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    trials = 2 if overrun else 3
    # Spent: the first trial and the checkpoint of the second have reached the budget.
    budget = int(1.1 * tokens) if overrun else int(2.5 * tokens)
    study = (
        *study_overrides(tiny_base, "s"),
        *WHOLE,
        "hydra.sweeper.n_trials=null",
        f"hydra.sweeper.max_tokens={budget}",
        "trainer.eval_steps=1",
    )
    killed = station.run(*study, cwd=tmp_path, before=DIES_IN_ITS_SECOND_TRIAL)
    assert killed.returncode == -signal.SIGKILL
    states = [trial.state for trial in trials_of(tmp_path)]
    assert states == [TrialState.COMPLETE, TrialState.RUNNING]
    partial = trained_tokens(Study.load(folder_of(tmp_path)))
    assert tokens < partial < 2 * tokens
    assert (partial >= budget) is overrun

    ended = station.run(*study, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert [trial.state for trial in trials_of(tmp_path)] == (
        [TrialState.COMPLETE] * trials
    )
    assert tokens_of(tmp_path) == [tokens] * trials
    assert trained_tokens(Study.load(folder_of(tmp_path))) == trials * tokens


def test_the_baseline_trains_with_further_seeds_before_the_budget_is_spent(
    tokens: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    ended = search(
        station,
        tiny_base,
        tmp_path,
        *WHOLE,
        "hydra.sweeper.slots=2",
        "hydra.sweeper.baseline_seeds=1",
        f"hydra.sweeper.max_tokens={3 * tokens}",
    )
    assert ended.returncode == 0, ended.stderr

    seed = folder_of(tmp_path) / "baseline" / "seed1" / "result.json"
    assert json.loads(seed.read_text())["status"] == "completed"
    assert trained_tokens(Study.load(folder_of(tmp_path))) == sum(tokens_of(tmp_path))
