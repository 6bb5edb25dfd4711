"""Whether a study has changed since it was last looked at."""

import hashlib
from pathlib import Path

from sweeps.study.study import CONFIRMATION, Study


def study_version(study: Study) -> str:
    """Return a text that changes with each step that a trial logs, and whatever else is new."""
    digest = hashlib.sha256(repr(study.optuna.user_attrs).encode())
    for trial in study.trials():
        state = (trial.number, trial.state, trial.values, trial.intermediate_values)
        digest.update(repr((state, trial.user_attrs)).encode())
        folder = study.folder_of(trial.number).path
        digest.update(_file_state(folder / "metrics.jsonl"))
    for name in ("answer.json", CONFIRMATION):
        digest.update(_file_state(study.folder / name))
    return digest.hexdigest()[:16]


def _file_state(path: Path) -> bytes:
    try:
        status = path.stat()
    except OSError:
        return b"-"
    return f"{status.st_size} {status.st_mtime_ns}".encode()
