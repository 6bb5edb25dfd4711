"""The exit codes of all commands, by real processes: docs/exit-codes.md.

Interrupted runs and studies (3) are tested where their checkpoints are: `test_run`, `test_messages`,
`test_interruptions`, `test_workers`, `test_confirm`, `test_study_database`.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import Station, wait_until
from support.configs import study_overrides, tiny_overrides
from support.studies import made_study

from finetune import exit_codes
from finetune.exit_codes import ANSWER, INTERRUPTED, MISTAKE, NO_ANSWER

ROOT = Path(__file__).resolve().parent.parent

OUT_OF_MEMORY = """
import torch
from finetune.engine.packed.bank import Bank
def forward_backward(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
Bank.forward_backward = forward_backward
"""
BROKEN = """
from finetune.engine.packed.bank import Bank
Bank.forward_backward = lambda *_: undefined
"""
ALL_DIVERGE = ("trainer.max_steps=12", "optimizer.learning_rate=1e30")


@pytest.mark.parametrize(
    ("module", "words", "code"),
    [
        ("finetune", "--help", ANSWER),
        ("finetune", "--version", ANSWER),
        ("finetune", "--cfg job", ANSWER),
        ("sweeps", "list", ANSWER),
        ("sweeps", "show empty", ANSWER),
        ("sweeps", "show empty --json", ANSWER),
        ("finetune", "lora.r=0", MISTAKE),
        ("finetune", "lora.rr=1", MISTAKE),
        ("finetune", "model=nowhere", MISTAKE),
        ("finetune", "lora.r=[", MISTAKE),
        ("finetune", "--no-such-flag", MISTAKE),
        ("finetune", "-m lora.r=0,-1", MISTAKE),
        ("finetune", "-m hydra/sweeper=optuna n_trials=0", MISTAKE),
        ("finetune", "resume=nowhere", MISTAKE),
        ("finetune.evaluate", "", MISTAKE),
        ("finetune.evaluate", "nowhere --data x.jsonl", MISTAKE),
        ("finetune.generate", "nowhere --no-such-flag", MISTAKE),
        ("finetune.merge", "nowhere --to here", MISTAKE),
        ("finetune.plan", "--no-such-flag", MISTAKE),
        ("finetune.preview", "dataset.path=nowhere.jsonl", MISTAKE),
        ("sweeps", "", MISTAKE),
        ("sweeps", "no-such-command", MISTAKE),
        ("sweeps", "show nowhere", MISTAKE),
        ("sweeps", "show empty 7", MISTAKE),
        ("sweeps", "confirm empty --top x", MISTAKE),
        ("sweeps", "best empty", NO_ANSWER),
        ("sweeps", "confirm empty", NO_ANSWER),
    ],
)
def test_a_command_ends_with(
    module: str, words: str, code: int, light_station: Station, tmp_path: Path
) -> None:
    made_study(tmp_path / "outputs" / "sweeps" / "empty", [])
    ended = light_station.run(*words.split(), cwd=tmp_path, module=module)

    assert ended.returncode == code, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code != ANSWER), ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "before", "code"),
    [
        (ALL_DIVERGE, "", NO_ANSWER),
        ((), OUT_OF_MEMORY, NO_ANSWER),
        ((), BROKEN, MISTAKE),
        (("-m", "seed=1,2", *ALL_DIVERGE), "", NO_ANSWER),
        (("-m", "seed=1,2", "hydra/launcher=basic"), OUT_OF_MEMORY, NO_ANSWER),
        (("-m", "seed=1,-1"), OUT_OF_MEMORY, MISTAKE),
    ],
    ids=["NaN", "memory", "bug", "jobs", "basic jobs", "jobs and a mistake"],
)
def test_a_run_without_a_result_ends_with(
    words: tuple[str, ...],
    before: str,
    code: int,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    config = (*tiny_overrides(tiny_base), "quantization=none", "sample_prompts=[]")
    ended = station.run(*config, *words, cwd=tmp_path, before=before)

    assert ended.returncode == code, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_a_study_of_failed_trials_has_no_answer(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    space = ("~search", "lora.r=choice(4,8)", "n_trials=2")
    study = (*study_overrides(tiny_base, "s"), *space, *ALL_DIVERGE)
    ended = station.run(*study, cwd=tmp_path)

    assert ended.returncode == NO_ANSWER, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert (tmp_path / "outputs/sweeps/s/report.html").exists()


@pytest.mark.parametrize("words", ["--cfg job", "--help"])
def test_a_reader_that_has_seen_enough_is_no_error(words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "finetune", *words.split()]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Else nothing would be left to write when the process ends.
    pipes["env"] = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == ANSWER


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_any_command(
    number: int, light_station: Station, tmp_path: Path
) -> None:
    from optuna.trial import TrialState, create_trial

    waiting = create_trial(state=TrialState.WAITING)
    made_study(tmp_path / "outputs" / "sweeps" / "s", [waiting])
    process = light_station.start(
        "report", "s", "--watch", cwd=tmp_path, module="sweeps"
    )
    page = tmp_path / "outputs" / "sweeps" / "s" / "report.html"
    wait_until(page.exists, process)
    os.kill(process.pid, number)
    ended = process.wait()

    assert ended.returncode == INTERRUPTED
    assert ended.stderr.splitlines()[-1] == "error: interrupted"


def test_the_page_lists_all_codes() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    codes = [value for name, value in vars(exit_codes).items() if name.isupper()]

    rows = re.findall(r"^\| (\d) \|", page, re.MULTILINE)
    assert [*map(int, rows)] == sorted(codes)
