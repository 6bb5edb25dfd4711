"""The tracker of MLflow: one MLflow run for each run, in a local database or on a server."""

import math
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.flatten import flatten
from finetune.config.schema import RunConfig
from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import Metrics, RunFolder
from finetune.tracking.logged import LoggedMetrics, rows_until_checkpoint
from finetune.tracking.mlflow_names import mlflow_name, mlflow_text, short_name
from finetune.tracking.mlflow_store import (
    environment_address,
    local_address,
    open_store,
    show_store,
)
from finetune.tracking.text_privacy import tracked_config
from finetune.tracking.tracker import FINAL, Label, Sample, Tracker, ended_on_error

if TYPE_CHECKING:
    from mlflow import MlflowClient

RECORD = "mlflow.json"
"""File in a run's folder: the id of its MLflow run, and the database that has it.

`address` is null for a store of MLFLOW_TRACKING_URI, whose address may hold a password.
"""

PARAMS_OF_A_CALL = 100
"""As many params as MLflow takes at once."""

STATUSES = {"completed": "FINISHED", "pruned": "FINISHED", "interrupted": "KILLED"}
"""MLflow's statuses of ended runs; any other run is FAILED."""


class MlflowTracker(Tracker):
    """One MLflow run, by its id: MLflow's functions without one know one run for a process."""

    def __init__(self, config: RunConfig, folder: RunFolder, label: Label) -> None:
        self._record = folder.path / RECORD
        self._logged = LoggedMetrics()
        self._last_step = 0
        record = read_json(self._record)
        given = environment_address()
        # A run continues where it began, whatever the working directory is now.
        earlier = record["address"] if record else None
        self._address = earlier or given or local_address()
        self._store = open_store(self._address)
        if record and folder.last_checkpoint():
            self._id = record["run_id"]
            with failed_on_error(self._store, self._id):
                self._continue(folder)
            return
        if record:
            self._discard(record["run_id"])
        self._id = self._create(config, label)
        with failed_on_error(self._store, self._id):
            log_params(self._store, self._id, tracked_config(config))
            recorded = None if self._address == given else self._address
            write_json(self._record, {"run_id": self._id, "address": recorded})

    def _create(self, config: RunConfig, label: Label) -> str:
        """Create the MLflow run, and return its id."""
        settings = config.tracker
        tags = dict.fromkeys(map(mlflow_name, settings.tags), "true")
        # These win over tags of the same names of the user's.
        tags["status"] = "running"
        if label.group is not None:
            tags |= {"group": label.group, "job_type": label.job_type or "run"}
        run = self._store.create_run(
            experiment_id(self._store, settings.project, label.group),
            run_name=short_name(
                label.name or os.environ.get("MLFLOW_RUN_NAME") or config.name
            ),
            tags=tags,
        )
        return str(run.info.run_id)

    def _continue(self, folder: RunFolder) -> None:
        """Open the run of an earlier session again, and log what a kill has kept from it."""
        earlier = self._store.get_run(self._id)
        for name in earlier.data.metrics:
            history = self._store.get_metric_history(self._id, name)
            self._logged.add(name, (metric.step for metric in history))
        self._store.update_run(self._id, status="RUNNING")
        self._store.set_tag(self._id, "status", "running")
        for step, metrics in rows_until_checkpoint(folder):
            self.log(step, metrics)

    def _discard(self, run_id: str) -> None:
        """Move the run of a session without a checkpoint to MLflow's trash: it begins anew."""
        from mlflow.exceptions import MlflowException

        try:
            self._store.delete_run(run_id)
        except MlflowException:
            # The user has removed it, or moved the store.
            return

    def log(self, step: int, metrics: Metrics) -> None:
        self._last_step = step
        shown = {mlflow_name(name): value for name, value in metrics.items()}
        self._log_values(step, self._logged.missing(step, shown))

    def _log_values(self, step: int, values: Metrics) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        if metrics:
            self._store.log_batch(self._id, metrics=metrics)

    def log_samples(self, step: int, samples: list[Sample]) -> None:
        self._store.log_dict(self._id, {"samples": samples}, "samples.json")

    def add_tags(self, tags: list[str]) -> None:
        for tag in tags:
            self._store.set_tag(self._id, mlflow_name(tag), "true")

    def log_adapter(self, folder: Path) -> None:
        self._store.log_artifacts(self._id, str(folder), "adapter")

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        with failed_on_error(self._store, self._id):
            self._store.set_tag(self._id, "status", status)
            values: Metrics = {}
            for name, value in summary.items():
                if name == "error" or not isinstance(value, int | float):
                    self._set_text(mlflow_name(name), value)
                elif math.isfinite(value):
                    values[mlflow_name(f"{FINAL}{name}")] = value
            self._log_values(self._last_step, values)
            self._store.set_terminated(self._id, STATUSES.get(status, "FAILED"))

    def _set_text(self, name: str, value: Any) -> None:
        """Set a tag; one of an earlier session that has no value any more is removed."""
        if value is not None:
            self._store.set_tag(self._id, name, mlflow_text(value))
        elif name in self._store.get_run(self._id).data.tags:
            self._store.delete_tag(self._id, name)

    def locations(self) -> list[str]:
        return [f"MLflow: {show_store(self._address)} (run {self._id})"]


def failed_on_error(store: "MlflowClient", run_id: str) -> AbstractContextManager[None]:
    """Return what ends an MLflow run as failed if its block raises."""
    return ended_on_error(lambda: store.set_terminated(run_id, "FAILED"))


def log_params(store: "MlflowClient", run_id: str, config: Mapping[str, Any]) -> None:
    """Log a config as params of an MLflow run.

    Args:
        store: MLflow's store.
        run_id: The MLflow run.
        config: Nested plain values.

    Raises:
        Exception: Whatever MLflow raises.
    """
    from mlflow.entities import Param

    params = [
        Param(mlflow_name(key), mlflow_text(value))
        for key, value in flatten(dict(config)).items()
    ]
    for start in range(0, len(params), PARAMS_OF_A_CALL):
        store.log_batch(run_id, params=params[start : start + PARAMS_OF_A_CALL])


def experiment_id(store: "MlflowClient", project: str | None, group: str | None) -> str:
    """Return the id of the experiment PROJECT, or of a study's, PROJECT/STUDY."""
    from mlflow.exceptions import MlflowException

    project = project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "finetune"
    name = short_name(f"{project}/{group}" if group else project)
    experiment = store.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(store.create_experiment(name))
        except MlflowException:
            # Another process has created it meanwhile.
            experiment = store.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        store.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def change_tag(folder: RunFolder, tag: str, is_set: bool) -> None:
    """Set or remove a tag of a finished run, if it has an MLflow run.

    Raises:
        Exception: Whatever MLflow raises.
    """
    record = read_json(folder.path / RECORD)
    if record is None:
        return
    store = open_store(record["address"] or environment_address() or local_address())
    run_id = record["run_id"]
    tag = mlflow_name(tag)
    has_tag = tag in store.get_run(run_id).data.tags
    if is_set and not has_tag:
        store.set_tag(run_id, tag, "true")
    if has_tag and not is_set:
        store.delete_tag(run_id, tag)
