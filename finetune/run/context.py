"""The surroundings of a run: alone on the terminal, or one of many."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Observer
from finetune.run.resources import SharedResources
from finetune.tracking.tracker import Label


@dataclass(frozen=True)
class RunContext:
    """What a run is given besides its config; the defaults are those of a run alone."""

    observer: Observer = field(default_factory=Observer)
    """Receives each evaluation, and may stop the run."""
    resources: SharedResources = field(default_factory=SharedResources)
    """Rows, tokens and the loaded base."""
    label: Label = field(default_factory=Label)
    """What trackers call the run."""
    interactive: bool = True
    """Whether the run has the terminal for itself, and answers the sample prompts.

    Of a study's trials only few answer them, at the study's end: see `final_evaluation`.
    """
    evaluate_test_rows: bool = True
    """Whether the run ends with the test rows. False where the result could influence a
    decision."""
    saves_pruned_adapter: bool = True
    """Whether a run that is pruned saves its adapter; a study would remove it at once."""
    notifies: bool = False
    """Whether the run tells `notify.command` of its end; a trial does not, as its study does."""
    interrupt: Interrupt = field(default_factory=Interrupt)
    """Ctrl-C and SIGTERM, shared by the runs of one process."""
    slots: int = 1
    """How many runs may train together, this one included."""
    checkpointed_bases: Sequence[object] = ()
    """Keys (`base_key`) of bases on which `trainer.gradient_checkpointing=auto` means partial."""
    packed_with: set[str] = field(default_factory=set)
    """Names of the runs that have trained together with this one, filled in by the pack."""
