"""Leases on a real PostgreSQL: who may take which trial, and when."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from support.postgres import Server

from sweeps.compat import database_of
from sweeps.study import leases
from sweeps.study.errors import LeaseLost, StorageLost
from sweeps.study.leases import Leases, open_leases
from sweeps.study.storage import open_storage

pytestmark = pytest.mark.fault


class Machine:
    """A process on a machine of its own, with the leases of a study's only trial."""

    def __init__(self, server: Server, name: str, folder: Path, seconds: float) -> None:
        self.storage: Any = open_storage(server.address, folder)
        opened = open_leases(self.storage, folder / name, seconds)
        assert opened is not None
        self.leases: Leases = opened
        self.study = optuna.create_study(
            study_name=folder.name, storage=self.storage, load_if_exists=True
        )
        if not self.study.trials:
            self.study.add_trial(create_trial(state=TrialState.WAITING))
        study_id = self.storage.get_study_id_from_name(folder.name)
        get_id = self.storage.get_trial_id_from_study_id_trial_number
        self.trial_id: int = get_id(study_id, 0)

    @property
    def trial(self) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[0]

    @property
    def sees_it_free(self) -> bool:
        return bool(self.leases.free({self.trial_id: self.trial}))

    def take(self) -> bool:
        return self.leases.take(self.trial_id, self.trial)

    def watch_for(self, seconds: float) -> None:
        """As if the database had been in reach for so long."""
        database: Any = database_of(self.storage)
        database._connected_since -= seconds


MakeMachine = Callable[..., Machine]


@pytest.fixture
def machine(server: Server, tmp_path: Path) -> MakeMachine:
    def make(name: str, seconds: float = 300.0) -> Machine:
        return Machine(server, name, tmp_path, seconds)

    return make


def test_a_silent_trial_is_taken_once_the_database_was_watched(
    machine: MakeMachine, server: Server
) -> None:
    one, other, third = machine("one"), machine("other"), machine("third")
    assert one.leases.claim(one.trial_id)
    assert not other.leases.claim(other.trial_id)
    assert not other.sees_it_free
    server.silence()
    assert not other.sees_it_free, "its machine may not have had time to come back"
    for taker in (other, third):
        taker.watch_for(300)
        assert taker.sees_it_free
    stale = third.trial

    assert other.take()
    assert not third.leases.take(third.trial_id, stale), "two have taken it"
    assert other.leases.holds(other.trial_id)
    with pytest.raises(LeaseLost):
        one.leases.require(one.trial_id)
    other.leases.require(other.trial_id)


def test_a_heartbeat_that_comes_back_in_time_keeps_the_trial(
    machine: MakeMachine, server: Server
) -> None:
    one, other = machine("one"), machine("other")
    one.leases.claim(one.trial_id)
    server.silence()
    other.watch_for(300)
    assert other.sees_it_free
    one.leases.require(one.trial_id)  # it writes one

    assert not other.take()
    assert not other.sees_it_free
    assert one.leases.holds(one.trial_id)


def test_a_trial_that_is_given_back_is_free_at_once(machine: MakeMachine) -> None:
    one, other = machine("one"), machine("other")
    one.leases.claim(one.trial_id)
    one.leases.release(one.trial_id)

    assert other.sees_it_free
    assert other.take()
    assert not one.leases.holds(one.trial_id)
    assert not one.sees_it_free


def test_each_trial_is_lost_by_the_time_of_the_machine_that_has_it(
    machine: MakeMachine, server: Server
) -> None:
    patient, hasty = machine("patient", 7200.0), machine("hasty", 10.0)
    patient.leases.claim(patient.trial_id)
    server.silence()
    hasty.watch_for(10_000)

    assert not hasty.sees_it_free
    server.silence()
    server.silence()
    assert hasty.sees_it_free


def test_a_connection_that_was_away_is_watched_anew(
    machine: MakeMachine, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = machine("one"), machine("other")
    one.leases.claim(one.trial_id)
    server.silence()
    other.watch_for(300)
    assert other.sees_it_free
    database: Any = database_of(other.storage)
    database._last_call -= 100  # no call for longer than two heartbeats

    assert not other.sees_it_free


def test_heartbeats_keep_a_trial_and_show_that_another_has_it(
    machine: MakeMachine, server: Server
) -> None:
    one, other = machine("one", seconds=10.0), machine("other", seconds=10.0)
    one.leases.claim(one.trial_id)
    given_up: list[StorageLost] = []
    with one.leases.kept_alive(given_up.append):
        server.silence()
        other.watch_for(100)
        wait_until(lambda: not other.sees_it_free)
        # Its process stands still for an hour, and another one is faster than its next heartbeat.
        wait_until(lambda: server.silence() is None and other.take())
        wait_until(lambda: not one.leases.holds(one.trial_id))
    assert not given_up


def test_a_worker_that_can_write_no_heartbeat_gives_up_before_others_take_its_trials(
    machine: MakeMachine, server: Server
) -> None:
    one = machine("one", seconds=10.0)
    one.leases.claim(one.trial_id)
    given_up: list[StorageLost] = []
    with one.leases.kept_alive(given_up.append):
        server.stop()
        try:
            wait_until(lambda: bool(given_up))
        finally:
            server.start()
    assert "took no heartbeat for" in str(given_up[0])
    assert "tester@127.0.0.1" in str(given_up[0])


def test_a_trial_of_an_older_version_stays_with_its_folder(
    machine: MakeMachine, tmp_path: Path
) -> None:
    one, other = machine("one"), machine("other")
    one.storage.set_trial_state_values(one.trial_id, TrialState.RUNNING)
    other.watch_for(10_000)

    assert not other.sees_it_free
    assert not other.leases.covers(other.trial)
    (tmp_path / "one" / "trials" / "0").mkdir(parents=True)
    assert one.sees_it_free
    assert one.take()
    assert one.leases.covers(one.trial)


def test_this_machine_is_told_by_its_name_and_its_id() -> None:
    assert leases._machine() == leases.MACHINE
    assert len(leases.MACHINE) > 1


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
