"""A study, end to end, by one worker: what it holds, leaves and says, that it repeats, and that it
goes on."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState
from support.commands import Station
from support.configs import study_overrides
from support.documents import described_keys
from support.study_folder import told
from support.wandb_log import wandb_files, wandb_history, wandb_items, wandb_summary

from finetune.engine.schedule import evaluation_rungs
from finetune.errors import ConfigError
from finetune.exit_codes import NO_ANSWER
from finetune.files.mirror import NO_MIRROR
from sweeps.space.feasibility import is_feasible, violated
from sweeps.study.adapters import remove_adapters
from sweeps.study.find_study import find_study
from sweeps.study.formatting import trials_table
from sweeps.study.study import FINISHED, Study

TRIALS = 6


@dataclass(frozen=True)
class Done:
    """A study that has been run, and what it said."""

    folder: Path
    said: str

    @property
    def trials(self) -> list[FrozenTrial]:
        return Study.load(self.folder).trials()

    def result(self, number: int) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(
            (self.folder / "trials" / str(number) / "result.json").read_text()
        )
        return content


@pytest.fixture(scope="module")
def done(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Done:
    """In a folder whose name has a space."""
    place = tmp_path_factory.mktemp("my studies") / "with space"
    more = (
        "tracker=wandb",
        "hydra.sweeper.keep_adapters=2",
        f"hydra.sweeper.n_trials={TRIALS}",
    )
    ended = station.run(*study_overrides(tiny_base, "s1"), *more, cwd=place)
    assert ended.returncode == 0, ended.stderr
    return Done(place / "outputs" / "sweeps" / "s1", ended.stderr)


@pytest.fixture
def copied(done: Done, tmp_path: Path) -> Path:
    """A copy of the study, to be acted on."""
    folder = tmp_path / "outputs" / "sweeps" / "s1"
    shutil.copytree(done.folder, folder)
    return folder


def go_on(station: Station, tiny_base: Path, cwd: Path, *more: str) -> Any:
    common = (
        "tracker=wandb",
        "hydra.sweeper.keep_adapters=2",
        f"hydra.sweeper.n_trials={TRIALS}",
    )
    return station.run(*study_overrides(tiny_base, "s1"), *common, *more, cwd=cwd)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Metrics without what depends on the clock."""
    return {
        name: value
        for name, value in values.items()
        if name not in ("train/seconds", "train/tokens_per_second")
    }


def trials_in(folder: Path) -> list[tuple[Any, ...]]:
    return [told(trial) for trial in Study.load(folder).trials()]


def test_holds_exactly_its_trials_the_first_being_the_baseline(done: Done) -> None:
    assert [trial.number for trial in done.trials] == list(range(TRIALS))
    assert all(
        trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in done.trials
    )
    baseline = done.trials[0]
    assert baseline.user_attrs["role"] == "baseline"
    assert baseline.state == TrialState.COMPLETE
    assert baseline.params == {
        "lora.r": 16,
        "lora.alpha": 16,
        "lora.dropout": 0.0,
        "optimizer.learning_rate": 1e-3,
    }
    assert sorted(map(int, os.listdir(done.folder / "trials"))) == list(range(TRIALS))


def test_each_trials_folder_says_what_the_storage_says(done: Done) -> None:
    for trial in done.trials:
        folder = done.folder / "trials" / str(trial.number)
        overrides = dict(
            line.split("=", 1)
            for line in yaml.safe_load(
                (folder / ".hydra" / "overrides.yaml").read_text()
            )
        )
        config = json.loads((folder / "run.json").read_text())["config"]
        result = done.result(trial.number)
        for name, value in trial.params.items():
            section, key = name.split(".")
            assert float(overrides[name]) == value
            assert config[section][key] == value
        if trial.state == TrialState.COMPLETE:
            assert result["status"] == "completed"
            assert result["objective"] == {"name": "eval/loss", "value": trial.value}
        else:
            assert result["status"] == "pruned"
            assert result["step"] == trial.user_attrs["step"]
        rungs = [
            row
            for row in map(
                json.loads, (folder / "metrics.jsonl").read_text().splitlines()
            )
            if "objective" in row
        ]
        indices = evaluation_rungs(config["trainer"]["eval_steps"], 3)
        assert {
            indices[row["step"]]: row["objective"] for row in rungs if row["step"]
        } == trial.intermediate_values


def test_keeps_the_adapters_of_the_best_and_of_the_baseline(done: Done) -> None:
    complete = sorted(
        (trial for trial in done.trials if trial.state == TrialState.COMPLETE),
        key=lambda trial: trial.value or 0,
    )
    assert len(complete) > 2, "the study says nothing here"
    kept = {int(path.parent.name) for path in done.folder.glob("trials/*/adapter")}
    assert kept == {0, complete[0].number, complete[1].number}
    assert {
        int(path.parent.name) for path in done.folder.glob("trials/*/checkpoints")
    } <= kept
    assert all(
        (folder / "metrics.jsonl").exists() for folder in done.folder.glob("trials/*")
    )


def test_says_the_winner_beside_the_baseline_and_how_to_use_it(done: Done) -> None:
    best = min(
        (trial for trial in done.trials if trial.values),
        key=lambda trial: trial.value or 0,
    )
    last = done.said[done.said.rindex("study s1: ") :]
    assert f"trial {best.number} " in last.splitlines()[1]
    assert "baseline" in last
    assert "python -m finetune --config-dir outputs/sweeps/s1 experiment=best" in last
    assert "wandb sync outputs/sweeps/s1/wandb\n" in last
    answer = json.loads((done.folder / "answer.json").read_text())
    assert answer["trial"] == best.number
    assert answer["test"]["winner"] == done.result(best.number)["metrics"]["test/loss"]
    assert answer["test"]["baseline"] == done.result(0)["metrics"]["test/loss"]
    winner, baseline = answer["test"]["winner"], answer["test"]["baseline"]
    assert answer["test"]["difference"] == pytest.approx(winner - baseline)
    assert answer["test"]["verdict"] == "too few rows to say"
    assert "too few rows to compare this adapter with the baseline's: " in last
    assert "whether this config is better needs further seeds" in last
    tested = {
        number
        for number in range(TRIALS)
        if "test/loss" in done.result(number)["metrics"]
    }
    assert tested == {0, best.number}, "test rows were seen by other trials"


def test_the_winner_is_a_run_folder_and_its_experiment_reproduces_it(
    done: Done, station: Station, tmp_path: Path
) -> None:
    again = station.run(
        "--config-dir",
        str(done.folder),
        "experiment=best",
        "hydra.run.dir=again",
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr

    best = done.folder / "best"
    winner = json.loads((best / "result.json").read_text())
    repeated = json.loads((tmp_path / "again" / "result.json").read_text())
    assert plain(repeated["metrics"]) == plain(winner["metrics"])
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (best / weights).read_bytes()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_trials(
    done: Done, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (f"hydra.sweeper.n_trials={TRIALS}",)
    ended = station.run(*study_overrides(tiny_base, "s2"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr

    again = Done(tmp_path / "outputs" / "sweeps" / "s2", ended.stderr)
    assert [told(trial) for trial in again.trials] == [
        told(trial) for trial in done.trials
    ]
    for number in range(TRIALS):
        assert plain(again.result(number)["metrics"]) == plain(
            done.result(number)["metrics"]
        )


@dataclass(frozen=True)
class Shown:
    """What one W&B file shows."""

    run: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    exit_code: int


def shown(study: Path, run_id: str) -> Shown:
    """What a trial's one W&B file shows."""
    (records,) = wandb_files(study, run_id)
    run = [record.run for record in records if record.HasField("run")][-1]
    (exit_code,) = [
        record.exit.exit_code for record in records if record.HasField("exit")
    ]
    return Shown(
        run,
        wandb_items(run.config.update),
        wandb_history(records),
        wandb_summary(records),
        exit_code,
    )


def test_wandb_has_one_run_for_each_trial_and_one_tagged_best(done: Done) -> None:
    uid = Study.load(done.folder).uid
    tagged = []
    for trial in done.trials:
        folder = done.folder / "trials" / str(trial.number)
        first = shown(done.folder, f"{uid}-{trial.number}")
        assert first.run.run_group == "s1"
        assert first.run.job_type == "trial"
        name = f"t{trial.number:02d} r={trial.params['lora.r']} alpha="
        assert first.run.display_name.startswith(name)
        assert first.config["lora"]["r"] == trial.params["lora.r"]
        assert (
            first.config["optimizer"]["learning_rate"]
            == trial.params["optimizer.learning_rate"]
        )
        assert not any("." in key for key in first.config)
        logged = [
            json.loads(line)
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("train/loss", "eval/loss", "objective"):
            ours = [(row["step"], row[name]) for row in logged if name in row]
            assert [
                (row["_step"], row[name]) for row in first.history if name in row
            ] == ours
        assert first.summary["status"] == done.result(trial.number)["status"]
        assert first.exit_code == 0
        if trial.state == TrialState.PRUNED:
            assert first.summary["pruned_at"] == trial.user_attrs["step"]
        else:
            assert "pruned_at" not in first.summary
        assert isinstance(first.summary["eval/loss"], float)
        if "best" in first.run.tags:
            tagged.append(trial.number)
    assert tagged == [json.loads((done.folder / "answer.json").read_text())["trial"]]


def test_a_full_study_says_how_to_go_on(
    copied: Path, done: Done, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    ended = go_on(station, tiny_base, tmp_path, "hydra.sweeper.slots=3")
    assert ended.returncode == 0, ended.stderr
    assert (
        "hydra.sweeper.slots=3: 1 instead, as the study keeps those that it began with"
        in ended.stderr
    )
    assert (
        "study s1 is full (6 trials): hydra.sweeper.n_trials=12 goes on" in ended.stderr
    )
    assert trials_in(copied) == trials_in(done.folder)


@pytest.mark.slow
def test_a_grid_that_is_tried_does_not_say_that_more_trials_go_on(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    grid = ("hydra/sweeper/sampler=grid", "~search", "lora.r=choice(4,16)")
    for _ in range(2):
        ended = station.run(*study_overrides(tiny_base, "s"), *grid, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
    assert (
        "study s is full (2 trials): every point of the grid is tried" in ended.stderr
    )
    assert "n_trials" not in ended.stderr


def test_a_space_of_three_points_is_a_study_of_three_trials(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    space = ("~search", "lora.r=choice(4,8,16)", "hydra.sweeper.n_trials=5")
    ended = station.run(*study_overrides(tiny_base, "s"), *space, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "the space has no more than 3 points, each trained once" in ended.stderr
    trials = Study.load(tmp_path / "outputs" / "sweeps" / "s").trials()
    assert sorted(trial.params["lora.r"] for trial in trials) == [4, 8, 16]

    again = station.run(*study_overrides(tiny_base, "s"), *space, cwd=tmp_path)
    assert "every point of the space is tried" in again.stderr


def test_goes_on_to_more_trials_after_half_a_line(
    copied: Path, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    journal = copied / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines) + lines[-1][: len(lines[-1]) // 2])
    before = [told(trial) for trial in Study.load(copied).trials()]
    results = {
        path: path.stat().st_mtime_ns for path in copied.glob("trials/*/result.json")
    }
    ended = go_on(station, tiny_base, tmp_path, f"hydra.sweeper.n_trials={TRIALS + 1}")
    assert ended.returncode == 0, ended.stderr

    trials = Study.load(copied).trials(*FINISHED)
    assert len(trials) == TRIALS + 1
    assert [told(trial) for trial in trials[:TRIALS]] == before
    assert [json.loads(line) for line in journal.read_bytes().splitlines()]
    winner = json.loads((copied / "answer.json").read_text())["trial"]
    spoken = (
        copied / "trials" / "0" / "result.json",
        copied / "trials" / str(winner) / "result.json",
    )
    assert all(
        path.stat().st_mtime_ns == then
        for path, then in results.items()
        if path not in spoken
    )


def test_a_trial_that_ends_while_others_are_tidied_keeps_its_adapter(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = TRIALS - 1
    untell(copied, last)
    study, worker = Study.load(copied), Study.load(copied)
    weights = study.folder_of(last).adapter
    weights.mkdir(exist_ok=True)
    ranked = study.ranked

    def ends_meanwhile() -> list[FrozenTrial]:
        found = ranked()
        worker.optuna.tell(last, 0.0)
        return found

    monkeypatch.setattr(study, "ranked", ends_meanwhile)
    remove_adapters(study, 1, NO_MIRROR)
    assert study.optuna.best_trial.number == last
    assert weights.exists()


def test_adapters_are_removed_once_however_often_others_end(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.load(copied)
    removed: list[str] = []
    monkeypatch.setattr(
        "shutil.rmtree", lambda path, ignore_errors: removed.append(str(path))
    )
    remove_adapters(study, 1, NO_MIRROR)
    assert removed
    removed.clear()
    remove_adapters(study, 1, NO_MIRROR)
    assert removed == []


def untell(folder: Path, number: int) -> None:
    """Take back that the last trial was told: its worker died just before."""
    journal = folder / "study.journal"
    kept = []
    for line in journal.read_text().splitlines(keepends=True):
        entry = json.loads(line)
        if (
            entry["op_code"] == 6
            and entry["trial_id"] == number
            and entry["state"] != TrialState.RUNNING
        ):
            break
        kept.append(line)
    journal.write_text("".join(kept))
    assert Study.load(folder).trials()[number].state == TrialState.RUNNING


def test_a_result_that_was_not_told_is_told_and_not_run_again(
    copied: Path, done: Done, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    last = TRIALS - 1
    untell(copied, last)
    folder = copied / "trials" / str(last)
    before = (folder / "metrics.jsonl").read_bytes()
    ended = go_on(station, tiny_base, tmp_path)
    assert ended.returncode == 0, ended.stderr

    assert trials_in(copied) == trials_in(done.folder)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert f"trial {last}: lora.r=" not in ended.stderr, "it was run again"


def test_another_storage_does_not_take_a_studys_folders_for_its_own(
    copied: Path, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    ended = go_on(
        station, tiny_base, tmp_path, "hydra.sweeper.storage=sqlite:///other.db"
    )
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    place = (
        f"another study's trials are in {copied}, and this storage has no such study"
    )
    assert line == f"error: hydra.sweeper.study_name=s1: {place}; give another name"


@pytest.mark.parametrize(
    ("override", "key", "began"),
    [
        ("optimizer.weight_decay=0.1", "optimizer.weight_decay=0.1", "0.0"),
        ("objective=train/loss", 'objective="train/loss"', '"eval/loss"'),
        ("lora.r=choice(4,16)", "lora.r=", '"choices": [4, 8, 16, 32, 64]'),
        ("lora.dropout=0.05", "lora.dropout=0.05", "FloatDistribution"),
    ],
)
def test_a_change_is_refused_with_both_values(
    override: str,
    key: str,
    began: str,
    copied: Path,
    done: Done,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    ended = go_on(
        station, tiny_base, tmp_path, override, f"hydra.sweeper.n_trials={TRIALS + 1}"
    )
    assert ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {key}")
    assert began in line
    assert "hydra.sweeper.allow_change=true" in line
    assert trials_in(copied) == trials_in(done.folder)


@pytest.mark.slow
def test_a_change_is_taken_when_told_to(
    copied: Path, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "hydra.sweeper.allow_change=true",
        f"hydra.sweeper.n_trials={TRIALS + 1}",
        "optimizer.weight_decay=0.1",
    )
    ended = go_on(station, tiny_base, tmp_path, *more)
    assert ended.returncode == 0, ended.stderr
    identity = json.loads((copied / "trials" / str(TRIALS) / "run.json").read_text())
    assert identity["config"]["optimizer"]["weight_decay"] == 0.1
    assert len(Study.load(copied).finished()) == TRIALS + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["lora.alpha=choice(1,2,16)", "hydra.sweeper.direction=maximize"]
)
def test_what_no_study_can_take_is_refused_even_when_told_to(
    change: str,
    copied: Path,
    done: Done,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    more = (
        "hydra.sweeper.allow_change=true",
        f"hydra.sweeper.n_trials={TRIALS + 1}",
        change,
    )
    ended = go_on(station, tiny_base, tmp_path, *more)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(
        f"error: {change.partition('=')[0]}="
    )
    assert trials_in(copied) == trials_in(done.folder)


@pytest.mark.slow
def test_several_objectives_have_a_front_and_constraints(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    both = (
        "objective=[eval/loss,adapter/parameters]",
        "hydra.sweeper.direction=[minimize,minimize]",
        "hydra.sweeper.constraints=['adapter/parameters <= 2e4']",
        "hydra/sweeper/pruner=none",
        "~search",
        "lora.r=choice(2,4,8,16)",
    )
    ended = station.run(
        *study_overrides(tiny_base, "s"),
        "hydra.sweeper.n_trials=4",
        *both,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert "(on the Pareto front)" in ended.stderr
    study = Study.load(tmp_path / "outputs" / "sweeps" / "s")
    assert [trial.state for trial in study.finished()] == [TrialState.COMPLETE] * 4
    for trial in study.finished():
        result = json.loads(study.folder_of(trial.number).result.read_text())
        assert trial.values == [objective["value"] for objective in result["objective"]]
        # 16 of the baseline, and perhaps of others, has too many weights.
        assert is_feasible(trial) == (trial.values[1] <= 2e4)
    baseline = study.baseline()
    assert baseline is not None
    assert violated(baseline) == ["adapter/parameters <= 2e4"]
    assert baseline not in study.ranked()
    assert baseline not in study.optuna.best_trials
    assert "infeasible     trials 0" in ended.stderr
    assert "infeasible: adapter/parameters <= 2e4" in trials_table(study)

    # Where none is feasible, there is no winner.
    none = station.run(
        *study_overrides(tiny_base, "none"),
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.constraints=['train_tokens <= 1']",
        "hydra/sweeper/pruner=none",
        cwd=tmp_path,
    )
    assert none.returncode == NO_ANSWER, none.stderr
    says = "no trial is both complete and feasible: train_tokens <= 1 (violated by 2)"
    assert f"study none: {says}, so there is no winner" in none.stderr
    assert not (tmp_path / "outputs" / "sweeps" / "none" / "best").exists()


def command(monkeypatch: pytest.MonkeyPatch, cwd: Path, *arguments: str) -> None:
    """`python -m sweeps …` in this process."""
    from sweeps.__main__ import main

    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["sweeps", *arguments])
    main()


def test_list_and_show(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = done.folder.parents[2]
    command(monkeypatch, place, "list")
    best = min(trial.value for trial in done.trials if trial.value is not None)
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["study", "begun", "trials", "objective", "best"]
    assert line.split()[0] == "s1"
    assert line.split()[-3:] == [
        f"{TRIALS}/{TRIALS}",
        "eval/loss",
        f"{best:.4f}",
    ]

    for name in ("s1", "outputs/sweeps/s1", str(done.folder)):
        command(monkeypatch, place, "show", name)
        rows = capsys.readouterr().out.splitlines()[1:]
        assert [row.split()[:2] for row in rows] == [
            [str(trial.number), trial.state.name.lower()] for trial in done.trials
        ]


def test_one_trial_is_shown_in_full(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, done.folder.parents[2], "show", "s1", "0")
    lines = capsys.readouterr().out.splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines)
    result = done.result(0)
    assert lines[0].split() == ["trial", "0"]
    assert (shown["state"], shown["note"]) == ("complete", "baseline")
    assert (shown["lora.r"], shown["optimizer.learning_rate"]) == ("16", "0.001")
    assert float(shown["eval/loss"]) == pytest.approx(
        result["metrics"]["eval/loss"], rel=1e-2
    )
    assert shown["step"] == str(result["step"])
    assert shown["folder"] == "trials/0"


def test_two_trials_differ_in_their_parameters_and_results(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, done.folder.parents[2], "diff", "s1", "1", "0")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["trial", "1", "0"]
    shown = {line.split()[0]: line.split()[1:] for line in lines}
    configs = [
        json.loads((done.folder / "trials" / number / "run.json").read_text())["config"]
        for number in "10"
    ]
    differing = set()
    for section, values in configs[0].items():
        if not isinstance(values, dict):
            continue
        differing |= {
            f"{section}.{key}"
            for key, value in values.items()
            if value != configs[1][section][key]
        }
    assert {name for name in shown if "." in name} == differing
    assert float(shown["eval/loss"][1]) == pytest.approx(
        done.result(0)["metrics"]["eval/loss"], rel=1e-2
    )
    assert "seed" not in shown


def test_json_has_what_the_tables_show(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = done.folder.parents[2]

    def printed(*arguments: str) -> Any:
        command(monkeypatch, place, *arguments, "--json")
        return json.loads(capsys.readouterr().out)

    (listed,) = printed("list")["studies"]
    shown = printed("show", "s1")
    one = printed("show", "s1", "0")
    differing = printed("diff", "s1", "1", "0")

    ranked = Study.load(done.folder).ranked()
    assert listed["study"] == "s1"
    assert (listed["finished"], listed["trials"]) == (TRIALS, TRIALS)
    assert listed["best"]["trial"] == ranked[0].number
    assert listed["best"]["objectives"] == {"eval/loss": ranked[0].value}
    trials = shown.pop("trials")
    assert shown == {name: listed[name] for name in shown}
    for trial, value in zip(done.trials, trials, strict=True):
        assert value["trial"] == trial.number
        assert value["state"] == trial.state.name.lower()
        assert value["params"].keys() == trial.params.keys()
    assert one == {**trials[0], "study": "s1", "result": done.result(0)}
    assert (place / one["folder"] / "result.json").exists()
    losses = [done.result(number)["metrics"]["eval/loss"] for number in (1, 0)]
    assert differing["trials"] == [1, 0]
    assert differing["differences"]["eval/loss"] == losses
    assert listed.keys() == described_keys("STUDY")
    assert trials[0].keys() == described_keys("TRIAL")
    assert differing.keys() == {"study", "trials", "differences"}


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("best", "s1"), {"study", "folder", "answer"}),
        (("report", "s1"), {"study", "report"}),
        (("clone", "s1", "0", "lora.r=8"), {"study", "trial", "params"}),
        (("work", "s1"), {"study", "folder", "finished"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_commands_that_act_print_json_alone(
    arguments: tuple[str, ...],
    keys: set[str],
    copied: Path,
    station: Station,
    tmp_path: Path,
) -> None:
    ended = station.run(*arguments, "--json", cwd=tmp_path, module="sweeps")
    assert ended.returncode == 0, ended.stderr
    content = json.loads(ended.stdout)
    assert content.keys() == keys
    if "folder" in keys:
        assert (tmp_path / content["folder"]).samefile(copied)
    if "answer" in keys:
        assert content["answer"] == json.loads((copied / "answer.json").read_text())


def test_a_report_that_is_watched_has_no_json(
    done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        command(
            monkeypatch, done.folder.parents[2], "report", "s1", "--watch", "--json"
        )


def test_help_names_the_command_that_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = ("list", "show", "diff", "best", "stop", "report", "confirm")
    for words in ((), *((name,) for name in commands)):
        with pytest.raises(SystemExit) as ended:
            command(monkeypatch, tmp_path, *words, "--help")
        assert ended.value.code == 0
        text = capsys.readouterr().out
        typed = " ".join(("python -m sweeps", *words))
        assert text.startswith(f"usage: {typed} [-h]")
        assert typed in text.partition("example")[2]


@pytest.mark.slow
def test_best_takes_the_winner_anew(
    copied: Path, station: Station, tmp_path: Path
) -> None:
    adapter = (copied / "best" / "adapter" / "adapter_model.safetensors").read_bytes()
    experiment = (copied / "experiment" / "best.yaml").read_text()
    shutil.rmtree(copied / "best")
    shutil.rmtree(copied / "experiment")
    (copied / "answer.json").unlink()
    ended = station.run("best", "s1", cwd=tmp_path, module="sweeps")
    assert ended.returncode == 0, ended.stderr
    assert (
        copied / "best" / "adapter" / "adapter_model.safetensors"
    ).read_bytes() == adapter
    assert (copied / "experiment" / "best.yaml").read_text() == experiment


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("show", "nothing"),
            "nothing: no such study; allowed: a study's folder, latest, or one of s1",
        ),
        (
            ("best", "nothing"),
            "nothing: no such study; allowed: a study's folder, latest, or one of s1",
        ),
        (("stop", "s1", "2"), "trial 2: is not running; running: none"),
        (("stop", "s1", "99"), "trial 99: is not running; running: none"),
        (("stop", "s1", "two"), "trial=two: must be a whole number"),
        (("show", "s1", "99"), f"trial 99: no such trial; allowed: 0 to {TRIALS - 1}"),
        (("diff", "s1", "0", "99"), "trial 99: no such trial; allowed: 0 to"),
        (
            ("diff", "s1", "0"),
            "the following arguments are required: TRIAL; see --help",
        ),
        (("show", "s1", "two"), "trial=two: must be a whole number"),
        (("walk",), "walk: no such command; "),
    ],
)
def test_commands_refuse_in_one_line(
    arguments: tuple[str, ...],
    said: str,
    done: Done,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, done.folder.parents[2], *arguments)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_a_study_is_found_by_its_name_its_folder_or_as_the_newest(
    copied: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(copied, copied.parent / "older")
    os.utime(copied.parent / "older" / "study.json", (1, 1))
    monkeypatch.chdir(tmp_path)
    for name in ("s1", "outputs/sweeps/s1", str(copied), "latest"):
        assert find_study(name).folder == copied
    with pytest.raises(ConfigError) as caught:
        find_study("oldr")
    assert str(caught.value) == (
        "oldr: no such study; did you mean older? allowed: a study's folder, latest, or one of "
        "older, s1"
    )
    command(monkeypatch, tmp_path, "report", "latest")
    assert capsys.readouterr().out == "outputs/sweeps/s1/report.html\n"


def test_best_of_a_study_without_a_complete_trial_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sweeps.study.storage import open_storage

    folder = tmp_path / "empty"
    folder.mkdir()
    optuna.create_study(study_name="empty", storage=open_storage(None, folder))
    (folder / "study.json").write_text(json.dumps({"name": "empty", "storage": None}))
    with pytest.raises(SystemExit, match=str(NO_ANSWER)):
        command(monkeypatch, tmp_path, "best", "empty")
    assert (
        capsys.readouterr().err
        == "error: empty: no trial is complete yet, so there is no best\n"
    )
