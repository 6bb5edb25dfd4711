"""mirror=URL: runs and studies of a machine that is lost go on elsewhere."""

import json
from pathlib import Path

import pytest
from optuna.trial import TrialState
from support.commands import SLOW_STEPS, Forked, Station, wait_until
from support.configs import study_overrides, tiny_overrides
from support.study_folder import folder_of, read, trials_of


def lose(process: Forked, machine: Path) -> None:
    """Kill all processes of a machine, and remove its disk."""
    process.kill()
    machine.rename(machine.with_name("lost"))


def steps_of(run: Path) -> list[int]:
    """The steps of a run's logged training losses."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "train/loss" in line]


@pytest.mark.fault
def test_a_run_goes_on_from_its_last_copied_checkpoint(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    words = [
        *tiny_overrides(tiny_base),
        "name=a",
        "trainer.max_steps=8",
        "trainer.save_steps=1",
        f"mirror={tmp_path / 'copies'}",
    ]
    machine = tmp_path / "first"
    process = station.start(*words, cwd=machine, before=SLOW_STEPS)
    copies = tmp_path / "copies" / "outputs" / "runs" / "a"
    wait_until(lambda: any(copies.glob("*/checkpoints/*/progress.json")), process)
    lose(process, machine)

    other = tmp_path / "second"
    resumed = station.run("resume=a", words[-1], cwd=other)

    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step" in resumed.stderr
    (run,) = (other / "outputs" / "runs" / "a").iterdir()
    assert steps_of(run) == list(range(1, 9))
    copy = copies / run.name
    assert json.loads(read(copy / "result.json"))["status"] == "completed"
    assert (copy / "adapter" / "adapter_model.safetensors").is_file()
    assert not list(copy.glob("checkpoints/*/*"))


@pytest.mark.fault
def test_a_study_goes_on_with_the_trials_that_it_had(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    words = [
        *study_overrides(tiny_base, "s"),
        "hydra.sweeper.n_trials=3",
        "trainer.max_steps=6",
        "trainer.save_steps=1",
        f"mirror={copies}",
    ]
    machine = tmp_path / "first"
    process = station.start(*words, cwd=machine, before=SLOW_STEPS)
    trials = copies / "outputs" / "sweeps" / "s" / "trials"
    wait_until(lambda: any(trials.glob("1/checkpoints/*/progress.json")), process)
    lose(process, machine)
    first = read(trials / "0" / "metrics.jsonl")

    other = tmp_path / "second"
    ended = station.run(*words, cwd=other)

    assert ended.returncode == 0, ended.stderr
    assert len(trials_of(other, TrialState.COMPLETE)) == 3
    assert "files fetched from the mirror" in ended.stderr
    # Only the test rows are evaluated again, at the study's end.
    again = read(folder_of(other) / "trials" / "0" / "metrics.jsonl")
    assert again.startswith(first)
    assert steps_of(folder_of(other) / "trials" / "0") == list(range(1, 7))
    assert "resuming after step" in read(
        folder_of(other) / "trials" / "1" / "train.log"
    )
    assert steps_of(folder_of(other) / "trials" / "1") == list(range(1, 7))
    copied = copies / "outputs" / "sweeps" / "s"
    assert (copied / "answer.json").is_file()
    assert (copied / "best" / "adapter" / "adapter_model.safetensors").is_file()


def test_resume_names_the_mirror_that_has_no_such_run(
    station: Station, tmp_path: Path
) -> None:
    done = station.run("resume=b", f"mirror={tmp_path / 'copies'}", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: resume=b: no such run")
