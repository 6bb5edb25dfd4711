"""Publish a study to W&B at its end: test loss, adapter, report, and a saved view of all trials."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.sections.tracker import TrackerSettings
from finetune.console import summary_line
from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import RunFolder
from finetune.run.load import read_run_config
from finetune.tracking.wandb_arguments import TRACKER
from finetune.tracking.wandb_artifacts import files_of, log_artifact
from finetune.tracking.wandb_finished import add_to_run, is_online
from sweeps.answer.workspace import build_workspace, save_workspace, searched_keys
from sweeps.study.study import Study

if TYPE_CHECKING:
    import wandb


log = logging.getLogger(__name__)


PUBLISHED = "published.json"
"""File in the study's folder with what W&B has already, so that nothing is uploaded twice."""


BASELINE = "baseline's test/loss"


def publish(
    study: Study,
    winner_number: int,
    test: dict[str, Any] | None,
    report: Path | None,
    tracker: TrackerSettings | None = None,
) -> list[str]:
    """Add a study's results to the W&B run of its winner, if it has one.

    A failure is logged as one warning, and the next session tries again.

    Args:
        study: the study; its `best/` holds the winner.
        winner_number: number of the winning trial.
        test: the entry `test` of `answer.json`.
        report: path of the report, if it was written.
        tracker: what to publish; None: what the winner's config says.

    Returns:
        Lines for the terminal.
    """
    folder = study.folder_of(winner_number)
    run_arguments = read_json(folder.path / TRACKER)
    if run_arguments is None or run_arguments["mode"] == "disabled":
        return []
    tracker = tracker or read_run_config(folder.path).tracker
    publication = _Publication(
        study, winner_number, run_arguments, test, report, tracker
    )
    contents = publication.contents()
    published = read_json(study.folder / PUBLISHED) or {}
    changed = set()
    for name, content in contents.items():
        if content != published.get(name):
            changed.add(name)
    if changed:
        try:
            address = publication.upload(changed)
        except Exception as error:
            names = ", ".join(sorted(changed))
            log.warning("W&B: %s; not uploaded: %s", summary_line(error), names)
            return []
        if address is not None:
            published["url"] = address
        elif "workspace" in changed:
            # The server was away.
            del contents["workspace"]
        published |= contents
        # After the upload, because what this file names is never uploaded again.
        write_json(study.folder / PUBLISHED, published)
    if not tracker.workspace:
        return []
    if "workspace" not in contents:
        return ["W&B workspace: not saved, because the study's runs are offline"]
    return [f"W&B workspace: {published['url']}"]


@dataclass(frozen=True)
class _Publication:
    """What a session publishes of a study."""

    study: Study
    winner_number: int
    run_arguments: dict[str, Any]
    """Arguments that the winner's W&B run was opened with."""
    test: dict[str, Any] | None
    report: Path | None
    tracker: TrackerSettings

    @property
    def _adapter(self) -> Path:
        return self.study.folder / "best" / "adapter"

    @property
    def _baseline(self) -> RunFolder | None:
        """The baseline's run; None where it is the winner, or has no W&B run or no test rows."""
        baseline = self.study.baseline()
        if baseline is None or baseline.number == self.winner_number:
            return None
        folder = self.study.folder_of(baseline.number)
        arguments = read_json(folder.path / TRACKER)
        if arguments is None or arguments["mode"] == "disabled":
            return None
        return folder if _test_metrics(folder) else None

    def contents(self) -> dict[str, Any]:
        """Return the name of each item to publish, and a value that changes with its content."""
        # With the run's id, because another winner has another W&B run.
        run_id = self.run_arguments["id"]
        contents: dict[str, Any] = {}
        if self.test is not None:
            contents["test/loss"] = [run_id, self.test["winner"]]
        if self._baseline is not None:
            contents[BASELINE] = _test_metrics(self._baseline)
        # With adapters=all W&B has the files already, and the artifact only gets the alias `best`.
        if self.tracker.adapters != "none" and self._adapter.is_dir():
            contents["adapter"] = [run_id, _digest(self._adapter)]
        # The report shows rows, samples, and prompts of the config.
        if self.report is not None and self.report.is_file() and self.tracker.text:
            contents["report"] = [run_id, _digest(self.report)]
        if self.tracker.workspace and self.run_arguments["mode"] == "online":
            keys = searched_keys(self.study)
            objectives = self.study.objectives
            contents["workspace"] = [self.study.name, *keys, *objectives]
        return contents

    def upload(self, names: set[str]) -> str | None:
        """Upload some of the items.

        Returns:
            The address of the saved view, if one was saved.
        """
        baseline = self._baseline
        if BASELINE in names and baseline is not None:
            metrics = _test_metrics(baseline)
            add_to_run(baseline, lambda run: run.summary.update(metrics))
        if not names - {BASELINE}:
            return None
        folder = self.study.folder_of(self.winner_number)
        return add_to_run(
            folder, lambda run: self._add(run, folder, names), uploads=True
        )

    def _add(self, run: "wandb.Run", folder: RunFolder, names: set[str]) -> str | None:
        """Add items to the winner's open W&B run; return the view's address, if one was saved."""
        if "test/loss" in names and self.test is not None:
            run.summary.update(_test_metrics(folder))
            # Perhaps of another seed's adapter, which a confirmation has trained.
            run.summary["test/loss"] = self.test["winner"]
        self._log_artifacts(run, names)
        if "workspace" in names and is_online(folder):
            workspace = build_workspace(self.study, run.entity, run.project)
            return save_workspace(workspace)
        return None

    def _log_artifacts(self, run: "wandb.Run", names: set[str]) -> None:
        group = self.run_arguments["group"]
        if "adapter" in names:
            log_artifact(
                run,
                f"{group}-adapter",
                "model",
                self._adapter,
                ["best"],
            )
        if "report" in names and self.report is not None:
            log_artifact(
                run,
                f"{group}-report",
                "report",
                self.report,
            )


def _test_metrics(folder: RunFolder) -> dict[str, Any]:
    """Return a run's metrics of the test rows, which are evaluated after its end."""
    result = read_json(folder.result) or {}
    metrics = result.get("metrics", {})
    return {name: value for name, value in metrics.items() if name.startswith("test/")}


def _digest(path: Path) -> str:
    """Hash a file, or all files of a folder with their names."""
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as content:
            file_digest = hashlib.file_digest(content, "sha256")
        digest.update(file_digest.digest())
    return digest.hexdigest()
