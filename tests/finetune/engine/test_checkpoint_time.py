"""Checkpoints by time, `trainer.save_minutes`: both engines write them, and they change no number."""

from pathlib import Path

import pytest
from support.runs import Tiny, losses

from finetune.engine import reporter
from finetune.files.run_folder import checkpoint_step, checkpoints_in
from finetune.run.context import RunContext
from finetune.run.run import run

SIX_STEPS = (
    "trainer.max_steps=6",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    # All checkpoints stay.
    "++trainer.extra.save_total_limit=9",
    "sample_prompts=[]",
    "quantization=none",
)


class Clock:
    """A clock that goes on by ten minutes with each step of a run."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        report_step = reporter.Reporter.report_step

        def later_step(*arguments: object, **more: object) -> object:
            self.seconds += 600
            return report_step(*arguments, **more)  # type: ignore[arg-type]

        patch.setattr(reporter.Reporter, "report_step", later_step)
        patch.setattr(reporter.time, "monotonic", lambda: self.seconds)


@pytest.mark.parametrize("engine", ["packed", "trl"])
@pytest.mark.parametrize(
    ("minutes", "steps"), [("10", [1, 2, 3, 4, 5, 6]), ("25", [3, 6]), ("null", [])]
)
def test_a_checkpoint_is_written_when_the_minutes_have_passed(
    engine: str,
    minutes: str,
    steps: list[int],
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Clock(monkeypatch)
    config = tiny(
        *SIX_STEPS, f"trainer.engine={engine}", f"trainer.save_minutes={minutes}"
    )
    run(config, tmp_path / "run", RunContext(interactive=False))

    written = checkpoints_in(tmp_path / "run" / "checkpoints")
    assert [checkpoint_step(path) for path in written] == steps


def test_a_run_of_less_than_ten_minutes_has_no_checkpoint_by_time(
    tiny: Tiny, tmp_path: Path
) -> None:
    run(tiny(*SIX_STEPS), tmp_path, RunContext(interactive=False))

    assert not checkpoints_in(tmp_path / "checkpoints")


def test_checkpoints_by_time_change_no_number(tiny: Tiny, tmp_path: Path) -> None:
    for name, minutes in (("often", "1e-6"), ("never", "null")):
        config = tiny(*SIX_STEPS, f"trainer.save_minutes={minutes}")
        run(config, tmp_path / name, RunContext(interactive=False))

    assert losses(tmp_path / "often") == losses(tmp_path / "never")
