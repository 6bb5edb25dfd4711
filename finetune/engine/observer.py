"""An observer of a run: it receives each evaluation, and may stop the run."""

from dataclasses import dataclass

from finetune.files.run_folder import Metrics


@dataclass(frozen=True)
class Rung:
    """An evaluation: a point where a run reports its objective and may be stopped."""

    index: int
    """How many times as far it is as the first one after training began; 0 is before the first step."""
    step: int
    total: int
    """Steps that the run shall have."""
    metrics: Metrics


class Observer:
    """Hears of every step and every rung, and may stop the run there. This one lets it go on.

    Runs that began together report the same rung before any of them is judged there.
    """

    def on_step(self, step: int) -> bool:
        """Whether the run shall stop after this optimizer step, pruned."""
        return False

    def on_rung(self, rung: Rung) -> None:
        """Take the report."""

    def judge(self, rung: Rung) -> bool:
        """Whether the run shall stop here, pruned."""
        return False

    def on_completed(self, metrics: Metrics) -> list[str]:
        """Tags for the run that has reached its end."""
        return []
