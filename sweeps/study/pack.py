"""Runs that train together: each in a slot of one worker, all on one base."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.engine.steps import Request, RunSteps
from finetune.errors import Interrupted
from finetune.run.resources import shared_resources


def choose_slots(wanted: int | str, neediest: RunConfig) -> tuple[int, RunConfig]:
    """How many slots a worker has for runs that need no more than this one, which is returned resolved.

    `auto`: as many as memory has room for and a GPU is kept busy by.
    """
    from finetune.model.device import on_gpu
    from finetune.run.memory_plan import plan_memory, resolve_checkpointing

    decided = resolve_checkpointing(neediest, "packed", shared_resources)
    if wanted == "auto":
        wanted = plan_memory(decided, shared_resources).slots if on_gpu() else 1  # one run keeps a CPU busy
    return int(wanted), decided


def memory_rank(config: RunConfig) -> tuple[int, int]:
    """What a run's memory grows with, to order runs by."""
    return config.trainer.per_device_train_batch_size, config.lora.r


@dataclass(eq=False)
class PackedRun:
    """A run in a slot: its work, and what it waits for."""

    name: str
    work: RunSteps[Any]
    log: Path
    """The file that gets its lines, and no other run's."""
    packed_with: set[str]
    """Filled with the names of the runs that train beside it."""
    request: Request | None = None
    has_ended: bool = False
    answer: Any = None
    """What came of its last wish; an Exception is raised where the run waits for it."""
    handler: logging.Handler = field(init=False)

    def __post_init__(self) -> None:
        self.handler = logging.FileHandler(self.log, delay=True)
        self.handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))

    def go_on(self) -> None:
        """Let the run work until it wishes for something, or ends."""
        answer, self.answer = self.answer, None
        with self._logging():
            try:
                self.request = self.work.throw(answer) if isinstance(answer, Exception) else self.work.send(answer)
            except StopIteration:
                self.has_ended = True

    def close(self) -> None:
        """End the run where it is."""
        with self._logging():
            self.work.close()
        self.handler.close()

    @contextmanager
    def _logging(self) -> Iterator[None]:
        logging.getLogger().addHandler(self.handler)
        NamingFormatter.lane = self.name
        try:
            yield
        finally:
            NamingFormatter.lane = None
            logging.getLogger().removeHandler(self.handler)


class NamingFormatter(logging.Formatter):
    """Another formatter's lines, each after the name of the lane that it is of."""

    lane: str | None = None

    def __init__(self, plain: logging.Formatter) -> None:
        super().__init__()
        self._plain = plain

    def format(self, record: logging.LogRecord) -> str:
        text = self._plain.format(record)
        return text if self.lane is None else "\n".join(f"{self.lane}: {line}" for line in text.splitlines())


@contextmanager
def runs_log_to_files(beside: bool = False) -> Iterator[None]:
    """Leave runs' own lines to their logs; beside a live table this process says only what must be known."""

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or (record.name.startswith("sweeps") and not beside)

    screens = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
    for handler in screens:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in screens:
            handler.removeFilter(passes)


def train_together(take: Callable[[], PackedRun | None], slots: int) -> int:
    """Run lanes in so many slots until there are none to take; returns how many have ended.

    What the runs wish for at the same time is computed together. One that wishes for nothing works while a GPU
    computes what the others wish for: so a run's beginning and end hardly cost them anything. Beside runs that train
    one begins in each pass: several that begin together would end together too, with nobody left to compute meanwhile.
    When the user interrupts, all end before it is said.
    """
    return _Pack(take, slots).work()


class _Pack:
    """The lanes that train together."""

    def __init__(self, take: Callable[[], PackedRun | None], slots: int) -> None:
        self._take, self._slots = take, slots
        self._lanes: list[PackedRun] = []
        self._begun: list[PackedRun] = []
        """What began beside the last pass; the adapter may still be drawn."""
        self._ended = 0
        self._interrupted: Interrupted | None = None

    def work(self) -> int:
        """All of it; returns how many lanes have ended."""
        try:
            while self._lanes or self._fill(self._slots):
                wishing = [lane for lane in self._lanes if lane.request is not None]
                self._execute(wishing)
                self._go_on(wishing)
        finally:
            for lane in self._lanes:
                lane.close()
        if self._interrupted is not None:
            raise self._interrupted
        return self._ended

    def _fill(self, most: int) -> list[PackedRun]:
        """Take so many lanes at most, as there is room, and return them."""
        self._slots = min([self._slots, *_capacities(self._lanes)])
        taken: list[PackedRun] = []
        while self._interrupted is None and len(self._lanes) < self._slots and len(taken) < most:
            lane = self._take()
            if lane is None:
                break
            for other in self._lanes:
                other.packed_with.add(lane.name)
                lane.packed_with.add(other.name)
            self._lanes.append(lane)
            taken.append(lane)
        return taken

    def _go_on(self, lanes: list[PackedRun]) -> None:
        """Let some lanes work, and part with those that end."""
        for lane in lanes:
            try:
                lane.go_on()
            except Interrupted as error:
                lane.has_ended, self._interrupted = True, error
        for lane in lanes:
            if lane.has_ended:
                self._lanes.remove(lane)
                lane.close()
                self._ended += 1

    def _execute(self, wishing: list[PackedRun]) -> None:
        """Compute what the lanes wish for, together where it is of the same bank, while the others go on."""
        waiting = [lane for lane in self._lanes if lane.request is None]
        begun = [lane for lane in self._begun if lane in waiting]
        failures: list[Exception] = []

        def meanwhile() -> None:
            try:
                self._go_on([lane for lane in waiting if lane not in begun])
                self._begun = self._fill(1)
                self._go_on(self._begun)
                self._go_on(begun)  # which wait until they are drawn
            except Exception as error:  # a bank would take it for its own
                failures.append(error)

        requests = [(lane, lane.request) for lane in wishing if lane.request is not None]
        if not requests:
            meanwhile()
        for number, bank in enumerate({id(request.executor): request.executor for _, request in requests}.values()):
            own = [(lane, request) for lane, request in requests if request.executor is bank]
            answers = bank.execute([request for _, request in own], None if number else meanwhile)
            for (lane, _), answer in zip(own, answers, strict=True):
                lane.answer = answer
        if failures:
            raise failures[0]


def _capacities(lanes: list[PackedRun]) -> list[int]:
    """How many slots the lanes' banks have memory for, where that is known."""
    return [
        lane.request.executor.capacity for lane in lanes if lane.request is not None and lane.request.executor.capacity
    ]
