"""The tracker of Weights & Biases: a live W&B run for as long as the run trains."""

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.compat import wandb_summary
from finetune.config.schema import RunConfig
from finetune.console import summary_line
from finetune.files.atomic import write_json
from finetune.files.run_folder import Metrics, RunFolder
from finetune.metrics.load import load_metrics
from finetune.tracking.tracker import Label, Sample, Tracker
from finetune.tracking.wandb_arguments import (
    OFFLINE_MODES,
    TRACKER,
    init_arguments,
    quiet_settings,
    resume_offline,
)
from finetune.tracking.wandb_artifacts import log_artifact

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

_server_failure = threading.Event()
"""Set when W&B's server did not open a run: later runs of this process don't wait for it again."""


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
        self._run = self._init(uploads=config.tracker.adapters != "none")
        self._last_logged_step: int | None = None
        # The best evaluation need not be the last: the summary shows both.
        self._run.define_metric("eval/loss", summary="min,last")
        self._run.define_metric("eval/accuracy", summary="max,last")
        for metric in load_metrics(config.evaluation):
            best = "max" if metric.higher_is_better else "min"
            for name in metric.names:
                self._run.define_metric(f"eval/{name}", summary=f"{best},last")

    def _init(self, uploads: bool) -> "wandb.Run":
        """Open the W&B run, offline if its server can't be reached, and record its arguments."""
        import wandb

        if self._arguments["mode"] == "online" and _server_failure.is_set():
            resume = resume_offline(self._folder)
            self._arguments |= {"mode": "offline", "resume": resume}
        mode = self._arguments["mode"]
        settings = quiet_settings(mode, uploads, self._shows_text)
        # Before the run is opened: a process killed right after it goes on under the same id.
        self._record()
        try:
            return wandb.init(settings=settings, **self._arguments)
        except Exception as error:
            runs = "this run is"
            if isinstance(error, wandb.errors.CommError):
                _server_failure.set()
                runs = "runs of this process are"
            log.warning("W&B: %s; %s kept offline", summary_line(error), runs)
        # For as long as this process lives, W&B holds the id of the failed attempt as in use.
        offline_id = f"{self._arguments['id']}-offline"
        resume = resume_offline(self._folder)
        self._arguments |= {"mode": "offline", "resume": resume, "id": offline_id}
        self._record()
        return wandb.init(settings=settings, **self._arguments)

    def _record(self, **more: Any) -> None:
        write_json(self._folder.path / TRACKER, {**self._arguments, **more})

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
        name = self._arguments["group"] or self._arguments["name"]
        try:
            log_artifact(
                self._run,
                f"{name}-adapter",
                "model",
                folder,
            )
        # Caught here, so that the run itself is still shown to its end.
        except Exception as error:
            reason = summary_line(error)
            log.warning("W&B: %s; it lacks the adapter, which is in %s", reason, folder)

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        is_offline = self._arguments["mode"] in OFFLINE_MODES
        try:
            if is_offline and self._last_logged_step is not None:
                # W&B holds the last step back until the next one, and the summary lacks it.
                self._run.log({}, step=self._last_logged_step, commit=True)
            self._run.summary.update({"status": status, **summary})
            if is_offline:
                self._record(summary=wandb_summary(self._run))
        finally:
            # By its exit code, W&B shows a run as finished or as failed.
            has_ended_well = status in ("completed", "pruned")
            self._run.finish(exit_code=0 if has_ended_well else 1)

    def locations(self) -> list[str]:
        directory = Path(self._arguments["dir"])
        files = os.path.relpath(directory / "wandb")
        # WANDB_DIR holds the files of other runs too.
        is_shared = directory != self._folder.path
        suffix = f"-{self._arguments['id']}" if is_shared else ""
        if self._arguments["mode"] == "online":
            # Without the flag, `wandb sync` skips runs that were online.
            command = f"wandb sync --no-skip-online {files}/run-*{suffix}"
            return [f"W&B: {self._run.url} (if anything is missing there: {command})"]
        if not os.path.isdir(files):
            return []
        return [f"W&B: offline; wandb sync {files}/offline-run-*{suffix}"]
