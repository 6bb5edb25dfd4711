"""Whether the process of a sweep command lives, as its workers see it."""

import pickle
import subprocess
import sys
import time

from sweeps.study.sweeper_process import SweeperProcess


def test_a_process_of_this_machine_is_dead_once_it_has_ended() -> None:
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE
    ) as process:
        sweeper = SweeperProcess(pid=process.pid)
        assert not sweeper.is_dead
        assert not sweeper.is_this
        process.kill()
        # Until its parent asks for its exit code, it is in the table of processes.
        end = time.monotonic() + 30
        while not sweeper.is_dead:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.wait()
    assert sweeper.is_dead


def test_of_a_process_elsewhere_it_is_not_known() -> None:
    assert not SweeperProcess(pid=2**22 + 1, process_table="another machine").is_dead
    assert SweeperProcess(pid=2**22 + 1).is_dead


def test_the_process_knows_itself_after_it_was_pickled() -> None:
    sweeper = pickle.loads(pickle.dumps(SweeperProcess()))
    assert sweeper.is_this
    assert not sweeper.is_dead
