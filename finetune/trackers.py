"""Where metrics are shown: Weights & Biases, TensorBoard, both, or nowhere. A tracker never ends a run."""

import contextlib
import json
import logging
import netrc
import os
import re
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli import brief
from finetune.config import RunConfig, TrackerSettings
from finetune.records import Metrics, RunFolder, read_json, step_of, write_json

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

Sample = dict[str, str]
"""A `prompt`, the base's answer `before` training, and the answer `after` it."""

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


@dataclass(frozen=True)
class Label:
    """What a tracker calls a run that is part of a study."""

    id: str | None = None
    """W&B's id; None: drawn at random and kept in the run's folder."""
    name: str | None = None
    """What is shown; None: the run's own name."""
    group: str | None = None
    job_type: str = "run"


class Tracker:
    """Shows nothing; the others show what they are told."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Show metrics of an optimizer step."""

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Show answers before and after."""

    def tag(self, tags: list[str]) -> None:
        """Mark the run with further tags."""

    def adapter(self, folder: Path) -> None:
        """Keep the run's adapter."""

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Close, with the run's final state."""

    def where(self) -> list[str]:
        """Lines that tell the user where to look."""
        return []


class WandbTracker(Tracker):
    """One W&B run: live with a key, else on disk with the one command that syncs it."""

    def __init__(self, config: RunConfig, folder: RunFolder, label: Label) -> None:
        import wandb

        self._folder, run_id = folder, label.id or _own_id(folder)

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
            log.warning("W&B: %s; this run is kept offline", brief(error))
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
            log.warning("W&B: %s; it lacks the adapter, which is in %s", brief(error), folder)

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
        log.warning("W&B: %s; the tags of %s are not %s", brief(error), folder.path, tags)
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


class TensorboardTracker(Tracker):
    """TensorBoard event files in the run folder."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder.path / "tensorboard"
        last = folder.last_checkpoint()  # what was shown after it is shown anew
        purge = step_of(last) + 1 if last else None
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        self._writer.add_text("config", f"```\n{json.dumps(config.to_dict(), indent=2)}\n```")

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, step: int, samples: list[Sample]) -> None:
        for sample in samples:
            text = f"**before:** {sample['before']}\n\n**after:** {sample['after']}"
            self._writer.add_text(f"samples/{sample['prompt']}", text, step)

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        self._writer.add_text("status", status)
        self._writer.close()

    def where(self) -> list[str]:
        return [f"TensorBoard: tensorboard --logdir {os.path.relpath(self._folder)}"]


class SeveralTrackers(Tracker):
    """All of several, each on its own: one that fails is left out from then on, and the run goes on."""

    def __init__(self, openers: list[Callable[[], Tracker]]) -> None:
        self._trackers: list[Tracker] = []
        self._failed: list[Tracker] = []
        for opener in openers:
            try:
                self._trackers.append(opener())
            except Exception as error:
                log.warning("tracker: %s; the run goes on without it", brief(error))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            if tracker not in self._failed:
                try:
                    call(tracker)
                except Exception as error:
                    log.warning("%s: %s; the run goes on without it", type(tracker).__name__, brief(error))
                    self._failed.append(tracker)

    def log(self, step: int, metrics: Metrics) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    def samples(self, step: int, samples: list[Sample]) -> None:
        self._each(lambda tracker: tracker.samples(step, samples))

    def tag(self, tags: list[str]) -> None:
        self._each(lambda tracker: tracker.tag(tags))

    def adapter(self, folder: Path) -> None:
        self._each(lambda tracker: tracker.adapter(folder))

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        self._each(lambda tracker: tracker.finish(status, summary))

    def where(self) -> list[str]:
        return [line for tracker in self._trackers for line in tracker.where()]


def open_tracker(config: RunConfig, folder: RunFolder, label: Label) -> Tracker:
    """The trackers that the config names; a resumed run goes on under its own id."""
    openers: list[Callable[[], Tracker]] = []
    if config.tracker.name in ("wandb", "both") and config.tracker.mode != "disabled":
        openers.append(lambda: WandbTracker(config, folder, label))
    if config.tracker.name in ("tensorboard", "both"):
        openers.append(lambda: TensorboardTracker(config, folder))
    return SeveralTrackers(openers)


def _own_id(folder: RunFolder) -> str:
    """A resumed run goes on under its own id."""
    known = read_json(folder.path / TRACKER)
    return str(known["id"]).removesuffix("-offline") if known else uuid.uuid4().hex[:12]
