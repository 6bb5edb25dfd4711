"""The tracker of Trackio: one Trackio run for each run, in a local database or on a Space."""

import contextlib
import contextvars
import io
import re
import shlex
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.schema import RunConfig
from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import Metrics, RunFolder
from finetune.tracking.logged import LoggedMetrics, rows_until_checkpoint
from finetune.tracking.text_privacy import tracked_config
from finetune.tracking.tracker import FINAL, Label, Sample, Tracker, ended_on_error

if TYPE_CHECKING:
    import trackio

RECORD = "trackio.json"
"""File in a run's folder: the id of its Trackio run, its name and project."""


class TrackioTracker(Tracker):
    """One Trackio run, which several runs of a process can have at once."""

    def __init__(self, config: RunConfig, folder: RunFolder, label: Label) -> None:
        self._config = tracked_config(config)
        self._logged = LoggedMetrics()
        self._last_step = 0
        self._group = label.group
        earlier: dict[str, str] | None = read_json(folder.path / RECORD)
        resumes = folder.last_checkpoint() is not None
        if earlier is not None and not resumes:
            _delete(earlier)
            earlier = None
        self._record = earlier or {
            "id": uuid.uuid4().hex,
            "name": label.name or config.name,
            "project": config.tracker.project or "finetune",
        }
        write_json(folder.path / RECORD, self._record)
        config_shown = {**self._config, "status": "running"}
        self._run = _open(self._record, self._group, config_shown)
        if resumes:
            with ended_on_error(lambda: self.finish("failed", {})):
                self._continue(folder)

    def _continue(self, folder: RunFolder) -> None:
        """Log what a kill has kept from Trackio, and nothing twice."""
        from trackio.sqlite_storage import SQLiteStorage

        # Of a Space or a server, which has no local rows, all is logged again.
        for row in SQLiteStorage.get_logs(self._record["project"], run_id=self._run.id):
            for name in row:
                self._logged.add(name, [row["step"]])
        for step, metrics in rows_until_checkpoint(folder):
            self.log(step, metrics)

    def log(self, step: int, metrics: Metrics) -> None:
        self._last_step = step
        missing = self._logged.missing(step, metrics)
        if missing:
            self._run.log(missing, step=step)

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        import trackio

        columns = ["prompt", "expected", "before", "after"]
        rows = [[sample.get(column, "") for column in columns] for sample in samples]
        self._run.log({"samples": trackio.Table(columns=columns, data=rows)}, step=step)

    def log_adapter(self, folder: Path) -> None:
        import trackio

        name = re.sub(r"(?a)[^\w.-]", "-", f"{self._record['name']}-adapter")
        artifact = trackio.Artifact(name, type="model")
        artifact.add_dir(folder)
        with _quiet():
            self._run.log_artifact(artifact)

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        values = {}
        texts = {"status": status}
        for name, value in summary.items():
            if isinstance(value, int | float):
                values[f"{FINAL}{name}"] = value
            elif value is not None:
                texts[name] = str(value)
        with _quiet():
            self._run.finish()
        # Trackio has no summary: the final state stands in the config, and in the last step. The
        # config is written with the first values of a session, so this is another one.
        last = _open(self._record, self._group, {**self._config, **texts})
        last.log(values, step=self._last_step)
        with _quiet():
            last.finish()

    def locations(self) -> list[str]:
        project = shlex.quote(self._record["project"])
        return [
            f"Trackio: trackio show --project {project} (run {self._record['name']})"
        ]


def _open(
    record: dict[str, str], group: str | None, config: dict[str, Any]
) -> "trackio.Run":
    """Open a Trackio run under an id.

    Trackio finishes the run of the same context when it opens another one. So each run has a
    context of its own, because runs that train together are open at once.
    """
    import trackio

    def init() -> "trackio.Run":
        return trackio.init(
            project=record["project"],
            name=record["name"],
            group=group,
            config=config,
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    with _quiet():
        run = contextvars.Context().run(init)
    # `init` resumes by name, which several runs of a project may have.
    run.id = record["id"]
    return run


def _delete(record: dict[str, str]) -> None:
    """Delete the Trackio run of a session without a checkpoint, because the run begins anew."""
    import trackio

    # Killed before its first values were written, a run has left nothing.
    with contextlib.suppress(ValueError):
        for run in trackio.Api().runs(record["project"]):
            if run.id == record["id"]:
                run.delete()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what Trackio prints for a user at a prompt."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
