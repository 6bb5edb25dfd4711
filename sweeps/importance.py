"""How much each parameter mattered, from all trials that were measured, pruned ones too."""

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState, create_trial

LEAST = 8
"""Trials needed before a share means anything."""


def importances(study: optuna.Study) -> dict[str, float]:
    """Each parameter's share by PED-ANOVA (Watanabe et al., 2023), the largest first; empty for small studies.

    Trials are compared where most were measured: complete ones would be few where much is pruned, so each
    trial counts with its value at the last rung that all of them reached.
    """
    if len(study.directions) > 1:
        return {}
    measured = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and trial.intermediate_values
    ]
    if len(measured) < LEAST:
        return {}
    rung = min(max(trial.intermediate_values) for trial in measured)
    copy = optuna.create_study(directions=study.directions)
    copy.add_trials([_at(trial, rung) for trial in measured if rung in trial.intermediate_values])
    varied = [name for name in measured[0].params if len({str(trial.params.get(name)) for trial in measured}) > 1]
    try:
        shares = optuna.importance.get_param_importances(copy, evaluator=PedAnovaImportanceEvaluator(), params=varied)
    except (ValueError, RuntimeError):  # too few of a kind, or parameters that exist only in some trials
        return {}
    return dict(sorted(shares.items(), key=lambda share: -share[1]))


def _at(trial: FrozenTrial, rung: int) -> FrozenTrial:
    return create_trial(params=trial.params, distributions=trial.distributions, value=trial.intermediate_values[rung])
