"""The places of a session's workers, one for each GPU: a new worker waits for the one before."""

import contextlib
import os
import pickle
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sweeps.study import worker_place as module
from sweeps.study.session import Session
from sweeps.study.sweeper_process import SweeperProcess
from sweeps.study.worker_place import has_begun, remove_free_places, worker_place

NO_PROCESS = 2**22 + 1
"""Linux has no larger process number than 2**22."""


def session_of(folder: Path, pid: int = 1, is_orphaned: bool = False) -> Any:
    session = SimpleNamespace(
        folder=folder, sweeper=SweeperProcess(pid=pid), is_orphaned=is_orphaned
    )
    session.file_prefix = lambda purpose: Session.file_prefix(session, purpose)  # type: ignore[arg-type]
    return session


def test_a_worker_waits_for_its_own_place_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    session = session_of(tmp_path)
    began, went_on = threading.Event(), threading.Event()

    def replace() -> None:
        began.set()
        with worker_place(session, 0):
            went_on.set()

    thread = threading.Thread(target=replace)
    with worker_place(session, 0):
        with worker_place(session, 1), worker_place(session_of(tmp_path, 2), 0):
            pass  # another worker's, and another session's
        thread.start()
        assert began.wait(10)
        assert not went_on.wait(0.2)
    assert went_on.wait(10)
    thread.join()


def test_workers_on_other_hosts_share_the_session_s_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(tmp_path)
    stop = session.file_prefix("stop")
    elsewhere = session_of(tmp_path)
    elsewhere.sweeper = pickle.loads(pickle.dumps(session.sweeper))
    monkeypatch.setattr(socket, "gethostname", lambda: "another-host")
    assert elsewhere.file_prefix("stop") == stop
    with worker_place(elsewhere, 0):
        assert has_begun(session)


def test_places_whose_workers_have_ended_leave_no_file(tmp_path: Path) -> None:
    session, killed = session_of(tmp_path), session_of(tmp_path, NO_PROCESS)
    assert not has_begun(session)
    for ended in (session, killed):
        with worker_place(ended, 1):
            pass
    with contextlib.ExitStack() as stack:
        stack.enter_context(worker_place(session, 0))
        assert has_begun(session)
        remove_free_places(session)
        (left,) = tmp_path.iterdir()
        assert left.name.endswith("-1-0.lock")
    remove_free_places(session)
    assert not list(tmp_path.iterdir())


def test_a_session_leaves_the_places_of_one_that_lives(tmp_path: Path) -> None:
    other = session_of(tmp_path, os.getppid())
    with worker_place(other, 0):
        pass
    remove_free_places(session_of(tmp_path))
    assert has_begun(other)


def test_a_session_leaves_the_places_of_another_host(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    # Their names begin with this one's.
    hosts = [f"{session.sweeper.host}-{name}" for name in ("gpu", "2")]
    files = [tmp_path / f".worker-{host}-{NO_PROCESS}-0.lock" for host in hosts]
    for file in files:
        file.touch()
    remove_free_places(session)
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_a_worker_whose_command_was_killed_removes_its_place(tmp_path: Path) -> None:
    with worker_place(session_of(tmp_path, is_orphaned=True), 0):
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_a_place_that_can_not_be_removed_hides_no_error(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    # A folder is no lock file, for any user.
    (tmp_path / f"{session.file_prefix('worker')}-0.lock").mkdir()
    remove_free_places(session)
