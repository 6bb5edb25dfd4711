"""Studies driven as a worker drives them, in which nothing is trained."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from finetune.engine.interrupt import Interrupt
from support.configs import compose
from support.studies import settings_of
from sweeps.space.space import Point, Space
from sweeps.study.claims import claim_trial
from sweeps.study.creation import create_or_resume
from sweeps.study.engine_choice import EngineChoice
from sweeps.study.session import Session
from sweeps.study.trial import TrialRunner
from sweeps.study.waiting import enqueue_trials


def session_of(
    *overrides: str,
    space: Space,
    seed: int = 0,
    folder: Path = Path("s"),
    config: dict[str, Any] | None = None,
) -> Session:
    """Return a session that composes no trial."""
    nothing: Any = None
    sweep, common = OmegaConf.create(config or {}), compose(f"seed={seed}")
    engine = EngineChoice("packed", slots=1)
    return Session(
        folder=folder,
        settings=settings_of(*overrides),
        space=space,
        config=sweep,
        hydra_context=nothing,
        common=common,
        deadline=None,
        engine=engine,
    )


def drive_study(
    folder: Path,
    sampler: str,
    trials: int,
    *overrides: str,
    seed: int = 0,
    params: dict[str, str],
    values: Callable[[Point], list[float]],
    arguments: Sequence[str] = (),
    points: list[tuple[str, Point]] | None = None,
    config: dict[str, Any] | None = None,
) -> list[Point]:
    """Run the trials of a study, but for their training.

    Args:
        folder: the study's folder; one that exists is resumed.
        sampler: the choice of `hydra/sweeper/sampler`.
        trials: the study's number of trials.
        overrides: further ones of the sweeper.
        seed: the run's seed.
        params: `hydra.sweeper.params`.
        values: returns the objectives at a point.
        arguments: sweeps of the command line.
        points: role and point of the first trials.
        config: what a user's function receives.

    Returns:
        The points of all trials.
    """
    session = session_of(
        f"hydra/sweeper/sampler={sampler}",
        *overrides,
        space=Space.parse(params, arguments),
        seed=seed,
        folder=folder.parent,
        config=config,
    )
    count = len(session.settings.directions)
    objectives = ["eval/loss", "adapter/parameters"][:count]
    opened = create_or_resume(
        folder,
        session.settings,
        None,
        {"objective": objectives if len(objectives) > 1 else objectives[0]},
        session.space.distributions,
    )
    enqueue_trials(opened, trials, points or [])
    while True:
        with claim_trial(opened) as claim:
            if claim is None:
                break
            runner = TrialRunner(session, opened, claim, Interrupt())
            runner.suggest_overrides()
            opened.optuna.tell(runner.trial, values(runner.trial.params))
    return [trial.params for trial in opened.trials()]
