"""What a tracker's store holds of a run already, where a killed run continues."""

from collections.abc import Iterable

from finetune.files.run_folder import Metrics, RunFolder, checkpoint_step


class LoggedMetrics:
    """The values that a store has, so that a resumed run logs each of them once.

    For stores that only append: what a run logs again after its checkpoint would stand there twice.
    """

    def __init__(self) -> None:
        self._steps: dict[str, set[int]] = {}

    def add(self, name: str, steps: Iterable[int]) -> None:
        """Add the steps at which the store has a metric."""
        self._steps.setdefault(name, set()).update(steps)

    def missing(self, step: int, metrics: Metrics) -> Metrics:
        """Return the metrics of an optimizer step that the store has not."""
        return {
            name: value
            for name, value in metrics.items()
            if step not in self._steps.get(name, ())
        }


def rows_until_checkpoint(folder: RunFolder) -> list[tuple[int, Metrics]]:
    """Return the steps that a resumed run does not log again, each with its metrics.

    A kill may have kept some of them from a tracker.
    """
    checkpoint = folder.last_checkpoint()
    if checkpoint is None:
        return []
    last = checkpoint_step(checkpoint)
    rows = []
    for row in folder.metrics():
        step = row.pop("step")
        # NaN is null in the file.
        metrics = {name: value for name, value in row.items() if value is not None}
        if step <= last:
            rows.append((step, metrics))
    return rows
