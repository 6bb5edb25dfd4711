"""Every private name, patch and trick on another library.

One function each, with the reason, the version it was read in, and the upstream thread.
"""

import optuna
from optuna.trial import FrozenTrial


def trial_id(trial: FrozenTrial | optuna.Trial) -> int:
    """Return the id under which a storage knows a trial.

    Storages address trials by an id that differs from `trial.number` as soon as one database
    holds several studies. Optuna has no public attribute for it.

    Read in Optuna 5.0.0 (`optuna/trial/_frozen.py`, `optuna/trial/_trial.py`); see
    https://github.com/optuna/optuna/pull/663 (it was made private).
    """
    return int(trial._trial_id)
