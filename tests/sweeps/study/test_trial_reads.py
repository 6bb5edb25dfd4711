"""What a worker reads of a database's trials: each change, and no waiting trial twice."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from sweeps.compat import database_of, enqueue_point
from sweeps.study.storage import open_storage
from sweeps.study.study import Study

WAITING = 40

Opens = Callable[[], Study]


@pytest.fixture
def opens(tmp_path: Path) -> Opens:
    """Opens a study with waiting trials as another process does."""
    address = f"sqlite:///{tmp_path}/trials.db"
    optuna.create_study(study_name="s", storage=open_storage(address, tmp_path))

    def open_study() -> Study:
        return Study(tmp_path, "s", address)

    open_study().add_waiting_trials(range(WAITING))
    return open_study


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the trials that were read from a database with all their values."""
    numbers: list[int] = []
    build = RDBStorage._build_frozen_trial_from_trial_model

    def noted(self: RDBStorage, row: Any) -> Any:
        numbers.append(row.number)
        return build(self, row)

    monkeypatch.setattr(RDBStorage, "_build_frozen_trial_from_trial_model", noted)
    return numbers


def test_a_waiting_trial_is_read_once_and_a_running_one_each_time(
    opens: Opens, built: list[int]
) -> None:
    reader, worker = opens(), opens()

    def read() -> list[int]:
        built.clear()
        assert len(reader.trials()) == WAITING
        return list(built)

    assert read() == list(range(WAITING))
    assert read() == []
    for number in (3, 4):
        worker.storage.set_trial_state_values(
            worker.trial_id(number), TrialState.RUNNING
        )
    assert read() == read() == [3, 4]
    worker.storage.set_trial_state_values(
        worker.trial_id(4), TrialState.COMPLETE, [0.5]
    )
    assert read() == [3, 4]
    assert read() == [3]
    enqueue_point(worker.storage, worker.trial_id(9), {"x": 1.0})
    worker.announce_points()
    assert len(read()) == WAITING - 1
    assert read() == [3]


def test_a_reader_sees_what_one_sees_that_has_read_nothing_before(opens: Opens) -> None:
    chance = random.Random(1)
    reader, worker = opens(), opens()
    database: Any = database_of(worker.storage)
    for step in range(120):
        number = chance.randrange(len(worker.trials()))
        trial_id = worker.trial_id(number)
        state = worker.storage.get_trial(trial_id).state
        if step % 30 == 29:
            count = len(worker.trials())
            worker.add_waiting_trials(range(count, count + 3))
        elif state == TrialState.WAITING and chance.random() < 0.3:
            enqueue_point(worker.storage, trial_id, {"x": chance.random()})
            worker.announce_points()
        elif state == TrialState.WAITING:
            worker.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        elif state == TrialState.RUNNING and chance.random() < 0.5:
            worker.storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        elif state == TrialState.RUNNING:
            worker.storage.set_trial_param(trial_id, "x", 0.5, FloatDistribution(0, 1))
            worker.storage.set_trial_intermediate_value(trial_id, step, 2.0)
            worker.storage.set_trial_user_attr(trial_id, "step", step)
        if chance.random() < 0.2:
            assert reader.trials() == opens().trials()
    assert len({trial.state for trial in reader.trials()}) == 3
    assert database.get_all_trials(reader._study_id) == reader.trials()


def test_waiting_trials_are_added_once_by_two_machines(opens: Opens) -> None:
    one, other = opens(), opens()
    one.add_waiting_trials(range(WAITING, WAITING + 5))
    other.add_waiting_trials(range(WAITING, WAITING + 8))

    numbers = [trial.number for trial in one.trials(TrialState.WAITING)]
    assert numbers == list(range(WAITING + 8))
