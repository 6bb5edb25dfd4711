"""The tracker of Weights & Biases: a live W&B run for as long as the run trains."""

import logging
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.schema import RunConfig
from finetune.console import summary_line
from finetune.files.atomic import write_json
from finetune.files.run_folder import Metrics, RunFolder, checkpoint_step
from finetune.tracking.tracker import Label, Sample, Tracker, ended_on_error
from finetune.tracking.wandb_arguments import (
    FALLBACK,
    OFFLINE_MODES,
    TRACKER,
    init_arguments,
    quiet_settings,
    without_fallback,
)
from finetune.tracking.wandb_artifacts import log_artifact
from finetune.tracking.wandb_finished import add_to_run
from finetune.tracking.wandb_fragments import (
    fragment_files,
    join_finished,
    join_fragments,
    last_step,
)
from finetune.tracking.wandb_metrics import best_values, define_metrics
from finetune.tracking.wandb_server import (
    fail,
    finish_run,
    server_failure,
    watch_uploads,
)

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


class WandbTracker(Tracker):
    """One W&B run: online with a key, else files on disk and the one command that syncs them."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        label: Label,
    ) -> None:
        self._folder = folder
        self._shows_text = config.tracker.text
        self._arguments = init_arguments(config, folder, label)
        self._directory = Path(self._arguments["dir"])
        # Those of earlier sessions, which were killed perhaps.
        earlier_file = join_fragments(self._directory, self._arguments["id"])
        self._best = best_values(config)
        self._run = self._init(uploads=config.tracker.adapters != "none")
        self._last_logged_step: int | None = None
        self._adapter: Path | None = None
        """What has been logged as the adapter."""
        # Nobody else knows of it yet, and it would be shown as running.
        with ended_on_error(lambda: self._close(exit_code=1)):
            define_metrics(self._run, self._best)
            if self._arguments["resume"]:
                # Without a file, W&B had written nothing before the kill.
                last_logged = -1 if earlier_file is None else last_step(earlier_file)
                self._log_missing(last_logged)

    def _init(self, uploads: bool) -> "wandb.Run":
        """Open the W&B run, offline if its server can't be reached, and record its arguments."""
        import wandb

        if self._is_online:
            watch_uploads()
            if server_failure.is_set():
                self._arguments["mode"] = "offline"
        mode = self._arguments["mode"]
        settings = quiet_settings(mode, uploads, self._shows_text)
        # Before the run is opened: a process killed right after it goes on under the same id.
        self._record()
        try:
            return wandb.init(settings=settings, **self._arguments)
        except Exception as error:
            if isinstance(error, wandb.errors.CommError):
                fail(summary_line(error))
            else:
                log.warning("W&B: %s; this run is kept offline", summary_line(error))
        fallback_id = f"{self._arguments['id']}{FALLBACK}"
        self._arguments |= {"mode": "offline", "id": fallback_id}
        self._record()
        settings = quiet_settings("offline", uploads, self._shows_text)
        return wandb.init(settings=settings, **self._arguments)

    @property
    def _is_online(self) -> bool:
        return bool(self._arguments["mode"] == "online")

    def _record(self) -> None:
        directory = os.path.relpath(self._directory, self._folder.path)
        more = {"place": directory, "best": self._best}
        write_json(self._folder.path / TRACKER, {**self._arguments, **more})

    def _log_missing(self, last_logged: int) -> None:
        """Log what a kill has kept from W&B: the steps from its last one to the checkpoint.

        Args:
            last_logged: The last step in the files of the earlier sessions.
        """
        checkpoint = self._folder.last_checkpoint()
        assert checkpoint is not None
        # Online, the server may have more than the files.
        first = max(last_logged + 1, self._run.step)
        for row in self._folder.metrics():
            step = row.pop("step")
            if first <= step <= checkpoint_step(checkpoint):
                self.log(step, row)

    def log(self, step: int, metrics: Metrics) -> None:
        self._last_logged_step = step
        self._run.log(metrics, step=step)

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        import wandb

        self._last_logged_step = step
        columns = ["prompt", "expected", "before", "after"]
        table = wandb.Table(columns=columns)
        for sample in samples:
            table.add_data(*(sample.get(column, "") for column in columns))
        self._run.log({"samples": table}, step=step)

    def add_tags(self, tags: list[str]) -> None:
        if not tags:
            return
        earlier_tags = self._arguments["tags"] or ()
        distinct_tags = dict.fromkeys([*earlier_tags, *tags])
        self._arguments["tags"] = list(distinct_tags)
        self._run.tags = tuple(self._arguments["tags"])
        self._record()

    def log_adapter(self, folder: Path) -> None:
        try:
            self._add_adapter(self._run, folder)
        # Caught here, so that the run itself is still shown to its end.
        except Exception as error:
            reason = summary_line(error)
            log.warning("W&B: %s; it lacks the adapter, which is in %s", reason, folder)
        else:
            self._adapter = folder

    def _add_adapter(self, run: "wandb.Run", folder: Path) -> None:
        name = self._arguments["group"] or self._arguments["name"]
        log_artifact(
            run,
            f"{name}-adapter",
            "model",
            folder,
        )

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        try:
            if self._last_logged_step is not None:
                # W&B holds the last step back until the next one. Its values would come after
                # the final ones, and take their place.
                self._run.log({}, step=self._last_logged_step, commit=True)
            self._run.summary.update({"status": status, **summary})
        finally:
            # By its exit code, W&B shows a run as finished or as failed.
            has_ended_well = status in ("completed", "pruned")
            self._close(exit_code=0 if has_ended_well else 1)

    def _close(self, exit_code: int) -> None:
        """Finish the W&B run, and join its files if there are several."""
        lacks_adapter = None
        if self._is_online:
            finish_run(self._run, exit_code)
            if server_failure.is_set():
                self._arguments["mode"] = "offline"
                lacks_adapter = self._adapter
        else:
            self._run.finish(exit_code=exit_code)
        run_id = without_fallback(self._arguments["id"])
        is_offline = self._arguments["mode"] in OFFLINE_MODES
        join_finished(self._directory, run_id, is_offline)
        self._arguments["id"] = run_id
        self._record()
        if lacks_adapter is not None:
            # The file of an online run has no artifacts.
            adapter = lacks_adapter
            add_to_run(self._folder, lambda run: self._add_adapter(run, adapter))

    def locations(self) -> list[str]:
        files = fragment_files(self._directory, self._arguments["id"])
        if not files:
            return []
        # In a folder that other runs share, only the run's own.
        is_shared = self._directory != self._folder.path
        folder = files[0].parent if is_shared else files[0].parent.parent
        path = shlex.quote(os.path.relpath(folder))
        if self._is_online:
            # Without the flag, `wandb sync` skips runs that were online.
            command = f"wandb sync --no-skip-online {path}"
            return [f"W&B: {self._run.url} (if anything is missing there: {command})"]
        return [f"W&B: offline; wandb sync {path}"]
