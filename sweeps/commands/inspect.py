"""Commands that only read studies: list, show, diff."""

import argparse
import time
from pathlib import Path
from typing import Any

from finetune.console import error_line
from finetune.files.find_run import STUDIES
from sweeps.study.find_study import (
    begun,
    find_study,
    load_study,
    study_folders,
)

# Studies are imported inside the functions: they load Optuna, which `--help` and a mistake on the
# command line do not need.


def list_studies(arguments: argparse.Namespace) -> None:
    """Print all studies."""
    from sweeps.study.formatting import format_table

    folders = study_folders()
    if arguments.json:
        studies = [_list_value(folder) for folder in folders]
        arguments.print_json({"studies": studies})
        return
    if not folders:
        print(f"no studies under {STUDIES}")
        return
    rows = [_list_row(folder) for folder in folders]
    print(format_table(["study", "begun", "trials", "objective", "best"], rows))


def _list_value(folder: Path) -> dict[str, Any]:
    """Return the study in a folder for `--json`, or the error where it can't be read."""
    from sweeps.study.json_values import study_value

    try:
        # Without retries, as in the table.
        return study_value(load_study(folder, retry_seconds=0))
    except Exception as error:
        line = error_line(error)
        return {"study": folder.name, "folder": str(folder), "error": line}


def _list_row(folder: Path) -> list[str]:
    """Name, start, trial count and best value of the study in a folder."""
    from optuna.trial import TrialState

    from sweeps.study.formatting import objective_cells

    start = time.strftime("%Y-%m-%d %H:%M", time.localtime(begun(folder)))
    try:
        # Without retries: a database out of reach must not hold up the list of all studies.
        study = load_study(folder, retry_seconds=0)
    # Its database can't be reached, or its files are damaged.
    except Exception as error:
        return [folder.name, start, "", "", error_line(error)]
    counts = f"{len(study.finished())}/{len(study.trials())}"
    ranked = study.ranked()
    value = ""
    if not ranked and study.trials(TrialState.COMPLETE):
        value = "none feasible"
    if ranked:
        cells = objective_cells(ranked[0], len(study.objectives))
        value = " ".join(cells)
    return [study.name, start, counts, " ".join(study.objectives), value]


def show(arguments: argparse.Namespace) -> None:
    """Print the trials of a study, or one of them in full."""
    from sweeps.study.budget import describe_tokens
    from sweeps.study.formatting import trials_table
    from sweeps.study.json_values import full_trial_value, trials_value
    from sweeps.study.multirun_folder import is_multirun
    from sweeps.study.trial_text import trial_text

    study = find_study(arguments.study)
    number = arguments.trial
    if arguments.json:
        is_one = number is not None
        value = full_trial_value(study, number) if is_one else trials_value(study)
        arguments.print_json(value)
        return
    if number is not None:
        print(trial_text(study, number))
        return
    print(trials_table(study, is_ranked=is_multirun(study)))
    tokens = describe_tokens(study)
    if tokens:
        print(tokens)


def diff(arguments: argparse.Namespace) -> None:
    """Print what two trials differ in."""
    from sweeps.study.json_values import difference_value
    from sweeps.study.trial_text import difference_text

    study = find_study(arguments.study)
    if arguments.json:
        arguments.print_json(difference_value(study, arguments.trials))
    else:
        print(difference_text(study, arguments.trials))
