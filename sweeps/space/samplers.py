"""Samplers and pruners, made from a study's settings."""

import re
import warnings
import zlib
from collections.abc import Iterable
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler

from finetune.console import ignore_warnings
from finetune.errors import refusal
from sweeps.space.custom import load_function
from sweeps.space.settings import StudySettings
from sweeps.space.user_class import accepts, load_target, make_instance

SAMPLER = "hydra.sweeper.sampler"

LEARN_COMMON_PARAMETERS = re.compile(r"cmaes|gp|qmc|nsgaiii|nsgaii", re.IGNORECASE)
"""Samplers that draw a parameter at random unless every trial so far has it."""

IGNORE_CONSTRAINTS = re.compile(r"\b(CmaEs|QMC|Random|BruteForce)Sampler$")
"""Samplers of Optuna that do not read the constraints of trials."""

MOVED_CLASSES = {
    "sweeps.halving.SuccessiveHalvingPruner": "sweeps.space.pruners.SuccessiveHalvingPruner",
}
"""Old class paths, which users' YAML files and commands may still name."""


def make_pruner(settings: StudySettings) -> BasePruner:
    """Make the study's pruner; one that never prunes where it can't compare several objectives."""
    arguments = _with_current_path(settings.pruner)
    if len(settings.directions) > 1 and not compares_several(settings):
        return NopPruner()
    with warnings.catch_warnings():
        # Hyperband and patience are experimental.
        warnings.simplefilter("ignore", ExperimentalWarning)
        pruner: BasePruner = make_instance(
            "hydra.sweeper.pruner", arguments, BasePruner
        )
    return pruner


def compares_several(settings: StudySettings) -> bool:
    """Whether the configured pruner compares trials by several objectives: Optuna's do not."""
    target = _with_current_path(settings.pruner)["_target_"]
    return str(target) == "sweeps.space.pruners.SuccessiveHalvingPruner"


def make_sampler(
    settings: StudySettings,
    run_seed: int,
    trial_number: int,
    has_conditions: bool = False,
) -> BaseSampler:
    """Make the sampler of one trial.

    Args:
        settings: the study's settings.
        run_seed: the config's seed, used where the sampler has none of its own.
        trial_number: the trial's number in the study.
        has_conditions: whether some parameters are searched in some trials only.

    Returns:
        A sampler seeded by both the study's seed and the trial's number.

    Raises:
        ConfigError: the sampler can't be made, or its seed is no whole number.
    """
    if settings.is_grid:
        # Each trial of a grid has a point; only a `custom_search_space` leaves more to choose.
        return RandomSampler(run_seed)
    seed = _sampler_seed(settings.sampler, run_seed, trial_number)
    arguments = dict(settings.sampler)
    if has_conditions:
        arguments |= _for_conditions(arguments)
    functions = {}
    target = load_target(SAMPLER, str(arguments["_target_"]))
    arguments.pop("seed", None)
    # A class of the user's own may have none.
    if accepts(target, "seed"):
        arguments["seed"] = seed
    constraints = arguments.get("constraints_func")
    if isinstance(constraints, str):
        key = "hydra.sweeper.sampler.constraints_func"
        functions["constraints_func"] = load_function(constraints, key)
        del arguments["constraints_func"]
    # Said once for the study, by `constraints_note`; Optuna says it at the end of each trial.
    ignore_warnings("Constraints have been set, but CmaEsSampler")
    with warnings.catch_warnings():
        # The argument `group` is experimental.
        warnings.simplefilter("ignore", ExperimentalWarning)
        # Optuna 5 prefers constraints that a trial sets, which a config can't name.
        warnings.simplefilter("ignore", FutureWarning)
        sampler: BaseSampler = make_instance(
            SAMPLER, arguments, BaseSampler, **functions
        )
    return sampler


def learns_from_results(settings: StudySettings) -> bool:
    """Whether the sampler reads trials of other studies; CMA-ES and NSGA need their generations."""
    target = str(settings.sampler.get("_target_"))
    return not re.search(
        r"\b(Random|QMC|Grid|BruteForce|CmaEs|NSGAII|NSGAIII)Sampler$", target
    )


def reads_bounded_trials(settings: StudySettings) -> bool:
    """Whether the sampler reads the best and the latest trials only, once there are many.

    Those of Optuna whose time grows with the trials, but for several objectives: their best trials
    have no bound.
    """
    target = str(settings.sampler.get("_target_"))
    is_slower = re.fullmatch(r"optuna\.samplers\.(TPE|GP)Sampler", target)
    return is_slower is not None and len(settings.directions) == 1


def conditions_note(settings: StudySettings, names: Iterable[str]) -> str | None:
    """Say which parameters a sampler draws at random, as some trials do without them.

    Args:
        settings: the study's settings.
        names: the parameters that have a condition.

    Returns:
        The note; None where the sampler learns them, or draws all at random anyway.
    """
    name = str(settings.sampler["_target_"]).rpartition(".")[2]
    sampler = LEARN_COMMON_PARAMETERS.search(name)
    shown = ", ".join(names)
    if not shown or sampler is None:
        return None
    return (
        f"{shown}: drawn at random, because {sampler[0].lower()} learns only what is searched in "
        "all trials; hydra/sweeper/sampler=tpe learns these too"
    )


def constraints_note(settings: StudySettings) -> str | None:
    """Say that a sampler does not learn from the study's constraints; None: it does, or has none.

    A grid tries every point, whatever it has learnt.
    """
    sampler = IGNORE_CONSTRAINTS.search(str(settings.sampler["_target_"]))
    if not settings.constraints or sampler is None:
        return None
    name = sampler[1].lower()
    return (
        f"constraints: {name} does not learn from them, so it suggests points that violate them as "
        "often as others; hydra/sweeper/sampler=tpe, gp or nsgaii learns from them"
    )


def _for_conditions(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a sampler's arguments for parameters that are searched in some trials only."""
    # TPE then draws those parameters together that the same trials have, instead of none.
    if arguments.get("multivariate"):
        return {"group": True}
    # Said once for the study, by `conditions_note`.
    if "warn_independent_sampling" in arguments:
        return {"warn_independent_sampling": False}
    return {}


def _sampler_seed(arguments: dict[str, Any], run_seed: int, trial_number: int) -> int:
    """Derive the seed of one trial's sampler.

    A sampler with the study's seed would repeat its suggestions after each resume, so the trial's
    number goes into the seed. QMC is the exception: it counts its points in the storage, and they
    form one low-discrepancy sequence only under one seed.
    """
    study_seed = arguments.get("seed")
    if study_seed is None:
        study_seed = run_seed
    if not isinstance(study_seed, int):
        allowed = "must be a whole number, or null: the run's seed"
        raise refusal("hydra.sweeper.sampler.seed", study_seed, allowed)
    if str(arguments["_target_"]).endswith("QMCSampler"):
        return study_seed
    # Not Python's `hash`, which gives the same text another number in each process.
    return zlib.crc32(f"{study_seed} {trial_number}".encode())


def _with_current_path(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace class paths from before a module moved, also of a `wrapped_pruner`."""
    current = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            value = _with_current_path(value)
        if key == "_target_":
            value = MOVED_CLASSES.get(value, value)
        current[key] = value
    return current
