"""What the file of a W&B run says, and how that of a later session of the run continues it."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.tracking.wandb_file import read_records

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import Record


@dataclass
class RunLog:
    """The records of a file by what they say. `body` has all others, in their order."""

    header: "list[Record]"
    run: "Record"
    """Name, group, config and tags, as the last record has them that says so."""
    exit: "Record | None"
    body: "list[Record]" = field(default_factory=list)

    def followed_by(self, later: "RunLog", resumes: bool | None = None) -> "RunLog":
        """Return this log, continued by that of a later session.

        A session that begins the run anew takes the place of all before it.

        Args:
            later: The later session's log.
            resumes: Whether it continues the run; None: what it says itself.
        """
        if resumes is None:
            resumes = later.run.run.resume
        run = _merge_runs(self.run, later.run)
        if not resumes:
            return RunLog(later.header, run, later.exit, later.body)
        first_step = next(steps_of(later.body), None)
        if first_step is None:
            # Opened after its end, to add to it.
            added = [_without_internal_summary(record) for record in later.body]
            body = [*self.body, *_new_artifacts(self.body, added)]
            return RunLog(self.header, run, later.exit or self.exit, body)
        earlier = [record for record in self.body if _precedes(record, first_step)]
        _continue_runtime(earlier, later.body)
        body = [*earlier, *_new_artifacts(earlier, later.body)]
        return RunLog(self.header, run, later.exit, body)

    def records(self) -> "Iterator[Record]":
        """Return all records as W&B reads them: the run at the beginning, its exit at the end."""
        yield from self.header
        yield self.run
        yield from self.body
        if self.exit is not None:
            yield self.exit


def read_log(file: Path) -> RunLog | None:
    """Read a file; None if it does not even say which run it is of."""
    log = None
    header: list[Record] = []
    for record in read_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "header":
            header.append(record)
        elif kind == "run":
            if log is None:
                log = RunLog(header, record, None)
            else:
                log.run = _merge_runs(log.run, record)
        elif log is not None and kind == "exit":
            log.exit = record
        elif log is not None:
            log.body.append(record)
    return log


def _merge_runs(earlier: "Record", later: "Record") -> "Record":
    """Merge two records of one run: the later one's values, with all keys of both configs."""
    merged = type(later)()
    merged.CopyFrom(later)
    config = {item.key: item for item in earlier.run.config.update}
    config |= {item.key: item for item in later.run.config.update}
    del merged.run.config.update[:]
    merged.run.config.update.extend(config.values())
    merged.run.start_time.CopyFrom(earlier.run.start_time)
    return merged


def steps_of(records: "Iterable[Record]") -> Iterator[int]:
    """Return the steps of the history among some records, in their order."""
    for record in records:
        if record.HasField("history"):
            yield record.history.step.num


def _precedes(record: "Record", step: int) -> bool:
    """Whether a record is of an earlier step than that at which the run continued.

    The summary of a step stands beside it. Any other says how the interrupted session ended.
    """
    if record.HasField("history"):
        return bool(record.history.step.num < step)
    if record.HasField("summary"):
        steps = [
            int(json.loads(item.value_json))
            for item in record.summary.update
            if _key(item) == ["_step"]
        ]
        return bool(steps) and steps[0] < step
    return True


def _new_artifacts(
    earlier: "Iterable[Record]", later: "Iterable[Record]"
) -> "list[Record]":
    """Leave out artifacts of a session that were added already, before a kill."""
    present = {
        record.artifact.client_id for record in earlier if record.HasField("artifact")
    }
    return [
        record
        for record in later
        if not record.HasField("artifact") or record.artifact.client_id not in present
    ]


def _without_internal_summary(record: "Record") -> "Record":
    """Leave out what W&B itself counts (`_step`, `_runtime`): the run has ended before."""
    if not record.HasField("summary"):
        return record
    remaining = type(record)()
    remaining.CopyFrom(record)
    del remaining.summary.update[:]
    for item in record.summary.update:
        if not _key(item)[0].startswith("_"):
            remaining.summary.update.append(item)
    return remaining


def _continue_runtime(earlier: "list[Record]", later: "list[Record]") -> None:
    """Let the seconds of a later session follow those of the earlier one, if it began at zero."""
    spent = max(_runtimes(earlier), default=0.0)
    if spent <= min(_runtimes(later), default=spent):
        return
    for record in later:
        for item in _items(record):
            if _key(item) in (["_runtime"], ["_wandb", "runtime"]):
                seconds = json.loads(item.value_json) + spent
                is_whole = _key(item)[0] == "_wandb"
                item.value_json = json.dumps(int(seconds) if is_whole else seconds)


def _runtimes(records: "Iterable[Record]") -> Iterator[float]:
    for record in records:
        if record.HasField("history"):
            for item in record.history.item:
                if _key(item) == ["_runtime"]:
                    yield float(json.loads(item.value_json))


def _items(record: "Record") -> Any:
    if record.HasField("history"):
        return record.history.item
    return record.summary.update if record.HasField("summary") else ()


def _key(item: Any) -> list[str]:
    """The key of an item, by its levels."""
    return list(item.nested_key) or [item.key]
