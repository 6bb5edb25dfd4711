"""MLflow's model registry: an adapter as a version of a registered model, with an alias."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from finetune.errors import ConfigError, refusal
from finetune.tracking.mlflow import experiment_id, failed_on_error, log_params
from finetune.tracking.mlflow_names import NAME_LENGTH, mlflow_text, short_name
from finetune.tracking.mlflow_store import (
    environment_address,
    local_address,
    open_store,
    show_command,
    show_url,
)
from finetune.tracking.registry import DIGEST, Lineage, Registry, Version
from finetune.tracking.tracker import reason

ADAPTER = "adapter"
"""Folder of the adapter among the artifacts of its MLflow run."""

T = TypeVar("T")


class MlflowRegistry(Registry):
    """A registered model in MLflow's store: the local database, or MLFLOW_TRACKING_URI.

    Args:
        key: The flag or the config key that names the model, for errors.
        name: The registered model.
        project: The experiment of the run that holds the adapter's files; None: the default.

    Raises:
        ConfigError: MLflow can't have a model of that name.
    """

    title = "MLflow"

    def __init__(self, key: str, name: str, project: str | None) -> None:
        _require_model_name(key, name)
        self._name = name
        self._project = project
        self._address = environment_address() or local_address()

    def current(self, alias: str) -> Version | None:
        return self._ask(lambda: self._current(alias))

    def _current(self, alias: str) -> Version | None:
        from mlflow.exceptions import MlflowException

        try:
            found = self._store.get_model_version_by_alias(self._name, alias)
        except MlflowException as error:
            # A model without the alias, or no model: one is named in the code, one in the text.
            missing = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
            if error.error_code in missing and "not found" in str(error):
                return None
            raise
        return self._version(found)

    def register(self, adapter: Path, lineage: Lineage, alias: str) -> Version:
        return self._ask(lambda: self._register(adapter, lineage, alias))

    def _register(self, adapter: Path, lineage: Lineage, alias: str) -> Version:
        store = self._store
        self._create_model()
        version = self._registered(lineage[DIGEST])
        if version is None:
            run_id = self._create_run(adapter, lineage)
            version = store.create_model_version(
                self._name,
                source=f"runs:/{run_id}/{ADAPTER}",
                run_id=run_id,
                tags=_tags(lineage),
            )
        store.set_registered_model_alias(self._name, alias, str(version.version))
        return self._version(version)

    def _create_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._store.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _registered(self, digest: str) -> Any:
        """Return the version with these weights: an earlier call may have failed after it."""
        # MLflow's filters have no escapes.
        quote = '"' if "'" in self._name else "'"
        name = f"{quote}{self._name}{quote}"
        for version in self._store.search_model_versions(f"name = {name}"):
            if version.tags.get(DIGEST) == digest:
                return version
        return None

    def _create_run(self, adapter: Path, lineage: Lineage) -> str:
        """Create the MLflow run that holds the adapter's files, and return its id."""
        store = self._store
        study = str(lineage["study"])
        experiment = experiment_id(store, self._project, study)
        run = store.create_run(experiment, run_name=short_name(f"promote {study}"))
        run_id = str(run.info.run_id)
        with failed_on_error(store, run_id):
            log_params(store, run_id, lineage["config"])
            store.log_dict(run_id, dict(lineage), "lineage.json")
            store.log_artifacts(run_id, str(adapter), ADAPTER)
            store.set_terminated(run_id)
        return run_id

    def _version(self, version: Any) -> Version:
        return Version(
            name=self._name,
            version=str(version.version),
            digest=version.tags.get(DIGEST),
            url=show_url(self._address),
            command=show_command(self._address),
        )

    @property
    def _store(self) -> Any:
        return open_store(self._address)

    def _ask(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        # MLflow's, SQLAlchemy's, and those of its HTTP library.
        except Exception as error:
            raise ConfigError(f"--to=mlflow: {reason(error)}") from None


def _require_model_name(key: str, name: str) -> None:
    """Refuse a name that MLflow does not take, or does not find again."""
    has_both_quotes = "'" in name and '"' in name
    is_refused = has_both_quotes or set("/:\\") & set(name) or not name.isprintable()
    if is_refused or name.strip() in ("", ".", "..") or len(name) > NAME_LENGTH:
        allowed = (
            f"a model of MLflow has {NAME_LENGTH} characters at most, without / : \\ and line "
            "breaks, is not empty, . or .., and has one kind of quotes"
        )
        advice = "" if key == "--name" else "; --name gives it another name"
        raise refusal(key, name, f"{allowed}{advice}")


def _tags(lineage: Lineage) -> dict[str, str]:
    """Return a lineage as tags: texts and numbers as they are, the rest as JSON."""
    tags = {}
    for name, value in lineage.items():
        # The run has it as params.
        if name == "config" or value is None:
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        tags[name] = mlflow_text(text)
    return tags
