"""Trials that wait for a test in the middle of a run, however fast or slow the machine is."""

from pathlib import Path

GATE = """
import time
from pathlib import Path
from finetune.engine.reporter import Reporter
report_step = Reporter.report_step
trials = []
def gated_step(self, *, step, **more):
    if step == 5:
        trials.append(step)
        Path(f"{place}-{len(trials)}-reached").touch()
        while not Path(f"{place}-{len(trials)}-open").exists():
            time.sleep(0.05)
    return report_step(self, step=step, **more)
Reporter.report_step = gated_step
"""
"""Each trial of a process waits at its fifth step until a file exists."""


def gated(place: Path) -> str:
    """What a command's process runs first, so that its trials wait at gates."""
    return GATE.replace("{place}", str(place))


def gate(place: Path, number: int, name: str) -> Path:
    return Path(f"{place}-{number}-{name}")
