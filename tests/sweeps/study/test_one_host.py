"""Who may write to a journal on a network file system."""

import errno
import gc
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.studies import made_study

from finetune.errors import ConfigError
from sweeps.study import one_host
from sweeps.study.one_host import Hold, file_system_type
from sweeps.study.storage import hold_database_file

OTHER_HOST = {"host": "node7", "kernel": "another"}


@pytest.fixture
def network_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything lies on NFS, whose records are renewed ten times a second."""
    monkeypatch.setattr(one_host, "file_system_type", lambda path: "nfs4")
    monkeypatch.setattr(one_host, "RENEW_SECONDS", 0.1)


class OtherHost:
    """Renews its record as a session there does."""

    def __init__(self, file: Path) -> None:
        self._record = file.with_name(file.name + ".host")
        one_host.write_json(self._record, OTHER_HOST)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._renew)
        self._thread.start()

    def _renew(self) -> None:
        while not self._is_over.wait(0.05):
            self._record.touch()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()


def test_the_type_of_a_file_system_is_that_of_the_innermost_mount(
    tmp_path: Path,
) -> None:
    shown = subprocess.run(
        ["stat", "-f", "-c", "%T", "/proc"], capture_output=True, text=True
    )
    assert file_system_type(Path("/proc/self/status")) == shown.stdout.strip() == "proc"
    assert file_system_type(tmp_path / "not there yet") not in ("", "proc")


def test_a_second_host_is_refused_while_the_first_one_writes(
    network_file_system: None, tmp_path: Path
) -> None:
    study = made_study(tmp_path / "s", [])
    journal = tmp_path / "s/study.journal"
    other = OtherHost(journal)
    try:
        with pytest.raises(ConfigError) as refused:
            _write(tmp_path / "s")
    finally:
        other.end()
    line = str(refused.value)
    assert line.startswith(f"hydra.sweeper.storage=null: {journal} is on a network")
    assert "(nfs4), and node7 writes to it" in line
    assert "postgresql://" in line
    assert "\n" not in line
    # It may still be read, as by `python -m sweeps show`.
    assert study.trials() == []


def _write(folder: Path) -> None:
    from sweeps.study.study import Study

    Study(folder, folder.name, None).optuna.set_user_attr("x", 1)


def test_a_host_that_has_ended_is_followed_by_another(
    network_file_system: None, tmp_path: Path
) -> None:
    made_study(tmp_path / "s", [])
    other = OtherHost(tmp_path / "s/study.journal")
    other.end()

    _write(tmp_path / "s")

    record = one_host.read_json(tmp_path / "s/study.journal.host")
    assert record == one_host.this_host()


def test_a_host_that_slept_while_another_took_over_writes_no_more(
    network_file_system: None, tmp_path: Path
) -> None:
    hold = Hold(tmp_path / "study.journal")
    hold.require()
    one_host.write_json(tmp_path / "study.journal.host", OTHER_HOST)
    assert hold._is_lost.wait(10)
    with pytest.raises(ConfigError, match="another host writes to it"):
        hold.require()


def test_of_hosts_that_begin_together_one_writes(
    network_file_system: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has seen no record, before the other one wrote its own."""
    monkeypatch.setattr(one_host, "RENEW_SECONDS", 10.0)
    host = threading.local()
    both_have_looked = threading.Barrier(2)
    read = one_host.read_json
    holds: list[Hold] = []
    refused: list[str] = []

    def look(path: Path) -> Any:
        record = read(path)
        if not getattr(host, "has_looked", False):
            host.has_looked = True
            both_have_looked.wait(10)
        return record

    def begin(name: str) -> None:
        host.name = name
        try:
            holds.append(Hold(tmp_path / "study.journal"))
        except ConfigError as error:
            refused.append(str(error))

    names = lambda: {"host": host.name, "kernel": host.name}  # noqa: E731
    monkeypatch.setattr(one_host, "read_json", look)
    monkeypatch.setattr(one_host, "this_host", names)
    monkeypatch.setattr(one_host, "_renew", lambda *_: None)
    threads = [threading.Thread(target=begin, args=(name,)) for name in ("n1", "n2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(holds) == len(refused) == 1
    record: Any = read(tmp_path / "study.journal.host")
    winner = record["host"]
    assert f"and {winner} writes to it" in refused[0]


def test_containers_of_one_machine_write_together(
    network_file_system: None, tmp_path: Path
) -> None:
    record = tmp_path / "study.journal.host"
    one_host.write_json(record, {**one_host.this_host(), "host": "a-container"})
    hold = Hold(tmp_path / "study.journal")
    time.sleep(0.3)
    hold.require()


@pytest.mark.parametrize("outage", [1, 10])
def test_a_host_whose_file_system_is_out_of_reach_gives_up_once_another_may_write(
    outage: int,
    network_file_system: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hold = Hold(tmp_path / "study.journal")
    read, failures = one_host.read_json, iter(range(outage))
    is_back = threading.Event()

    def fail(path: Path) -> object:
        if next(failures, None) is None:
            is_back.set()
            return read(path)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(one_host, "read_json", fail)
    if outage < one_host.WATCHED_RENEWALS:
        assert is_back.wait(10)
        hold.require()
        return
    assert hold._is_lost.wait(10)
    with pytest.raises(ConfigError, match="another host writes to it"):
        hold.require()


def test_processes_of_one_host_write_together_and_leave_no_thread(
    network_file_system: None, tmp_path: Path
) -> None:
    before = set(threading.enumerate())
    holds = [Hold(tmp_path / "study.journal") for _ in range(2)]
    renewals = set(threading.enumerate()) - before
    assert len(renewals) == 2
    for hold in holds:
        hold.require()
    del hold, holds
    gc.collect()
    for renewal in renewals:
        renewal.join(10)
        assert not renewal.is_alive()


def test_a_local_file_has_no_record(tmp_path: Path) -> None:
    made_study(tmp_path / "s", [])
    assert not (tmp_path / "s/study.journal.host").exists()


def test_an_sqlite_file_is_held_too(network_file_system: None, tmp_path: Path) -> None:
    assert hold_database_file("postgresql://me@host/db") is None
    assert hold_database_file(None) is None
    address = f"sqlite:///{tmp_path}/studies.db"
    other = OtherHost(tmp_path / "studies.db")
    try:
        with pytest.raises(ConfigError, match=f"hydra.sweeper.storage={address}: "):
            hold_database_file(address)
    finally:
        other.end()
    assert hold_database_file(address) is not None
