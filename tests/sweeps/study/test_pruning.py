"""Pruning: a trial is judged at its rungs, and again between them; not within its warm-up."""

import itertools
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState
from support.commands import Station
from support.configs import compose, study_overrides
from support.studies import PRUNERS, made_study, settings_of

from finetune.config.schema import RunConfig
from finetune.config.sections.notify import NotifySettings
from finetune.config.sections.optimizer import ScheduleName
from finetune.engine.checkpoint import Progress
from finetune.engine.early_stopping import EarlyStopping
from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Rung
from finetune.engine.output import RunOutput
from finetune.engine.reporter import Reporter
from finetune.engine.schedule import evaluation_rungs
from finetune.engine.steps import RunSteps, drive
from finetune.files.run_folder import RunFolder
from finetune.tracking.tracker import Tracker
from sweeps.space.constraints import parse_constraint
from sweeps.space.pruners import SuccessiveHalvingPruner
from sweeps.space.samplers import make_pruner
from sweeps.study.formatting import trials_table
from sweeps.study.pruning import PAUSE_FACTOR, PruningObserver
from sweeps.study.study import Study


def halving() -> SuccessiveHalvingPruner:
    """The best third continues, and no other."""
    return SuccessiveHalvingPruner(min_survivors=1, noise_margin=0)


class Judged:
    """A trial of a study, and what a worker hears of it."""

    def __init__(
        self,
        study: Study,
        pruner: Any,
        role: str = "",
        trial: optuna.Trial | None = None,
        constraints: Sequence[str] = (),
    ) -> None:
        asked = optuna.Study(study.name, study.storage, pruner=pruner)
        self.trial = (
            asked.ask()
            if trial is None
            else optuna.Trial(asked, study.trial_id(trial.number))
        )
        self.trial.set_user_attr("role", role)
        session: Any = SimpleNamespace(
            settings=SimpleNamespace(
                directions=["minimize"] * len(study.objectives),
                parsed_constraints=[parse_constraint(text) for text in constraints],
                can_prune=True,
            ),
            common=SimpleNamespace(notify=NotifySettings()),
            is_stopping=False,
            is_out_of_time=lambda study: False,
            deadline=None,
        )
        trial_id = study.trial_id(self.trial.number)
        self.judge = PruningObserver(
            session, study, self.trial, trial_id, Interrupt(), poll_seconds=math.inf
        )

    def ends_at(self, rung: int, value: float, is_warmup: bool = False) -> bool:
        reached = Rung(rung, 10 * rung, 90, {"objective": value}, is_warmup)
        self.judge.on_rung(reached)
        return self.judge.should_prune(reached)

    def ends_after(self, step: int) -> bool:
        return self.judge.on_step(step)


@pytest.mark.parametrize(
    "where", ["here", "in another process", "before it was resumed"]
)
def test_a_trial_is_judged_anew_as_others_come_to_its_rung(
    where: str, tmp_path: Path
) -> None:
    study, pruner = made_study(tmp_path / "s", []), halving()
    baseline, early = Judged(study, pruner, "baseline"), Judged(study, pruner)
    assert not early.ends_at(1, 2.0)
    assert not baseline.ends_at(1, 3.0)
    assert not early.ends_after(11)
    for value in (1.0, 1.1, 1.2):
        if where == "here":
            Judged(study, pruner).ends_at(1, value)
        else:
            Judged(study, pruner).trial.report(value, 1)
    if where == "in another process":
        assert not early.ends_after(12), "it has not looked"
        early.judge.poll_seconds = baseline.judge.poll_seconds = 0
    elif where == "before it was resumed":
        baseline, early = (
            Judged(study, pruner, role, own.trial)
            for role, own in (("baseline", baseline), ("", early))
        )
    assert early.ends_after(13)
    assert not baseline.ends_after(13), "it is never pruned"


def test_the_baseline_counts_where_optunas_halving_judges(tmp_path: Path) -> None:
    """Which notes who was asked, and compares with them alone."""
    study, pruner = (
        made_study(tmp_path / "s", []),
        optuna.pruners.SuccessiveHalvingPruner(min_resource=1),
    )
    assert not Judged(study, pruner, "baseline").ends_at(1, 1.0)
    assert Judged(study, pruner).ends_at(1, 2.0)


def test_several_objectives_are_reported_and_judged_at_a_rung(tmp_path: Path) -> None:
    names = ["eval/loss", "adapter/parameters"]
    study, pruner = made_study(tmp_path / "s", [], *names), halving()

    def ends(loss: float, weights: float, role: str = "") -> bool:
        judged = Judged(study, pruner, role, constraints=["adapter/parameters <= 50"])
        reached = Rung(
            1, 10, 90, {"eval/loss": loss}, constants={"adapter/parameters": weights}
        )
        judged.judge.on_rung(reached)
        return judged.judge.should_prune(reached)

    # These have too many weights: they can't win, and are no rivals of the others.
    assert ends(0.1, 60.0)
    assert ends(0.1, 70.0)
    assert not ends(0.1, 80.0, "baseline")
    for loss, weights in ((1.0, 9.0), (2.0, 6.0), (3.0, 4.0)):
        assert not ends(loss, weights)
    assert not ends(9.0, 1.0), "no other has as few weights"
    assert ends(4.0, 9.0)
    assert not ends(4.0, 9.0, "baseline")
    rungs = [trial.user_attrs["rungs"] for trial in study.trials()]
    assert rungs[3] == {"1": [1.0, 9.0]}
    assert "infeasible: adapter/parameters <= 50" in trials_table(study)


def test_a_rung_without_all_objectives_judges_no_trial(tmp_path: Path) -> None:
    names = ["eval/loss", "eval/exact_match"]
    study, pruner = made_study(tmp_path / "s", [], *names), PrunesAlways()
    judged = Judged(study, pruner)
    for rung, metrics, is_pruned in (
        (1, {"eval/loss": 1.0}, False),
        (2, {"eval/loss": 1.0, "eval/exact_match": 0.5}, True),
    ):
        reached = Rung(rung, 10 * rung, 90, metrics)
        judged.judge.on_rung(reached)
        assert judged.judge.should_prune(reached) == is_pruned
    assert study.trials()[0].user_attrs["rungs"] == {"2": [1.0, 0.5]}


class PrunesAlways(optuna.pruners.BasePruner):
    """Stands for any pruner: asked about a trial, it gives it up."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        return True


def test_no_pruner_is_asked_before_the_warmup_is_over(tmp_path: Path) -> None:
    """Not at its rungs, not between them as others report, and not when the trial is resumed."""
    study, pruner = made_study(tmp_path / "s", []), PrunesAlways()
    trial = Judged(study, pruner)
    trial.judge.poll_seconds = 0
    assert not trial.ends_at(1, 2.0, is_warmup=True)
    Judged(study, pruner).ends_at(1, 1.0)
    assert not trial.ends_after(11)
    resumed = Judged(study, pruner, trial=trial.trial)
    resumed.judge.poll_seconds = 0
    assert not resumed.ends_after(12)
    assert not resumed.ends_at(2, 2.0, is_warmup=True)
    assert [*study.trials()[0].intermediate_values] == [1, 2], "reported all the same"
    assert resumed.ends_at(3, 2.0)
    assert Judged(study, pruner, trial=trial.trial).ends_after(31)


def run_until_pruned(folder: Path, config: RunConfig, total: int) -> Progress:
    """A run without a model, whose pruner gives it up as soon as it is asked."""
    study = made_study(folder / "s", [])
    judged = Judged(study, PrunesAlways())
    # It is judged after each step, too.
    judged.judge.poll_seconds = 0
    progress = Progress()

    def evaluate(generates: bool) -> RunSteps[dict[str, float]]:
        yield from ()
        return {"eval/loss": 1.0}

    reporter = Reporter(
        config=config,
        progress=progress,
        total=total,
        output=RunOutput(RunFolder(folder / "run"), Tracker(), total, False),
        evaluate=evaluate,
        early_stopping=EarlyStopping(config, progress, total, lambda step: None, False),
        observer=judged.judge,
        interrupt=Interrupt(),
    )
    (folder / "run").mkdir()
    drive(reporter.begin())
    while progress.stop is None and progress.step < total:
        drive(reporter.report_step(progress.step + 1, 1.0, 1.0, 1e-4, 10, 0.1))
    return progress


SCHEDULE_ARGUMENTS = {
    "cosine_with_min_lr": "{min_lr_rate:0.1}",
    "warmup_stable_decay": "{num_decay_steps:3}",
}


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("ratio", [0, 0.05, 0.3])
@pytest.mark.parametrize("eval_steps", ["0.25", "1", "[0.03704,0.1112,0.3334]"])
@pytest.mark.parametrize("schedule", get_args(ScheduleName))
def test_the_first_rung_that_judges_is_the_first_one_after_the_warmup(
    schedule: str, eval_steps: str, ratio: float, tmp_path: Path
) -> None:
    """Of every schedule, by the rates that transformers gives it."""
    import torch
    from transformers import get_scheduler

    total = 54
    overrides = [
        f"optimizer.lr_scheduler_type={schedule}",
        f"optimizer.warmup_ratio={ratio}",
        f"trainer.eval_steps={eval_steps}",
    ]
    if schedule in SCHEDULE_ARGUMENTS:
        arguments = SCHEDULE_ARGUMENTS[schedule]
        overrides.append(f"+trainer.extra.lr_scheduler_kwargs={arguments}")
    config = compose(*overrides)
    progress = run_until_pruned(tmp_path, config, total)
    rates = get_scheduler(
        schedule,
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
        num_warmup_steps=math.ceil(ratio * total),
        num_training_steps=total,
        scheduler_specific_kwargs=config.trainer.extra.get("lr_scheduler_kwargs"),
    ).lr_lambdas[0]
    factors = [rates(step) for step in range(total)]
    warmup_end = factors.index(max(factors))
    rungs = [
        step for step in evaluation_rungs(config.trainer.eval_steps, total) if step
    ]
    assert progress.stop == "pruned"
    assert progress.step == next(step for step in rungs if step >= warmup_end)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_slow_looks_at_the_storage_are_rare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a thousand running trials to read: they take a bounded share of a trial's time."""
    study = made_study(tmp_path / "s", [])
    looks: list[float] = []

    def look(trial: Judged) -> FrozenTrial:
        looks.append(time.monotonic())
        time.sleep(0.02)
        return stored()

    trial = Judged(study, halving())
    stored = trial.judge._stored_trial
    monkeypatch.setattr(trial.judge, "_stored_trial", lambda: look(trial))
    trial.judge.poll_seconds = 0
    end = time.monotonic() + 60
    while len(looks) < 3 and time.monotonic() < end:
        trial.ends_after(1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(looks)]
    assert gaps
    assert min(gaps) > PAUSE_FACTOR * 0.02


@pytest.mark.parametrize("name", PRUNERS)
def test_the_worst_trial_survives_its_warmup_under_each_pruner(
    name: str, tmp_path: Path
) -> None:
    study = made_study(tmp_path / "s", [])
    pruner = make_pruner(settings_of(f"hydra/sweeper/pruner={name}"))
    for value in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5):
        good = Judged(study, pruner, "baseline")
        for rung in (1, 2, 3):
            good.ends_at(rung, value)
        good.trial.study.tell(good.trial, value)
    trial = Judged(study, pruner)
    trial.judge.poll_seconds = 0
    for rung in (1, 2):
        assert not trial.ends_at(rung, 9.0 + rung, is_warmup=True)
        assert not trial.ends_after(10 * rung + 1)


@pytest.mark.parametrize(
    ("schedule", "judges_at_first_rung"),
    [("cosine", False), ("constant_with_warmup", False), ("constant", True)],
)
def test_a_study_prunes_no_trial_within_its_warmup(
    schedule: str,
    judges_at_first_rung: bool,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    """A constant rate has no warm-up, whatever `optimizer.warmup_ratio` says."""
    rates = ",".join(f"{{optimizer.learning_rate: {rate}}}" for rate in (1e-2, 1e-6))
    overrides = (
        *study_overrides(tiny_base, "s"),
        "optimizer.learning_rate=tag(log,interval(1e-6,1e-1))",
        f"hydra.sweeper.start=[{rates}]",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.slots=3",
        "hydra.sweeper.pruner.min_survivors=1",
        "hydra.sweeper.pruner.noise_margin=0",
        f"optimizer.lr_scheduler_type={schedule}",
        "optimizer.warmup_ratio=0.3",
        "trainer.max_steps=20",
        "trainer.eval_steps=[4,12]",
    )
    ended = station.run(*overrides, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    worst = Study.load(tmp_path / "outputs" / "sweeps" / "s").trials()[2]
    assert worst.state == TrialState.PRUNED
    # The warm-up's 6 steps end after the first rung.
    assert worst.user_attrs["step"] == (4 if judges_at_first_rung else 12)
    assert [*worst.intermediate_values] == ([1] if judges_at_first_rung else [1, 3])
    assert re.search(r"worse than others at this rung", worst.user_attrs["reason"])
