"""What the project relies on in other libraries without their promise."""

from pathlib import Path

import optuna

from sweeps.compat import trial_id


def test_the_storage_knows_a_trial_by_its_id_and_not_by_its_number(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'studies.db'}"
    optuna.create_study(study_name="first", storage=storage).ask()
    study = optuna.create_study(study_name="second", storage=storage)
    trial = study.ask()
    assert trial.number == 0

    (frozen,) = study.get_trials()

    assert trial_id(trial) == trial_id(frozen) == 2
    assert study._storage.get_trial(trial_id(frozen)).number == 0
