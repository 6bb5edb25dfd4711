"""Each private name of another library exists, and behaves as `sweeps.compat` says."""

import inspect
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import RDBStorage, get_storage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeps import compat
from sweeps.study.storage import open_storage


def database(folder: Path) -> RDBStorage:
    return RDBStorage(f"sqlite:///{folder / 'studies.db'}")


def waiting_trial(storage: Any) -> tuple[optuna.Study, int]:
    """A study's only trial, which waits; the storage holds another study's before it."""
    optuna.create_study(study_name="other", storage=storage).ask()
    study = optuna.create_study(study_name="s", storage=storage)
    study.add_trial(create_trial(state=TrialState.WAITING))
    study_id = storage.get_study_id_from_name("s")
    return study, storage.get_trial_id_from_study_id_trial_number(study_id, 0)


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_an_enqueued_point_is_what_the_trial_suggests(
    kind: str, tmp_path: Path
) -> None:
    storage = (
        open_storage(None, tmp_path)
        if kind == "journal"
        else get_storage(database(tmp_path))
    )
    study, trial_id = waiting_trial(storage)

    compat.enqueue_point(storage, trial_id, {"lora.r": 7})
    trial = study.ask()

    assert compat.enqueued_point(storage.get_trial(trial_id)) == {"lora.r": 7}
    assert trial.number == 0
    assert trial.suggest_int("lora.r", 1, 64) == 7


def test_optunas_enqueued_trials_have_their_point_in_the_same_place() -> None:
    study = optuna.create_study()
    study.enqueue_trial({"x": 1})
    study.add_trial(create_trial(state=TrialState.WAITING))

    assert [compat.enqueued_point(trial) for trial in study.get_trials()] == [
        {"x": 1},
        None,
    ]


def test_a_waiting_trial_is_claimed_by_one_token(tmp_path: Path) -> None:
    storage = database(tmp_path)
    _, trial_id = waiting_trial(storage)

    claims = [
        compat.claim_waiting_trial(storage, trial_id, token)
        for token in ("a", "a", "b")
    ]

    trial = storage.get_trial(trial_id)
    assert claims == [True, True, False]
    assert (trial.state, trial.system_attrs) == (TrialState.RUNNING, {"claim": "a"})
    assert trial.datetime_start is not None


def test_a_row_is_found_by_study_and_number(tmp_path: Path) -> None:
    storage = database(tmp_path)
    study, trial_id = waiting_trial(storage)
    study_id = storage.get_study_id_from_name(study.study_name)

    with storage.scoped_session() as session:
        row = compat.trial_row(session, study_id, 0)
        assert row is not None
        assert row.trial_id == trial_id
        assert compat.trial_row(session, study_id, 1) is None


def test_all_calls_of_optunas_cache_to_its_database_are_known() -> None:
    """One that were not repeated would end a worker whose connection was lost."""
    source = inspect.getsource(_CachedStorage)
    called = {name for name in vars(RDBStorage) if f"self._backend.{name}(" in source}
    heartbeats = {
        name for name in called if "heartbeat" in name or "stale" in name
    }  # not used
    of_no_transaction = {"remove_session", "check_trial_is_updatable"}

    assert called >= {
        "_create_new_trial",
        "_get_trials",
        "_set_trial_param",
        "get_trial",
    }
    assert all(callable(getattr(RDBStorage, name)) for name in compat.RDB_CALLS)
    assert called - heartbeats - of_no_transaction <= {
        *compat.RDB_CALLS,
        "set_trial_state_values",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=choice(1,2)", CategoricalDistribution([1, 2])),
        ("x=range(1,5)", IntDistribution(1, 4)),
        ("x=tag(log,interval(0.1,1))", FloatDistribution(0.1, 1, log=True)),
        ("x=3", "3"),
    ],
)
def test_overrides_have_the_distributions_of_hydras_sweeper(
    text: str, expected: object
) -> None:
    (override,) = OverridesParser.create().parse_overrides([text])

    assert compat.sweep_distribution(override) == expected


def test_the_error_of_a_failed_job_is_read_in_silence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    error = ValueError("no")
    failed, completed = JobReturn(), JobReturn()
    failed.return_value, failed.status = error, JobStatus.FAILED
    completed.return_value, completed.status = 1.5, JobStatus.COMPLETED

    assert compat.job_error(failed) is error
    assert compat.job_error(completed) is None
    assert capfd.readouterr() == ("", "")


def test_a_filtered_study_hides_trials_from_its_sampler() -> None:
    seen: list[list[int]] = []

    class Looks(optuna.samplers.RandomSampler):
        def sample_independent(
            self, study: optuna.Study, trial: FrozenTrial, *arguments: Any
        ) -> Any:
            trials = study.get_trials(deepcopy=False)
            seen.append([other.number for other in trials])
            # What samplers call.
            assert study._get_trials(deepcopy=False, use_cache=True) == trials
            return super().sample_independent(study, trial, *arguments)

    storage = optuna.storages.InMemoryStorage()
    whole = optuna.create_study(storage=storage, study_name="s")
    for value in (0.0, 1.0, 2.0):
        whole.add_trial(optuna.trial.create_trial(value=value))
    pruner = optuna.pruners.NopPruner()
    study = compat.filtered_study(
        "s", storage, Looks(), pruner, lambda trial: trial.value != 1
    )
    study.ask().suggest_float("x", 0, 1)
    assert seen == [[0, 2, 3]]


def test_a_study_with_more_trials_shows_them_to_readers_only() -> None:
    study = optuna.create_study()
    study.ask()
    more = [create_trial(value=1.0), create_trial(state=TrialState.PRUNED)]
    extended = compat.study_with_trials(study, lambda trials: [*more, *trials])
    assert len(extended.get_trials()) == 3
    assert extended.get_trials(states=(TrialState.COMPLETE,)) == more[:1]
    assert len(study.get_trials()) == 1
    waiting = compat.waiting_trial({"lora.r": 8}, "added")
    study.add_trial(waiting)
    # Optuna's own reader of an enqueued point takes it.
    assert study.ask().suggest_int("lora.r", 4, 16) == 8
