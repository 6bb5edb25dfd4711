"""How a trial ended: what the study stores of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import TrialState

from finetune.metrics.names import describe_metric, format_metric


@dataclass(frozen=True)
class Outcome:
    """A trial's final state, its objectives' values, and attributes that say more."""

    state: TrialState
    values: list[float] | None = None
    """One value for each objective; None unless the trial is complete."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """`step` of a complete or pruned trial, `error` of a failed one."""

    @classmethod
    def failed(cls, error: str) -> "Outcome":
        """Return the outcome of a trial that failed."""
        return cls(TrialState.FAIL, attributes={"error": error})

    @classmethod
    def of_result(
        cls, result: Mapping[str, Any], objectives: Sequence[str]
    ) -> "Outcome":
        """Read the outcome of a finished run from its `result.json`.

        Args:
            result: the file's content.
            objectives: the names of the study's metrics.

        Returns:
            The outcome; a failure where the run has no value of an objective.
        """
        if result["status"] == "failed":
            return cls.failed(result["error"])
        if result["status"] == "pruned":
            return cls(TrialState.PRUNED, attributes={"step": result["step"]})
        values = []
        for name in objectives:
            value = result["metrics"].get(name)
            if value is None:
                return cls.failed(f"the run gave no {name}")
            values.append(value)
        return cls(TrialState.COMPLETE, values, {"step": result["step"]})

    def describe(self, objectives: Sequence[str]) -> str:
        """Return a line for the log."""
        if self.state == TrialState.FAIL:
            return f"failed: {self.attributes['error']}"
        if self.state == TrialState.PRUNED:
            return f"pruned at step {self.attributes['step']}"
        assert self.values is not None
        results = []
        for name, value in zip(objectives, self.values, strict=True):
            results.append(f"{describe_metric(name)} {format_metric(value)}")
        return f"completed, {', '.join(results)}"
