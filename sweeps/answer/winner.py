"""The winner of a study, and its run. Loads no torch."""

from optuna.trial import FrozenTrial

from finetune.files.run_folder import RunFolder
from sweeps.answer.confirmation import read_confirmation
from sweeps.study.study import Study


def find_winner(study: Study) -> FrozenTrial | None:
    """Return the confirmed winner, or else the best trial."""
    ranked = study.ranked()
    confirmation = read_confirmation(study)
    if confirmation is not None:
        number = confirmation["winner"]
        return next(trial for trial in ranked if trial.number == number)
    return ranked[0] if ranked else None


def run_with_adapter(study: Study, winner: FrozenTrial) -> RunFolder:
    """Return the winner's run, or one that a confirmation has trained if its adapter is gone.

    If no adapter is left, the winner's own run is returned.
    """
    own_run = study.folder_of(winner.number)
    confirm_folder = study.folder / "confirm"
    repeats = sorted(confirm_folder.glob(f"{winner.number}-seed*"))
    for run in [own_run, *map(RunFolder, repeats)]:
        if run.adapter.is_dir():
            return run
    return own_run
