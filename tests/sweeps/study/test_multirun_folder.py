"""What the jobs of a multirun differ in, and a multirun without a finished job."""

from pathlib import Path

import pytest
from optuna.trial import TrialState
from support.commands import Station
from support.configs import tiny_overrides

from finetune.errors import NoAnswer
from sweeps.study.multirun_folder import (
    describe_values,
    differing_values,
    read_multirun,
)


@pytest.mark.parametrize(
    ("jobs", "descriptions"),
    [
        ([["lora=r4", "seed=1"], ["lora=r8", "seed=1"]], ["lora=r4", "lora=r8"]),
        ([["lora=r4"]], [""]),
        (
            [["a=1", "b=2"], ["a=1", "b=3"], ["a=2", "b=2"]],
            ["a=1 b=2", "a=1 b=3", "a=2 b=2"],
        ),
        (
            [["+lora.extra.x=1"], ["+lora.extra.x=2"]],
            ["lora.extra.x=1", "lora.extra.x=2"],
        ),
        ([["a=1", "b=2"], ["a=1"]], ["b=2", ""]),
        ([["a=1"], ["a=1", "b=2"]], ["", "b=2"]),
        ([["path=x=1"], ["path=x=2"]], ["path=x=1", "path=x=2"]),
    ],
)
def test_jobs_are_described_by_what_differs(
    jobs: list[list[str]], descriptions: list[str]
) -> None:
    values = differing_values(jobs)
    assert [describe_values(job) for job in values] == descriptions


def test_a_multirun_without_a_finished_job_is_shown(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = ("quantization=none", "sample_prompts=[]", "trainer.max_steps=2")
    rate = "optimizer.learning_rate=1e30"
    jobs = ("-m", "seed=1,2", "hydra.sweep.dir=outputs/sweeps/s", rate, *more)
    station.run(*tiny_overrides(tiny_base), *jobs, cwd=tmp_path)
    folder = tmp_path / "outputs" / "sweeps" / "s"

    trials = read_multirun(folder).trials()
    assert [trial.state for trial in trials] == [TrialState.FAIL] * 2
    shown = station.run("show", "s", cwd=tmp_path, module="sweeps")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("diverged") == 2
    # As while they train.
    for number in (0, 1):
        (folder / "trials" / str(number) / "result.json").unlink()
    trials = read_multirun(folder).trials()
    assert [trial.state for trial in trials] == [TrialState.RUNNING] * 2


def test_a_multirun_of_which_no_job_has_begun_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "trials" / "0").mkdir(parents=True)
    with pytest.raises(NoAnswer, match="no job of this multirun has begun"):
        read_multirun(tmp_path)
