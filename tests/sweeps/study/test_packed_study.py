"""A study whose trials train together in slots: trials, logs, W&B runs, repetition."""

import json
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from support.commands import Station
from support.configs import study_overrides
from support.runs import SHORT, Tiny, final, losses
from support.study_folder import folder_of
from support.wandb_log import wandb_files, wandb_history

from finetune.run.context import RunContext
from finetune.run.run import run
from sweeps.study.study import FINISHED, Study

TRIALS = 5


@pytest.fixture(scope="module")
def packed_study(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a study whose trials have trained in three slots."""
    place = tmp_path_factory.mktemp("packed")
    return run_study(station, tiny_base, place, "tracker=wandb")


def run_study(station: Station, tiny_base: Path, place: Path, *more: str) -> Path:
    study = (
        f"hydra.sweeper.n_trials={TRIALS}",
        "hydra.sweeper.slots=3",
        "trainer.max_steps=6",
    )
    ended = station.run(*study_overrides(tiny_base, "s"), *study, *more, cwd=place)
    assert ended.returncode == 0, ended.stderr
    return place / "outputs" / "sweeps" / "s"


def logged(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return rows


def test_a_packed_study_holds_its_trials_and_each_says_who_was_beside(
    packed_study: Path,
) -> None:
    trials = Study.load(packed_study).trials()
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert trials[0].state == TrialState.COMPLETE
    results = [final(packed_study / "trials" / str(number)) for number in range(TRIALS)]
    assert {(result["engine"], result["slots"]) for result in results} == {
        ("packed", 3)
    }
    beside = {
        (number, int(other))
        for number, result in enumerate(results)
        for other in result["companions"]
        if other.isdigit()
    }
    assert {(0, 1), (0, 2), (1, 2)} <= beside
    assert all((other, number) in beside for number, other in beside)
    assert all(any(number == own for own, _ in beside) for number in range(TRIALS))


def test_each_trials_log_holds_its_own_lines_alone(packed_study: Path) -> None:
    for trial in Study.load(packed_study).trials():
        folder = packed_study / "trials" / str(trial.number)
        lines = (folder / "train.log").read_text().splitlines()
        steps = [
            line.split(" - ", 1)[1].split()[1].split("/")[0]
            for line in lines
            if " - step " in line
        ]
        shown = [
            str(row["step"])
            for row in logged(folder)
            if "train/loss" in row or "eval/loss" in row
        ]
        assert steps == shown
        others = [
            f"trial {number}" for number in range(TRIALS) if number != trial.number
        ]
        assert not [line for line in lines for other in others if other in line]


def test_a_trial_ends_between_rungs_when_better_ones_come_to_its_last(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    # Beside the baseline's 1e-3: the second ends at its first rung, and the third takes its place.
    points = ",".join(
        f"{{optimizer.learning_rate: {rate}}}" for rate in (2e-3, 1e-6, 1e-2)
    )
    rungs = (
        "optimizer.warmup_ratio=0",
        "trainer.max_steps=40",
        "trainer.eval_steps=[5]",
    )
    more = (
        "optimizer.learning_rate=tag(log,interval(1e-6,1e-1))",
        f"hydra.sweeper.start=[{points}]",
        # The best third alone continues: of four trials one.
        "hydra.sweeper.pruner.min_survivors=1",
    )
    study = run_study(
        station, tiny_base, tmp_path, *rungs, *more, "hydra.sweeper.n_trials=4"
    )
    first, second, third = Study.load(study).trials()[1:]
    assert (second.state, second.user_attrs["step"]) == (TrialState.PRUNED, 5)
    assert third.state == TrialState.COMPLETE
    assert first.state == TrialState.PRUNED
    assert 10 <= first.user_attrs["step"] < 20
    assert (
        first.user_attrs["reason"]
        == "worse than others at its last rung, as more came to it"
    )


SAVES_WRITTEN_DOWN = """
from pathlib import Path
import finetune.run.train as train
save = train.save_adapter
def saving(model, tokenizer, folder, *more):
    with open("saved.txt", "a") as file:
        print(Path(folder).parent.name, file=file)
    return save(model, tokenizer, folder, *more)
train.save_adapter = saving
"""


def test_a_pruned_trials_adapter_is_never_written(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """Only those of complete trials are needed, and it takes a tenth of a second on a GPU."""
    more = (
        "hydra.sweeper.n_trials=3",
        "hydra/sweeper/pruner=none",
        "hydra.sweeper.pruner._target_=optuna.pruners.ThresholdPruner",
        "+hydra.sweeper.pruner.upper=0",
    )
    study = [*study_overrides(tiny_base, "s"), *more]
    ended = station.run(*study, cwd=tmp_path, before=SAVES_WRITTEN_DOWN)
    assert ended.returncode == 0, ended.stderr
    trials = Study.load(folder_of(tmp_path)).trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    # The baseline, which is never pruned.
    assert (tmp_path / "saved.txt").read_text().split() == ["0"]


def test_each_slot_has_its_own_wandb_run_with_trls_names(
    packed_study: Path, tiny: Tiny, tmp_path: Path
) -> None:
    run(
        tiny(*SHORT, "trainer.engine=trl", "tracker=wandb"),
        tmp_path,
        RunContext(interactive=False),
    )
    wanted = history_names(*wandb_files(tmp_path))
    uid = Study.load(packed_study).uid
    for number in range(TRIALS):
        folder = packed_study / "trials" / str(number)
        (records,) = wandb_files(packed_study, f"{uid}-{number}")
        names = history_names(records)
        assert names <= wanted
        assert names == wanted or final(folder)["status"] == "pruned"
        for name in ("train/loss", "eval/loss"):
            shown = [row[name] for row in wandb_history(records) if name in row]
            assert shown == [row[name] for row in logged(folder) if name in row]


def history_names(records: list[Any]) -> set[str]:
    rows = wandb_history(records)
    return {name for row in rows for name in row if not name.startswith("test/")}


def test_the_winner_of_a_pack_trained_again_alone_is_the_same_to_rounding(
    packed_study: Path, station: Station, tmp_path: Path
) -> None:
    more = ("experiment=best", "hydra.run.dir=again", "tracker=none")
    again = station.run("--config-dir", str(packed_study), *more, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "again") == pytest.approx(
        losses(packed_study / "best"), rel=1e-5
    )
    there, here = (
        final(folder)["metrics"]
        for folder in (packed_study / "best", tmp_path / "again")
    )
    assert here["eval/loss"] == pytest.approx(there["eval/loss"], rel=1e-5)
    assert here["test/loss"] == pytest.approx(there["test/loss"], rel=1e-5)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_packed_study(
    packed_study: Path, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    again = run_study(station, tiny_base, tmp_path)

    def told(folder: Path) -> list[Any]:
        trials = Study.load(folder).trials(*FINISHED)
        return [
            (
                trial.number,
                trial.state,
                trial.params,
                trial.values,
                trial.intermediate_values,
            )
            for trial in trials
        ]

    assert told(again) == told(packed_study)
    for number in range(TRIALS):
        one, other = (
            folder / "trials" / str(number) for folder in (again, packed_study)
        )
        assert losses(one) == losses(other)
        assert final(one)["companions"] == final(other)["companions"]
