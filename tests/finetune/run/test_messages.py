"""What a run tells the user while it runs: each long stage has a line, an interruption a remedy."""

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Station, wait_until
from support.configs import tiny_overrides

from finetune.config.schema import RunConfig
from finetune.console import error_line
from finetune.engine.interrupt import Interrupt
from finetune.errors import Interrupted
from finetune.exit_codes import INTERRUPTED
from finetune.run.context import RunContext
from finetune.run.run import run

Tiny = Callable[..., RunConfig]
SHORT = (
    "trainer.max_steps=2",
    "trainer.eval_steps=0",
    "sample_prompts=[Why?,How?]",
    "sample_max_new_tokens=2",
)
by_both = pytest.mark.parametrize(
    "engine", ["trainer.engine=packed", "trainer.engine=trl"]
)
NOTHING_TRAINED = "interrupted before the first step: nothing is trained yet; the same command starts it again"


def stages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines that announce a stage of a run, without the numbers of rows."""
    verbs = ("answering", "evaluating", "training on")
    lines = [line for line in caplog.messages if line.startswith(verbs)]
    return [
        " ".join(word for word in line.split() if not word.isdigit()) for line in lines
    ]


@by_both
def test_each_long_stage_says_that_it_begins(
    engine: str, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "finetune")
    run(tiny(*SHORT, engine), tmp_path)

    assert "answering 2 sample prompts before training" in caplog.messages
    assert stages(caplog) == [
        "answering sample prompts before training",
        "training on rows: steps of",
        "evaluating held-out rows before the first step",
        "evaluating test rows",
        "answering sample prompts after training",
    ]


def test_a_stage_that_is_left_out_is_not_announced(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "finetune")
    without = (
        "sample_prompts=[]",
        "dataset.eval_fraction=0",
        "dataset.test_fraction=0",
    )
    run(tiny(*SHORT, *without), tmp_path / "without")
    run(tiny(*SHORT), tmp_path / "trial", RunContext(interactive=False))

    assert stages(caplog) == ["training on rows: steps of"] * 2


@by_both
def test_a_resumed_run_announces_only_what_it_still_does(
    engine: str, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt = Interrupt()
    interrupt.requested = True
    with pytest.raises(Interrupted):
        run(tiny(*SHORT, engine), tmp_path, RunContext(interrupt=interrupt))
    caplog.clear()
    caplog.set_level(logging.INFO, "finetune")
    run(tiny(*SHORT, engine), tmp_path)

    assert stages(caplog) == [
        "training on rows: steps of",
        "evaluating test rows",
        "answering sample prompts after training",
    ]


def interrupt_call(monkeypatch: pytest.MonkeyPatch, target: str, call: int) -> None:
    """Let one call of a function, counted from 0, be interrupted; the others return answers."""
    number = 0

    def interrupted(*_: Any, **__: Any) -> list[list[list[int]]]:
        nonlocal number
        number += 1
        if number - 1 == call:
            raise KeyboardInterrupt
        return [[[5], [5]]]

    monkeypatch.setattr(target, interrupted)


ROWS = "finetune.run.resources.load_rows"
ANSWERS = "finetune.engine.packed.generation_pass.generate_tokens"


@pytest.mark.parametrize(
    ("target", "call", "save_steps", "says"),
    [
        (ROWS, 0, 1, NOTHING_TRAINED),
        (ANSWERS, 0, 1, NOTHING_TRAINED),
        (
            ANSWERS,
            1,
            1,
            "interrupted; python -m finetune resume={} continues after step 2",
        ),
        (
            ANSWERS,
            1,
            0,
            "interrupted after step 2, of which no checkpoint is saved; "
            "the same command starts it again",
        ),
    ],
)
def test_an_interruption_outside_the_steps_says_how_to_continue(
    target: str,
    call: int,
    save_steps: int,
    says: str,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(*SHORT, f"trainer.save_steps={save_steps}")
    with monkeypatch.context() as patch:
        interrupt_call(patch, target, call)
        with pytest.raises(KeyboardInterrupt) as caught:
            run(config, tmp_path)

    assert error_line(caught.value) == says.format(os.path.relpath(tmp_path))
    recorded = json.loads((tmp_path / "result.json").read_text())
    assert (recorded["status"], recorded["error"]) == (
        "interrupted",
        error_line(caught.value),
    )
    run(config, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "completed"


SLOW_ANSWERS = """
import time, finetune.engine.packed.generation_pass
finetune.engine.packed.generation_pass.generate_tokens = lambda *_: time.sleep(60)
"""


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_says_that_nothing_is_trained(
    number: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    command = [*tiny_overrides(tiny_base), *SHORT, "hydra.run.dir=run"]
    process = station.start(*command, cwd=tmp_path, before=SLOW_ANSWERS)
    wait_until(lambda: "answering 2 sample prompts" in process.said(), process)
    process.send_signal(number)
    ended = process.wait()

    assert ended.returncode == INTERRUPTED
    assert ended.stderr.splitlines()[-1] == f"error: {NOTHING_TRAINED}"
    again = station.run(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
