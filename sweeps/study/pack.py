"""Runs that train together in the slots of one worker, on one base."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.console import LOG_FORMAT
from finetune.engine.steps import Executor, Request, RunSteps
from finetune.errors import Interrupted
from finetune.files.mirror import Mirror
from sweeps.study.answer_wait import answers_wait
from sweeps.study.logs import RunNameFormatter


@dataclass(eq=False)
class PackedRun:
    """A run in a slot, and the request that it waits for."""

    name: str
    steps: RunSteps[Any]
    log_file: Path
    """The file that receives the run's log lines, and no other run's."""
    packed_with: set[str]
    """Filled with the names of the runs that train together with this one."""
    request: Request | None = None
    """What the run has asked to be computed; None: it has work to do by itself."""
    response: Any = None
    """The response to the last request. An exception is raised inside the run."""
    has_ended: bool = False
    handler: logging.Handler = field(init=False)

    def __post_init__(self) -> None:
        # Opened with the first line: the run's folder may not exist yet.
        self.handler = logging.FileHandler(self.log_file, delay=True)
        self.handler.setFormatter(logging.Formatter(LOG_FORMAT))

    def resume(self) -> None:
        """Let the run work until its next request, or its end."""
        response = self.response
        self.response = None
        # It refers to the run's slot, which the run's end frees.
        self.request = None
        with self._logging():
            try:
                if isinstance(response, Exception):
                    self.request = self.steps.throw(response)
                else:
                    # A run that begins has no response: a generator's first `send` takes None.
                    self.request = self.steps.send(response)
            except StopIteration:
                self.has_ended = True

    def close(self) -> None:
        """End the run where it is."""
        with self._logging():
            self.steps.close()
        self.handler.close()

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Send log lines to the run's file, and put its name before those on the terminal."""
        logging.getLogger().addHandler(self.handler)
        RunNameFormatter.run_name = self.name
        try:
            yield
        finally:
            RunNameFormatter.run_name = None
            logging.getLogger().removeHandler(self.handler)


def train_together(next_run: Callable[[], PackedRun | None], slots: int) -> int:
    """Train runs in slots until there are no more.

    Requests that several runs have at the same time are executed together. A run without a
    request (one that begins or ends) works while the GPU executes the others' requests, so that
    its beginning and end cost them almost no time. A run that asks for answers may wait for others
    that will soon ask too, see `answers_wait`. While runs train, at most one begins in each
    pass: several that begin together would also end together, and leave the GPU idle.

    Args:
        next_run: returns the next run, or None if there is none.
        slots: number of runs that train at once, at most.

    Returns:
        The number of runs that have ended.

    Raises:
        Interrupted: the user interrupted a run. All others are brought to an end first.
    """
    try:
        return _Pack(next_run, slots).train()
    finally:
        Mirror.finish()


class _Pack:
    """The runs that train together."""

    def __init__(self, next_run: Callable[[], PackedRun | None], slots: int) -> None:
        self._next_run = next_run
        self._slots = slots
        self._runs: list[PackedRun] = []
        self._beginning: list[PackedRun] = []
        """Runs of the last pass, whose adapters another thread may still initialise."""
        self._ended = 0
        self._interrupted: Interrupted | None = None

    def train(self) -> int:
        """Train all runs; return how many have ended."""
        try:
            while self._runs or self._begin_runs(self._slots):
                due = self._due_runs()
                self._execute_requests(due)
                self._resume(due)
        finally:
            # Runs are left only after an error: a closed run frees its folder's lock.
            for run in self._runs:
                run.close()
        # Raised once all runs have ended: they share the interrupt, and each writes a checkpoint.
        if self._interrupted is not None:
            raise self._interrupted
        return self._ended

    def _begin_runs(self, limit: int) -> list[PackedRun]:
        """Fill free slots with at most `limit` new runs, and return them."""
        # A pack that memory has made smaller stays so when its slots are filled again.
        capacities = _capacities(self._runs)
        self._slots = min([self._slots, *capacities])
        begun: list[PackedRun] = []
        while (
            self._interrupted is None
            and len(self._runs) < self._slots
            and len(begun) < limit
        ):
            run = self._next_run()
            if run is None:
                break
            for member in self._runs:
                member.packed_with.add(run.name)
                run.packed_with.add(member.name)
            self._runs.append(run)
            begun.append(run)
        return begun

    def _resume(self, runs: list[PackedRun]) -> None:
        """Let some runs work, and remove those that end."""
        for run in runs:
            try:
                run.resume()
            except Interrupted as error:
                run.has_ended = True
                self._interrupted = error
        for run in runs:
            if run.has_ended:
                self._runs.remove(run)
                run.close()
                self._ended += 1

    def _due_runs(self) -> list[PackedRun]:
        """Return the runs whose requests are executed in this round."""
        requesting = [run for run in self._runs if run.request is not None]
        due = []
        for _, runs in _by_executor(requesting):
            requests = [_request_of(run) for run in runs]
            are_held = answers_wait(requests)
            for run, request in zip(runs, requests, strict=True):
                if not (are_held and request.rounds_to_answers == 0):
                    due.append(run)
        return due

    def _execute_requests(self, requesting: list[PackedRun]) -> None:
        """Execute the runs' requests, those of one bank together, while the other runs work."""
        host_work = _HostWork(self._advance_others)
        for executor, runs in _by_executor(requesting):
            requests = [_request_of(run) for run in runs]
            # Only the first call of `host_work` does anything: it fills the first bank's wait.
            responses = executor.execute(requests, host_work)
            for run, response in zip(runs, responses, strict=True):
                run.response = response
        if not requesting:
            host_work()
        if host_work.error is not None:
            raise host_work.error

    def _advance_others(self) -> None:
        """Let the runs without a request work, and begin a new one."""
        waiting = [run for run in self._runs if run.request is None]
        initialising = [run for run in waiting if run in self._beginning]
        ready = [run for run in waiting if run not in initialising]
        self._resume(ready)
        self._beginning = self._begin_runs(1)
        self._resume(self._beginning)
        # Last, because they wait until another thread has initialised their adapters.
        self._resume(initialising)


class _HostWork:
    """Work for the CPU while a GPU computes. It is done once, and its error is kept.

    An error that it raised inside of a bank would be taken for one of the bank's requests.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self.error: Exception | None = None

    def __call__(self) -> None:
        work = self._work
        self._work = None
        if work is None:
            return
        try:
            work()
        except Exception as error:
            self.error = error


def _request_of(run: PackedRun) -> Request:
    assert run.request is not None
    return run.request


def _by_executor(runs: Sequence[PackedRun]) -> list[tuple[Executor, list[PackedRun]]]:
    """Group runs by the executor of their requests, in the order of their first requests."""
    executors: dict[int, Executor] = {}
    groups: dict[int, list[PackedRun]] = {}
    for run in runs:
        executor = _request_of(run).executor
        executors[id(executor)] = executor
        groups.setdefault(id(executor), []).append(run)
    return [(executor, groups[key]) for key, executor in executors.items()]


def _capacities(runs: Sequence[PackedRun]) -> list[int]:
    """Return how many slots fit into the memory of the runs' banks, where that is known."""
    capacities = []
    for run in runs:
        if run.request is not None:
            capacity = run.request.executor.capacity
            if capacity:
                capacities.append(capacity)
    return capacities
