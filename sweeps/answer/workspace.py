"""A saved W&B view of a study's trials: parameters against objectives, curves, and a table."""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection

from finetune.config.flatten import flatten
from finetune.files.atomic import read_json
from finetune.metrics.names import describe_metric
from sweeps.answer.ranges import newest_distributions
from sweeps.study.study import Study

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import PanelTypes
    from wandb_workspaces.workspaces import RunsetSettings, Workspace

# wandb_workspaces is imported inside the functions: it takes seconds, and few studies save a view.

MAX_RUNS = 100
"""Number of runs whose curves the view shows; W&B's own default is 10."""


SearchedKeys = Mapping[str, BaseDistribution | None]
"""Config keys that a study searches, with their ranges; None for the keys of a config group."""


def save_workspace(workspace: "Workspace") -> str:
    """Save a view as a new one.

    Args:
        workspace: the view, from `build_workspace`.

    Returns:
        Its address.
    """
    # W&B prints the address too.
    with contextlib.redirect_stderr(io.StringIO()):
        workspace.save()
    return str(workspace.url)


def build_workspace(study: Study, entity: str, project: str) -> "Workspace":
    """Build a view of a study's trials.

    Args:
        study: the study.
        entity: W&B's user or team.
        project: W&B's project.

    Returns:
        The view, not saved yet.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    keys = searched_keys(study)
    summaries = _objective_summaries(study)
    search = _search_panels(keys, summaries)
    curves = [
        wr.LinePlot(title=describe_metric(name), y=[name])
        for name in _curve_names(study)
    ]
    table = [wr.RunComparer(diff_only="split")]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Study {study.name}",
        sections=[
            ws.Section(name="Search", panels=search, is_open=True),
            ws.Section(name="Curves", panels=curves, is_open=True),
            ws.Section(name="Table", panels=table, is_open=True),
        ],
        settings=ws.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=_runset(study, keys, summaries),
    )


def _search_panels(
    keys: SearchedKeys, summaries: Mapping[str, str]
) -> "list[PanelTypes]":
    """Build the panels that relate parameters to objectives."""
    import wandb_workspaces.reports.v2 as wr

    columns = []
    for key, distribution in keys.items():
        column = wr.ParallelCoordinatesPlotColumn(
            wr.Config(key), log=_is_log(distribution)
        )
        columns.append(column)
    for summary, name in summaries.items():
        column = wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(summary), name)
        columns.append(column)
    # W&B's grid has 24 columns.
    whole_width = wr.Layout(w=24, h=9)
    panels: list[PanelTypes] = [wr.ParallelCoordinatesPlot(columns, layout=whole_width)]
    for summary, name in summaries.items():
        panels.append(wr.ParameterImportancePlot(summary))
        for key, distribution in keys.items():
            if _is_numeric(distribution):
                plot = wr.ScatterPlot(
                    title=f"{describe_metric(name)} by {key}",
                    x=wr.Config(key),
                    y=wr.SummaryMetric(summary),
                    log_x=_is_log(distribution) or None,
                )
                panels.append(plot)
    return panels


def _runset(
    study: Study, keys: SearchedKeys, summaries: Mapping[str, str]
) -> "RunsetSettings":
    """Select the study's trials (and no runs of a confirmation), the best first."""
    import wandb_workspaces.workspaces as ws

    is_minimized = study.optuna.directions[0] == StudyDirection.MINIMIZE
    first_summary = next(iter(summaries))
    best_first = ws.Ordering(ws.Summary(first_summary), ascending=is_minimized)
    objectives = [f"summary:{summary}" for summary in summaries]
    parameters = [f"config:{_accessor(key)}" for key in keys]
    return ws.RunsetSettings(
        filters=f"Metric('Group') == {study.name!r} and Metric('JobType') == 'trial'",
        order=[best_first],
        pinned_columns=["run:displayName", "run:state", *objectives, *parameters],
    )


def _curve_names(study: Study) -> list[str]:
    """Name the metrics that are logged during training."""
    # Each once: the objective may be one of the two losses.
    names = dict.fromkeys(("eval/loss", *study.objectives, "train/loss"))
    return [name for name in names if name.startswith("eval/") or name == "train/loss"]


def _objective_summaries(study: Study) -> dict[str, str]:
    """Map the entries of W&B's summary that hold the objectives to the objectives' names."""
    names = study.objectives
    if len(names) == 1 and names[0].startswith("eval/"):
        # While a run trains, its summary's eval/loss is no number but a minimum and a last value.
        return {"objective": names[0]}
    return {name: name for name in names}


def searched_keys(study: Study) -> dict[str, BaseDistribution | None]:
    """Find the config keys that a study searches.

    Args:
        study: the study.

    Returns:
        Keys of the runs' configs with their ranges. A config group is replaced by its keys that
        differ between trials, with None.
    """
    configs = _trial_configs(study)
    # A dict in place of a set, because the order of the keys is that of the view's columns.
    config_keys: dict[str, None] = {}
    for config in configs:
        config_keys |= dict.fromkeys(config)
    keys: dict[str, BaseDistribution | None] = {}
    for name, distribution in newest_distributions(study.trials()).items():
        key = name.lstrip("+").replace("/", ".")
        if name in study.variants:
            keys |= _keys_of_variants(study.variants[name], configs)
            continue
        if key in config_keys:
            keys[key] = distribution
            continue
        # The group `lora/target` sets keys that begin like it (`lora.target_modules`), the group
        # `lora` all keys of its section.
        prefix = key if "/" in name else f"{key}."
        for member in config_keys:
            if member.startswith(prefix) and _differs(configs, member):
                keys[member] = None
    return keys


def _keys_of_variants(
    variants: Mapping[str, Mapping[str, Any]], configs: Sequence[Mapping[str, Any]]
) -> dict[str, None]:
    """Return the config keys that differ between variants; of groups, those below them."""
    names = {
        key.lstrip("+").replace("/", ".") for each in variants.values() for key in each
    }
    keys: dict[str, None] = {}
    for config in configs:
        for key in config:
            is_set = any(key == name or key.startswith(f"{name}.") for name in names)
            if is_set and _differs(configs, key):
                keys[key] = None
    return keys


def _trial_configs(study: Study) -> list[dict[str, Any]]:
    """Read the configs of the finished trials, with dotted keys."""
    configs = []
    for trial in study.finished():
        identity = read_json(study.folder_of(trial.number).identity)
        if identity:
            configs.append(flatten(identity["config"]))
    return configs


def _differs(configs: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Return whether a key has several values."""
    values = {json.dumps(config.get(key)) for config in configs}
    return len(values) > 1


def _is_log(distribution: BaseDistribution | None) -> bool:
    return bool(getattr(distribution, "log", False))


def _is_numeric(distribution: BaseDistribution | None) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return all(type(choice) in (int, float) for choice in distribution.choices)
    return distribution is not None


def _accessor(key: str) -> str:
    """Return the path of a config key in W&B, which stores each first segment under `value`."""
    first, *segments = key.split(".")
    return ".".join([first, "value", *segments])
