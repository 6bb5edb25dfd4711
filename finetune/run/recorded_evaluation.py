"""The file `test_rows.json` of a run: its adapter's evaluation on the test rows, row by row."""

import dataclasses

from finetune.engine.evaluation import Evaluation
from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import RunFolder
from finetune.metrics.metric import Score


def write_test_evaluation(folder: RunFolder, evaluation: Evaluation) -> None:
    """Write a run's evaluation on the test rows, and its accuracy for readers of the file."""
    record = dataclasses.asdict(evaluation) | {"accuracy": evaluation.accuracy}
    write_json(folder.test_rows, record)


def read_test_evaluation(folder: RunFolder) -> Evaluation | None:
    """Read a run's evaluation on the test rows.

    Returns:
        The evaluation; None if there is none, if a loss is NaN, or if it is of an earlier version,
        which has no `row_correct`.
    """
    record = read_json(folder.test_rows)
    # A NaN was written as null, which JSON has in its place.
    if record is None or None in record["row_losses"] or "row_correct" not in record:
        return None
    return Evaluation(
        row_losses=tuple(record["row_losses"]),
        row_tokens=tuple(record["row_tokens"]),
        row_correct=tuple(record["row_correct"]),
        scores={
            name: Score.from_dict(values)
            for name, values in record.get("scores", {}).items()
        },
    )
