"""What W&B gets when a study ends: the winner's test loss and adapter, the report, and a saved view of all trials."""

import contextlib
import hashlib
import io
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection

from finetune.config.flatten import flatten
from finetune.config.schema import TrackerSettings
from finetune.console import summary_line
from finetune.files.atomic import read_json, write_json
from finetune.run.load import read_run_config
from finetune.tracking.wandb_arguments import TRACKER
from finetune.tracking.wandb_artifacts import files_of, log_artifact
from finetune.tracking.wandb_finished import reopen_run
from sweeps.study.study import Study

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import PanelTypes
    from wandb_workspaces.workspaces import Workspace


log = logging.getLogger(__name__)


PUBLISHED = "published.json"
"""What W&B has got of a study, in its folder: nothing is sent twice."""


MOST_RUNS = 100
"""How many runs the curves of a saved view show; W&B's own default is 10."""


def publish(
    study: Study,
    winner_number: int,
    test: dict[str, Any] | None,
    report: Path | None,
    tracker: TrackerSettings | None = None,
) -> list[str]:
    """Add what a study has found to its winner's W&B run, if it has one; returns lines for the terminal.

    `best/` must hold the winner by now. `tracker` is what this session asks for; None: what the winner began with.
    A failure is one warning, and the next session tries again.
    """
    folder = study.folder_of(winner_number)
    opened = read_json(folder.path / TRACKER)
    if opened is None or opened["mode"] == "disabled":
        return []
    tracker = tracker or read_run_config(folder.path).tracker
    online, adapter = opened["mode"] == "online", study.folder / "best" / "adapter"
    wanted: dict[str, Any] = {}
    if test is not None:
        wanted["test/loss"] = [opened["id"], test["winner"]]
    if tracker.adapters != "none" and adapter.is_dir():  # with `all` W&B has it already, and only calls it the best
        wanted["adapter"] = [opened["id"], _digest(adapter)]
    if report is not None and report.is_file():
        wanted["report"] = [opened["id"], _digest(report)]
    if tracker.workspace and online:
        wanted["workspace"] = [study.name, *parameters(study), *study.objectives]
    known = read_json(study.folder / PUBLISHED) or {}
    new = {part for part, content in wanted.items() if content != known.get(part)}
    if new:
        try:
            with reopen_run(folder, opened, uploads=True) as run:
                if "test/loss" in new and test is not None:
                    run.summary["test/loss"] = test["winner"]
                if "adapter" in new:
                    log_artifact(run, f"{opened['group']}-adapter", "model", adapter, ["best"])
                if "report" in new and report is not None:
                    log_artifact(run, f"{opened['group']}-report", "report", report)
                if "workspace" in new:
                    wanted["url"] = _save(workspace(study, run.entity, run.project))
        except Exception as error:
            log.warning("W&B: %s; it lacks %s", summary_line(error), ", ".join(sorted(new)))
            return []
        known |= wanted
        write_json(study.folder / PUBLISHED, known)
    if tracker.workspace and not online:
        return ["W&B workspace: none is saved, for the study's runs are offline"]
    return [f"W&B workspace: {known['url']}"] if "workspace" in wanted else []


def _digest(path: Path) -> str:
    """A file's content, or that of all files in a folder with their names."""
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _save(view: "Workspace") -> str:
    """Save a view as a new one; returns its address."""
    with contextlib.redirect_stderr(io.StringIO()):  # it says the address as well
        view.save()
    return str(view.url)


def workspace(study: Study, entity: str, project: str) -> "Workspace":
    """A W&B view of the study's trials: how parameters and objective belong together, curves, and a table."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    searched = parameters(study)
    goals = _goals(study)
    columns = [
        *(wr.ParallelCoordinatesPlotColumn(wr.Config(key), log=_is_log(what)) for key, what in searched.items()),
        *(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key), name) for key, name in goals.items()),
    ]
    panels: list[PanelTypes] = [wr.ParallelCoordinatesPlot(columns, layout=wr.Layout(w=24, h=9))]
    for goal, name in goals.items():
        panels.append(wr.ParameterImportancePlot(goal))
        panels += [
            wr.ScatterPlot(
                title=f"{name} by {key}", x=wr.Config(key), y=wr.SummaryMetric(goal), log_x=_is_log(what) or None
            )
            for key, what in searched.items()
            if _is_number(what)
        ]
    curves = dict.fromkeys(
        name for name in ("eval/loss", *study.objectives, "train/loss") if name.endswith(("/loss", "/accuracy"))
    )
    minimised = study.optuna.directions[0] == StudyDirection.MINIMIZE
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Study {study.name}",
        sections=[
            ws.Section(name="Search", panels=panels, is_open=True),
            ws.Section(name="Curves", panels=[wr.LinePlot(title=name, y=[name]) for name in curves], is_open=True),
            ws.Section(name="Table", panels=[wr.RunComparer(diff_only="split")], is_open=True),
        ],
        settings=ws.WorkspaceSettings(max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            filters=f"Metric('Group') == {study.name!r} and Metric('JobType') == 'trial'",
            order=[ws.Ordering(ws.Summary(next(iter(goals))), ascending=minimised)],
            pinned_columns=[
                "run:displayName",
                "run:state",
                *(f"summary:{goal}" for goal in goals),
                *(f"config:{_accessor(key)}" for key in searched),
            ],
        ),
    )


def _goals(study: Study) -> dict[str, str]:
    """Where W&B's summary has the study's objectives, and what they are called."""
    names = study.objectives
    alone = len(names) == 1 and names[0].startswith("eval/")  # while a run trains, eval/loss is no plain number there
    return {"objective": names[0]} if alone else {name: name for name in names}


def parameters(study: Study) -> dict[str, BaseDistribution | None]:
    """What is searched, by the keys of the runs' configs. A group has its keys that differ, with None."""
    known = (read_json(study.folder_of(trial.number).identity) for trial in study.finished())
    configs = [flatten(run["config"]) for run in known if run]
    keys = dict.fromkeys(key for config in configs for key in config)
    found: dict[str, BaseDistribution | None] = {}
    for name, what in {name: what for trial in study.trials() for name, what in trial.distributions.items()}.items():
        key = name.lstrip("+").replace("/", ".")
        if key in keys:
            found[key] = what
        else:
            prefix = key if "/" in name else f"{key}."
            values = {below: {json.dumps(config.get(below)) for config in configs} for below in keys}
            found |= {below: None for below in keys if below.startswith(prefix) and len(values[below]) > 1}
    return found


def _is_log(distribution: BaseDistribution | None) -> bool:
    return bool(getattr(distribution, "log", False))


def _is_number(distribution: BaseDistribution | None) -> bool:
    choices = distribution.choices if isinstance(distribution, CategoricalDistribution) else ()
    return distribution is not None and all(type(choice) in (int, float) for choice in choices)


def _accessor(key: str) -> str:
    """A config key as W&B stores it: the value of its first part, and what is in that."""
    first, *rest = key.split(".")
    return ".".join([first, "value", *rest])
