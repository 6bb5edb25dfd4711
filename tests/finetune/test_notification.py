"""`notify.command`: what it is told of a run, and that nothing it does ends one."""

import logging
import signal
import time
from pathlib import Path

import pytest
from support.bad_input import Workplace
from support.commands import SLOW_STEPS, Station, wait_until
from support.configs import compose, tiny_overrides
from support.notifications import TELLS, told
from support.processes import children_with

from finetune.config.sections.notify import NotifySettings
from finetune.errors import ConfigError
from finetune.exit_codes import INTERRUPTED, NO_ANSWER
from finetune.notification import notify
from finetune.tracking.text_privacy import tracked_config

COMMAND = f"notify.command=[sh,-c,'{TELLS}']"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            ["sh", "-c", "exit 7"],
            "notify.command=sh -c 'exit 7': ended with exit code 7",
        ),
        (["./none"], "notify.command=./none: No such file or directory"),
        (["/"], "notify.command=/: Permission denied"),
        (["a\0b"], "embedded null byte"),
        (["sh", "-c", "kill -9 $$"], "killed by SIGKILL"),
        (["sh", "-c", "sleep 60 & sleep 61"], "not ended after 0.5 s (notify.timeout)"),
    ],
    ids=["fails", "missing", "a folder", "no name", "killed", "hangs"],
)
def test_a_command_that_fails_is_one_warning(
    command: list[str], line: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    timeout = 0.5 if "sleep" in command[-1] else 60
    settings = NotifySettings(command=command, timeout=timeout)
    with caplog.at_level(logging.INFO):
        notify(settings, "completed", "s", tmp_path / "answer.json", "done")

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert line in record.message
    assert record.message.endswith("(event completed)")
    assert not children_with("sleep", recursive=True)


def test_output_goes_to_the_log_and_a_process_left_behind_is_not_waited_for(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    settings = NotifySettings(command=["sh", "-c", "sleep 5 & echo sent; echo x >&2"])
    began = time.monotonic()
    with caplog.at_level(logging.INFO):
        notify(settings, "failed", "s", tmp_path / "answer.json", "of\nlines")

    assert time.monotonic() - began < 4
    lines = [record.message for record in caplog.records]
    assert lines == ["notify.command: sent", "notify.command: x"]


def test_a_run_tells_of_its_end_once_it_has_begun(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    config = (*tiny_overrides(tiny_base), "quantization=none", "sample_prompts=[]")
    run = (*config, "name=mine", COMMAND, "trainer.max_steps=40", "hydra.run.dir=run")
    result = str(tmp_path / "run" / "result.json")
    refused = station.run(*run, "dataset.path=nowhere.jsonl", cwd=tmp_path)
    assert refused.returncode == 1
    assert told(tmp_path) == []

    process = station.start(*run, cwd=tmp_path, before=SLOW_STEPS)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and "grad_norm" in metrics.read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait().returncode == INTERRUPTED
    ((event, name, message, answer),) = told(tmp_path)
    assert (event, name, answer) == ("interrupted", "mine", result)
    assert message.startswith("run mine interrupted: interrupted after step ")

    ended = station.run("resume=run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    event, _, message, _ = told(tmp_path)[1]
    assert event == "completed"
    assert message.startswith("run mine completed: eval/loss ")
    assert len(told(tmp_path)) == 2

    # Another command makes it no other run.
    same = [word for word in run if word != COMMAND]
    again = station.run(*same, "notify.command=[./other]", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "completed already" in again.stderr


@pytest.mark.slow
def test_each_job_of_a_multirun_tells(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    config = (*tiny_overrides(tiny_base), "quantization=none", "sample_prompts=[]")
    rates = "optimizer.learning_rate=1e-3,1e30"
    jobs = ("-m", rates, "hydra.sweep.dir=jobs", "trainer.max_steps=12")
    ended = station.run(*config, *jobs, COMMAND, cwd=tmp_path)

    assert ended.returncode == NO_ANSWER, ended.stderr
    answers = {event: Path(answer) for event, _, _, answer in told(tmp_path)}
    trials = tmp_path / "jobs" / "trials"
    assert answers == {
        "completed": trials / "0" / "result.json",
        "failed": trials / "1" / "result.json",
    }


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("notify.command=[' ']", "must be a program and its arguments"),
        ("notify.command=./tell.sh", "must be a list"),
        ("notify.timeout=0", "must be above 0 seconds"),
        ("notify.stalled_minutes=0", "must be above 0 minutes, or null"),
    ],
)
def test_a_setting_is_refused(override: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]}=.*{line}"):
        compose(override)


def test_a_variable_of_the_environment_would_be_written_to_files(
    workplace: Workplace,
) -> None:
    workplace.write({"experiment/mine.yaml": "notify: {command: ['${oc.env:WORD}']}"})
    head = (workplace.cwd / "experiment/mine.yaml").read_text()
    workplace.write({"experiment/mine.yaml": f"# @package _global_\n{head}\n"})
    for words in (
        ["notify.command=[tell,'${oc.env:WORD}']"],
        ["--config-dir", ".", "experiment=mine"],
    ):
        outcome = workplace.call(*words, WORD="sesame")
        assert outcome.error.startswith("notify.command: a credential in a config")
        assert "sesame" not in outcome.stderr
    assert workplace.files() == {"experiment", "experiment/mine.yaml"}


@pytest.mark.parametrize(
    "words",
    [
        ["curl", "-H", "Authorization: Bearer SESAME"],
        ["curl", "https://me:SESAME@example.com"],
        ["curl", "https://hooks.slack.com/services/SESAME"],
        ["curl", "--api-key", "SESAME"],
        ["sh", "-c", "TOKEN=SESAME tell"],
    ],
)
def test_a_credential_is_refused_and_not_shown(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^notify\.command: a cred") as refused:
        NotifySettings(command=words)
    assert "SESAME" not in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        [
            "sh",
            "-c",
            'curl -H "Authorization: Bearer $TOKEN" -d "$FINETUNE_EVENT" $URL',
        ],
        ["./tell.sh", "--token-file", "secret.txt"],
        ["curl", "-d", "done", "https://ntfy.sh/tokens"],
        ["mail", "-s", "the secret of bearers", "me@example.com"],
        ["tool", "--token", "$TOKEN"],
    ],
)
def test_words_without_a_credential_are_taken(words: list[str]) -> None:
    assert NotifySettings(command=words).command == words


def test_trackers_do_not_show_the_command() -> None:
    assert "notify" not in tracked_config(compose("notify.command=[./tell.sh]"))
