"""How a run relates to its surroundings: alone on the terminal, or one of many."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Observer
from finetune.run.resources import SharedResources
from finetune.tracking.tracker import Label


@dataclass(frozen=True)
class RunContext:
    """How a run takes part in something larger; by default it stands alone."""

    observer: Observer = field(default_factory=Observer)
    resources: SharedResources = field(default_factory=SharedResources)
    label: Label = field(default_factory=Label)
    interactive: bool = True
    """Whether the run has the terminal for itself, and ends with the sample prompts.

    A study asks for these of few of its trials, by `final_evaluation`.
    """
    evaluate_test_rows: bool = True
    """Whether the run ends with the test rows: not where a choice could see them."""
    interrupt: Interrupt = field(default_factory=Interrupt)
    slots: int = 1
    """How many runs may train together with this one, itself counted."""
    checkpointed_bases: Sequence[object] = ()
    """Bases, by their `base_key`, on which `trainer.gradient_checkpointing=auto` is true, decided for all of these."""
    packed_with: set[str] = field(default_factory=set)
    """Names of the runs that have trained together with this one; whoever brings them together adds to it."""
