"""Weights & Biases runs: opened, tagged, reopened, artifacts."""

import contextlib
import logging
import netrc
import os
import re
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.schema import RunConfig, TrackerSettings
from finetune.console import summary_line
from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import Metrics, RunFolder
from finetune.tracking.tracker import Label, Sample, Tracker

if TYPE_CHECKING:
    import wandb


log = logging.getLogger(__name__)


TRACKER = "tracker.json"
"""What a run's W&B run was opened with (`wandb.init`'s arguments, the config among them), in its folder.

Of an offline run also the summary that it ended with, as `summary`.
"""


OFFLINE = ("offline", "dryrun")
"""Modes in which W&B writes files for `wandb sync`; `dryrun` is an old name."""


WANDB_PATIENCE = 20
"""Seconds to wait for W&B's server at a run's start, and thrice as many for the last upload at its end."""


WANDB_UPLOAD_PATIENCE = 600
"""Seconds to wait at its end where files are uploaded."""


class WandbTracker(Tracker):
    """One W&B run: live with a key, else on disk with the one command that syncs it."""

    def __init__(self, config: RunConfig, folder: RunFolder, label: Label) -> None:
        import wandb

        self._folder, run_id = folder, label.id or _run_id(folder)

        settings = config.tracker
        mode = _wandb_mode(settings)
        # A run that goes on from a checkpoint adds to its history; one that begins anew replaces it.
        offline_resume = "allow" if folder.last_checkpoint() else None
        arguments: dict[str, Any] = {
            "mode": mode,
            "project": settings.project or os.environ.get("WANDB_PROJECT") or "finetune",
            "entity": settings.entity,
            "name": label.name or os.environ.get("WANDB_NAME") or config.name,
            "group": label.group or os.environ.get("WANDB_RUN_GROUP"),
            "tags": settings.tags or None,
            "id": run_id,
            "resume": "allow" if mode == "online" else offline_resume,
            "dir": str(folder.path),
            "job_type": label.job_type,
            "reinit": "create_new",
            "config": config.to_dict(),
        }
        self._arguments = arguments
        write_json(folder.path / TRACKER, arguments)
        quiet = _quiet_settings(mode, settings.adapters != "none")
        try:
            self._run = wandb.init(settings=quiet, **arguments)
        except Exception as error:
            log.warning("W&B: %s; this run is kept offline", summary_line(error))
            mode = "offline"
            # W&B holds the id of the attempt that failed as taken, for as long as this process lives.
            arguments |= {"mode": mode, "resume": offline_resume, "id": f"{run_id}-offline"}
            write_json(folder.path / TRACKER, arguments)
            self._run = wandb.init(settings=quiet, **arguments)
        self._online = mode == "online"
        self._step: int | None = None  # the last that anything was logged at
        for metric, best in (("eval/loss", "min"), ("eval/accuracy", "max")):
            self._run.define_metric(metric, summary=f"{best},last")

    def log(self, step: int, metrics: Metrics) -> None:
        self._step = step
        self._run.log(metrics, step=step)

    def samples(self, step: int, samples: list[Sample]) -> None:
        import wandb

        self._step = step
        columns = ["prompt", "before", "after"]
        rows = [[sample.get(column, "") for column in columns] for sample in samples]
        self._run.log({"samples": wandb.Table(columns=columns, data=rows)}, step=step)

    def tag(self, tags: list[str]) -> None:
        if tags:
            self._arguments["tags"] = list(dict.fromkeys([*(self._arguments["tags"] or ()), *tags]))
            self._run.tags = tuple(self._arguments["tags"])
            write_json(self._folder.path / TRACKER, self._arguments)

    def adapter(self, folder: Path) -> None:
        name = self._arguments["group"] or self._arguments["name"]
        try:
            log_artifact(self._run, f"{name}-adapter", "model", folder)
        except Exception as error:  # the run itself shall still be shown to its end
            log.warning("W&B: %s; it lacks the adapter, which is in %s", summary_line(error), folder)

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        offline = self._arguments["mode"] in OFFLINE
        try:
            if offline and self._step is not None:  # W&B holds the last step back, and the summary lacks it
                self._run.log({}, step=self._step, commit=True)
            self._run.summary.update({"status": status, **summary})
            if offline:
                # Its public names ask W&B's process once for each value.
                values = {"summary": self._run.summary._as_dict()}
                write_json(self._folder.path / TRACKER, {**self._arguments, **values})
        finally:
            self._run.finish(exit_code=0 if status in ("completed", "pruned") else 1)

    def where(self) -> list[str]:
        kept = os.path.relpath(self._folder.path / "wandb")
        if self._online:
            return [f"W&B: {self._run.url} (if anything is missing there: wandb sync {kept}/run-*)"]
        return [f"W&B: offline; wandb sync {kept}/offline-run-*"] if os.path.isdir(kept) else []


def _quiet_settings(mode: str, uploads: bool) -> "wandb.Settings":
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        init_timeout=WANDB_PATIENCE,
        finish_timeout=WANDB_UPLOAD_PATIENCE if uploads else 3 * WANDB_PATIENCE,
        x_disable_stats=mode != "online",
    )


def final_summary(result: dict[str, Any]) -> dict[str, Any]:
    """What a tracker shows as a run's final state, beside its status, by what its `result.json` holds."""
    pruned = {"pruned_at": result["step"]} if result["status"] == "pruned" else {}
    return {**result["metrics"], **pruned, "error": result["error"]}


def untag(folder: RunFolder, tag: str) -> None:
    """Take a tag from the W&B run that a finished run has, if it has one."""
    _retag(folder, lambda tags: [other for other in tags if other != tag])


def give_tag(folder: RunFolder, tag: str) -> None:
    """Give a tag to the W&B run that a finished run has, if it has one and not yet the tag."""
    _retag(folder, lambda tags: tags if tag in tags else [*tags, tag])


def _retag(folder: RunFolder, change: Callable[[list[str]], list[str]]) -> None:
    arguments = read_json(folder.path / TRACKER)
    if arguments is None or arguments["mode"] == "disabled":
        return
    tags = change(arguments["tags"] or [])
    if tags == (arguments["tags"] or []):
        return
    arguments["tags"] = tags
    try:
        with reopened(folder, arguments):
            pass
    except Exception as error:
        log.warning("W&B: %s; the tags of %s are not %s", summary_line(error), folder.path, tags)
    else:
        write_json(folder.path / TRACKER, arguments)


@contextlib.contextmanager
def reopened(folder: RunFolder, arguments: dict[str, Any], uploads: bool = False) -> "Iterator[wandb.Run]":
    """The W&B run of a completed run, open once more by what its `tracker.json` holds. Raises what W&B raises.

    Offline this writes a further file for `wandb sync`, which puts the file's config, tags and summary in the place
    of those sent before, so it gets all of them anew. Online the server keeps them.
    """
    import wandb

    here = {**arguments, "dir": str(folder.path)}  # the folder may have been moved
    summary = here.pop("summary", {})
    config = here.pop("config", None)
    offline = arguments["mode"] in OFFLINE
    if offline:
        here["config"] = config or read_json(folder.identity)["config"]
        here["resume"] = "allow"  # without it the history that was sent before is replaced by this file's
    run = wandb.init(settings=_quiet_settings(arguments["mode"], uploads), **here)
    try:
        if offline:
            result = read_json(folder.result)
            run.summary.update({**summary, "status": result["status"], **final_summary(result)})
        yield run
    finally:
        run.finish(exit_code=0)  # the run did complete, whatever became of what is added to it


def log_artifact(run: "wandb.Run", name: str, kind: str, path: Path, aliases: Sequence[str] = ()) -> None:
    """A file, or all in a folder, as an artifact of a W&B run.

    W&B copies the files first: a study removes adapters, perhaps before `wandb sync` sends them.
    """
    import wandb

    artifact = wandb.Artifact(re.sub(r"(?a)[^\w.-]", "-", name), type=kind)
    for file in files_of(path):
        artifact.add_file(str(file), name=file.name if file == path else str(file.relative_to(path)))
    run.log_artifact(artifact, aliases=["latest", *aliases])


def files_of(path: Path) -> list[Path]:
    """What an artifact holds: a file itself, or all files in a folder, in order."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _wandb_mode(settings: TrackerSettings) -> str:
    """Online only with a key, so that nothing ever asks for one."""
    if settings.mode != "auto":
        return settings.mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if _has_wandb_key() else "offline"


def _has_wandb_key() -> bool:
    """A key in the environment, or that `wandb login` left in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(folder: RunFolder) -> str:
    """A resumed run goes on under its own id."""
    known = read_json(folder.path / TRACKER)
    return str(known["id"]).removesuffix("-offline") if known else uuid.uuid4().hex[:12]
