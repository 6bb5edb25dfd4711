"""What a confirmation has shown, as `confirm.json` holds it. Loads no torch."""

from typing import Any

from finetune.files.atomic import read_json
from sweeps.study.study import CONFIRMATION, Study


def read_confirmation(study: Study) -> dict[str, Any] | None:
    """Read `confirm.json`.

    Args:
        study: the study.

    Returns:
        Its content; None if there is none, or if it is outdated because another trial is the best
        by now.
    """
    confirmation: dict[str, Any] | None = read_json(study.folder / CONFIRMATION)
    ranked = study.ranked()
    if not confirmation or not ranked:
        return None
    best = ranked[0].number
    return confirmation if confirmation["before"] == best else None
