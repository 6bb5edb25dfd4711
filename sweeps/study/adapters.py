"""Which adapters and checkpoints of a study stay on disk."""

import itertools
import shutil

from finetune.files.atomic import read_json
from finetune.files.mirror import Mirror
from sweeps.study.inside import is_inside
from sweeps.study.study import CONFIRMATION, Study


def remove_adapters(study: Study, keep: int, mirror: Mirror) -> None:
    """Remove adapters and checkpoints of finished trials that nobody needs any more.

    Those of the baseline and of the winner that a confirmation has chosen stay.

    Args:
        study: the study.
        keep: number of the best trials whose adapters and checkpoints stay.
        mirror: has copies of them, which are removed too.
    """
    # Read before the ranking: a trial that finishes in between may be one of the best.
    finished = study.finished()
    ranked = study.ranked()
    inside = filter(is_inside, ranked)
    # The winner may lie outside the space.
    best = [*ranked[:1], *itertools.islice(inside, keep)]
    needed = {trial.number for trial in best}
    baseline = study.baseline()
    if baseline is not None:
        needed.add(baseline.number)
    confirmation = read_json(study.folder / CONFIRMATION)
    if confirmation:
        needed.add(confirmation["winner"])
    unneeded = []
    for trial in finished:
        # Each once: a study may have thousands, and this happens at the end of each of them.
        if trial.number in needed or trial.number in study.without_adapter:
            continue
        unneeded.append(study.folder_of(trial.number))
        study.without_adapter.add(trial.number)
    # Of the baseline's further seeds, only the evaluation is needed once they are done.
    for seed_folder in study.baseline_seed_folders():
        result = read_json(seed_folder.result) or {}
        # An interrupted run goes on from its checkpoint.
        if result.get("status") in ("completed", "failed"):
            unneeded.append(seed_folder)
    for folder in unneeded:
        if not (folder.adapter.exists() or folder.checkpoints.exists()):
            continue
        # Errors are ignored: the folders may be gone, or another worker removes them now.
        shutil.rmtree(folder.adapter, ignore_errors=True)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        # The other files may be those of an older state: another machine may have ended the trial.
        mirror.remove_copies(
            folder.path, [folder.adapter.name, folder.checkpoints.name]
        )
