"""Plain multiruns, as commands: their jobs train together, each in its own folder, and end each in
its own way."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import SLOW_STEPS, Station, wait_until
from support.configs import tiny_overrides
from support.models import wide_base
from support.runs import final, losses
from support.wandb_log import wandb_files, wandb_history

from finetune.config.schema import RunConfig
from finetune.exit_codes import INTERRUPTED
from finetune.files.atomic import read_json
from finetune.files.run_folder import checkpoints_in
from finetune.model.memory import USABLE
from finetune.run.memory_plan import plan_memory, resolve_checkpointing
from finetune.run.resources import SharedResources, base_key
from finetune.run.run import run
from sweeps.study.slot_count import JobSlots, choose_job_slots

Tiny = Callable[..., RunConfig]


MULTIRUN = ("dataset.max_length=64", "sample_prompts=[]", "trainer.max_steps=4")
BATCH = "trainer.per_device_train_batch_size"


def multirun(tiny_base: Path, *more: str) -> list[str]:
    """The command line of a multirun whose jobs take about a second."""
    return ["-m", *tiny_overrides(tiny_base), *MULTIRUN, "hydra.sweep.dir=jobs", *more]


def error_of(said: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said
    return line


def logged(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return rows


@pytest.fixture(scope="module")
def two(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of a multirun of two jobs in two slots, and what it said."""
    place = tmp_path_factory.mktemp("two")
    more = ("lora=r4,r8", "hydra.launcher.slots=2", "tracker=wandb", "lora.dropout=0.1")
    ended = station.run(*multirun(tiny_base, *more), cwd=place)
    assert ended.returncode == 0, ended.stderr
    return place / "jobs", ended.stderr


def test_each_job_leaves_a_run_folder_with_hydras_files(two: tuple[Path, str]) -> None:
    folder, _ = two
    assert (folder / "multirun.yaml").exists()
    assert sorted(path.name for path in (folder / "trials").iterdir()) == ["0", "1"]
    for number, rank in enumerate((4, 8)):
        place = folder / "trials" / str(number)
        result = final(place)
        assert (result["status"], result["engine"], result["slots"]) == (
            "completed",
            "packed",
            2,
        )
        assert result["companions"] == [str(1 - number)]
        assert (place / "adapter" / "adapter_model.safetensors").exists()
        assert f"lora=r{rank}" in yaml.safe_load(
            (place / ".hydra" / "overrides.yaml").read_text()
        )
        config = yaml.safe_load((place / ".hydra" / "config.yaml").read_text())
        hydra = yaml.safe_load((place / ".hydra" / "hydra.yaml").read_text())["hydra"]
        assert config["lora"]["r"] == rank
        assert "hydra" not in config
        assert (hydra["job"]["num"], hydra["job"]["id"]) == (number, str(number))
        assert hydra["runtime"]["output_dir"] == str(place)
        assert hydra["runtime"]["choices"]["lora"] == f"r{rank}"


def test_each_jobs_log_holds_its_own_lines_and_the_terminal_says_whose_each_is(
    two: tuple[Path, str],
) -> None:
    folder, said = two
    for number in range(2):
        place = folder / "trials" / str(number)
        lines = (place / "train.log").read_text().splitlines()
        dated = [
            line for line in lines if not line.startswith("  ")
        ]  # a run's summary is of several lines
        assert all(line.startswith("[20") for line in dated), (
            "lines have a date, as Hydra's"
        )
        texts = [line.split(" - ", 1)[1] if line in dated else line for line in lines]
        shown = [
            text
            for text in texts
            if text.startswith("step ") and "held-out" not in text
        ]
        assert [
            f"{row['train/loss']:.4f}" for row in logged(place) if "train/loss" in row
        ] == [text.split()[3] for text in shown]
        own = [
            line.removeprefix(f"{number}: ")
            for line in said.splitlines()
            if line.startswith(f"{number}: ")
        ]
        assert own == texts


def test_a_multirun_ends_with_a_table_of_its_jobs_the_best_first(
    two: tuple[Path, str], station: Station
) -> None:
    folder, said = two
    values = {
        number: final(folder / "trials" / str(number))["metrics"]["eval/loss"]
        for number in range(2)
    }
    best, other = sorted(values, key=lambda number: values[number])
    expected = [["trial", "state", "eval/loss", "lora", "note"]] + [
        [str(number), "complete", f"{values[number]:.4f}", f"r{4 + 4 * number}"]
        for number in (best, other)
    ]
    table = (folder / "jobs.txt").read_text()
    assert [line.split() for line in table.splitlines()] == expected
    assert table in said
    assert "job 0: lora=r4\n" in said

    shown = station.run("show", "jobs", cwd=folder.parent, module="sweeps")
    assert shown.stdout == table
    report = station.run("report", "jobs", cwd=folder.parent, module="sweeps")
    assert report.stdout == "jobs/report.html\n", report.stderr
    page = (folder / "report.html").read_text()
    assert f"Trial {best} wins with eval/loss {values[best]:.4f}" in page
    for command in ("best", "confirm"):
        refused = station.run(command, "jobs", cwd=folder.parent, module="sweeps")
        assert refused.stderr.startswith("error: jobs: is a plain multirun, which has ")


@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=basic"],
        ["hydra/launcher=basic", "hydra.sweeper.max_batch_size=1"],
        ["hydra.sweeper.max_batch_size=1"],
    ],
    ids=["basic", "basic in batches", "slots in batches"],
)
def test_a_multirun_of_any_launcher_ends_with_one_table(
    launcher: list[str], station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    command = multirun(tiny_base, "lora=r4,r8", "quantization=none", *launcher)
    ended = station.run(*command, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    table = (tmp_path / "jobs" / "jobs.txt").read_text()
    assert sorted(line.split()[0] for line in table.splitlines()[1:]) == ["0", "1"]
    assert ended.stderr.count(table) == 1
    assert ended.stderr.count("table: jobs/jobs.txt") == 1
    assert "charts: python -m sweeps report jobs" in ended.stderr


def test_a_job_is_the_run_alone(
    two: tuple[Path, str], tiny: Tiny, tmp_path: Path
) -> None:
    folder, _ = two
    common = (
        "dataset.max_length=64",
        "sample_prompts=[]",
        "trainer.max_steps=4",
        "lora.dropout=0.1",
        "lora=r8",
    )
    run(tiny(*common), tmp_path)
    place = folder / "trials" / "1"
    assert losses(place) == pytest.approx(losses(tmp_path), rel=1e-5)
    there, here = (final(one)["metrics"] for one in (tmp_path, place))
    assert here.keys() == there.keys()
    assert here["test/loss"] == pytest.approx(there["test/loss"], rel=1e-5)


def test_each_job_is_a_wandb_run_of_one_group(two: tuple[Path, str]) -> None:
    folder, _ = two
    shown = []
    for number in range(2):
        place = folder / "trials" / str(number)
        run_id = read_json(place / "tracker.json")["id"]
        (records,) = wandb_files(folder, run_id)
        (opened,) = [record.run for record in records if record.HasField("run")][:1]
        shown.append((opened.display_name, opened.run_group, opened.job_type))
        steps = wandb_history(records)
        for name in (
            "train/loss",
            "train/grad_norm",
            "train/learning_rate",
            "eval/loss",
            "objective",
            "test/loss",
        ):
            wanted = [row[name] for row in logged(place) if name in row]
            assert wanted
            assert [row[name] for row in steps if name in row] == wanted
    assert shown == [
        ("default lora=r4", "jobs", "trial"),
        ("default lora=r8", "jobs", "trial"),
    ]


def test_jobs_that_fail_end_no_other_and_are_told_of(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """One before it trains, one while it trains; the free slots go to the jobs that wait."""
    rates = "optimizer.learning_rate=1e-3,1e30,-1,1e-4"
    more = (
        rates,
        "hydra.launcher.slots=2",
        "quantization=none",
        "trainer.max_steps=8",
        "trainer.eval_steps=0",
    )
    ended = station.run(*multirun(tiny_base, *more), cwd=tmp_path)
    assert ended.returncode == 1
    line = error_of(ended.stderr)
    assert line == ended.stderr.splitlines()[-1]
    assert line.startswith(
        "error: 2 failed; job 1: optimizer.learning_rate=1e+30: training diverged at step "
    )
    assert "job 2 failed: optimizer.learning_rate=-1" in ended.stderr
    trials = tmp_path / "jobs" / "trials"
    assert [final(trials / number)["status"] for number in "013"] == [
        "completed",
        "failed",
        "completed",
    ]
    assert final(trials / "1")["error"].startswith("optimizer.learning_rate=1e+30")
    assert not (trials / "2").exists(), "a job that never began leaves nothing"
    table = (tmp_path / "jobs" / "jobs.txt").read_text().splitlines()
    assert table[0].split() == ["trial", "state", "eval/loss", "learning_rate", "note"]
    states = [line.split()[1] for line in table[1:]]
    assert states == ["complete", "complete", "fail", "fail"]
    assert "training diverged" in table[3]
    assert table[4].endswith("  refused: optimizer.learning_rate=-1.0: must be above 0")
    assert len(losses(trials / "0")) == len(losses(trials / "3")) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=basic"],
        ["hydra/launcher=basic", "hydra.job.chdir=true"],
        ["hydra/launcher=slots"],
        ["hydra/launcher=joblib"],
    ],
    ids=["basic", "other directory", "slots", "joblib"],
)
def test_the_table_says_why_a_job_was_refused(
    launcher: list[str], station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """Before its run began, or as its rows were read."""
    command = multirun(
        tiny_base,
        *launcher,
        "quantization=none",
        "experiment=a,b,c",
        "--config-dir",
        ".",
    )
    (tmp_path / "experiment").mkdir()
    for name, text in (
        ("a", "lora: {r: 4}"),
        ("b", "lora: {r: -4}"),
        ("c", "dataset: {path: nowhere.jsonl}"),
    ):
        head = "# @package _global_\n"
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"{head}{text}\n")
    ended = station.run(*command, cwd=tmp_path)
    assert ended.returncode == 1
    jobs = tmp_path / "jobs"
    table = (jobs / "jobs.txt").read_text().splitlines()
    assert len(table) == 4
    assert [line.split()[:2] for line in table[1:]] == [
        ["0", "complete"],
        ["1", "fail"],
        ["2", "fail"],
    ]
    assert table[2].endswith(
        "  refused: lora.r=-4: must be a whole number of at least 1"
    )
    assert "dataset.path=nowhere.jsonl: " in table[3]
    # A folder that is the working directory can't be removed.
    has_folder = "hydra.job.chdir=true" in launcher
    assert (jobs / "trials" / "1").exists() == has_folder


def test_a_bases_neediest_job_decides_whether_all_compute_activations_twice(
    station: Station,
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that they share it. Two jobs have no rows, which they say themselves."""
    monkeypatch.setattr("finetune.run.planned_base._resident", lambda: 2**28)
    resources = SharedResources()
    kept, saved, small = (
        plan_memory(
            tiny(
                *MULTIRUN, f"trainer.gradient_checkpointing={saves}", f"{BATCH}={rows}"
            ),
            resources,
        ).peak()
        / USABLE
        for saves, rows in (("false", 8), ("true", 8), ("false", 1))
    )
    memory = (max(saved, small) + kept) / 2
    assert max(saved, small) < memory < kept
    machine = f"""
import finetune.run.memory_plan
import finetune.run.planned_base
finetune.run.planned_base._resident = lambda: 2**28
finetune.run.memory_plan.available_memory = lambda gpus: {int(memory)}
"""
    rows = "dataset.path=nowhere.jsonl,python_docs"
    ended = station.run(
        *multirun(tiny_base, rows, f"{BATCH}=1,8"), cwd=tmp_path, before=machine
    )
    assert error_of(ended.stderr).startswith(
        "error: 2 failed; job 0: dataset.path=nowhere.jsonl: "
    )
    for number in (2, 3):
        place = tmp_path / "jobs" / "trials" / str(number)
        assert final(place)["status"] == "completed"
        assert (
            "trainer.gradient_checkpointing=partial"
            in (place / "train.log").read_text()
        )


def test_what_is_decided_for_a_bases_jobs_holds_for_no_others(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.run.planned_base._resident", lambda: 2**28)
    resources, wide = (
        SharedResources(),
        f"model.name_or_path={wide_base(tiny_base, tmp_path)}",
    )
    kept, saved = (
        tiny(*MULTIRUN, wide, f"trainer.gradient_checkpointing={saves}")
        for saves in ("false", "partial")
    )
    between = (
        sum(plan_memory(config, resources).peak() for config in (kept, saved))
        / 2
        / USABLE
    )
    monkeypatch.setattr(
        "finetune.run.memory_plan.available_memory", lambda gpus: int(between)
    )
    large, small = (*MULTIRUN, wide), (*MULTIRUN, wide, f"{BATCH}=1")
    for jobs, wanted in (
        ((large, MULTIRUN), [base_key(saved)]),
        ((small, (*large, "trainer.gradient_checkpointing=true")), []),
        (
            (large, (*large, f"{BATCH}=8", "trainer.gradient_checkpointing=false")),
            [base_key(saved)],
        ),
        ((small, (*large, "lora.bias=all")), []),  # TRL trains it
        (
            (large, (*large, "lora.r=64", "lora.target_modules=[nope]")),
            [base_key(saved)],
        ),
    ):
        chosen = choose_job_slots("auto", [tiny(*job) for job in jobs])
        assert chosen == JobSlots(1, wanted)
    assert (
        resolve_checkpointing(
            tiny(*MULTIRUN), "packed", resources, [base_key(saved)]
        ).trainer.gradient_checkpointing
        is False
    )


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_multirun_ends_each_job_with_a_checkpoint(
    number: int, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "lora=r4,r8,r16",
        "hydra.launcher.slots=2",
        "trainer.max_steps=100000",
        "trainer.save_steps=0",
    )
    process = station.start(
        *multirun(tiny_base, *more, "trainer.eval_steps=0"), cwd=tmp_path
    )
    trials = [tmp_path / "jobs" / "trials" / str(job) for job in range(2)]
    wait_until(
        lambda: all(
            (trial / "metrics.jsonl").exists() and len(losses(trial)) > 2
            for trial in trials
        ),
        process,
    )
    process.send_signal(number)
    ended = process.wait()

    assert ended.returncode == INTERRUPTED
    assert error_of(ended.stderr).startswith("error: interrupted after step ")
    assert " failed" not in ended.stderr, "an interruption is no failure"
    for trial in trials:
        result = final(trial)
        assert result["status"] == "interrupted"
        assert len(losses(trial)) == result["step"]
        assert [path.name for path in checkpoints_in(trial / "checkpoints")] == [
            f"checkpoint-{result['step']}"
        ]
    assert not (tmp_path / "jobs" / "trials" / "2").exists(), (
        "a job has begun after the interruption"
    )


@pytest.mark.fault
def test_a_job_that_was_interrupted_is_resumed_as_a_run(
    station: Station, tiny_base: Path, tiny: Tiny, tmp_path: Path
) -> None:
    steps = (
        "trainer.max_steps=40",
        "trainer.save_steps=0",
        "lora.dropout=0.1",
        "quantization=none",
    )
    more = ("lora=r4,r8", "hydra.launcher.slots=2", *steps)
    process = station.start(
        *multirun(tiny_base, *more), cwd=tmp_path, before=SLOW_STEPS
    )
    trials = [tmp_path / "jobs" / "trials" / str(job) for job in range(2)]
    wait_until(
        lambda: all(
            (trial / "metrics.jsonl").exists() and len(losses(trial)) > 2
            for trial in trials
        ),
        process,
    )
    process.send_signal(signal.SIGINT)
    process.wait()
    resumed = station.run(f"resume={trials[1]}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    run(
        tiny("dataset.max_length=64", "sample_prompts=[]", *steps, "lora=r8"),
        tmp_path / "alone",
    )
    assert losses(trials[1]) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert final(trials[1])["status"] == "completed"


@pytest.mark.slow
def test_without_slots_jobs_run_one_after_the_other_in_one_process(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """The default on a CPU: one slot; the base is loaded once."""
    ended = station.run(*multirun(tiny_base, "lora=r4,r8"), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("no GPU: training on the CPU") == 1
    results = [final(tmp_path / "jobs" / "trials" / str(job)) for job in range(2)]
    assert [(result["slots"], result["companions"]) for result in results] == [
        (1, []),
        (1, []),
    ]


@pytest.mark.slow
def test_jobs_of_other_bases_and_engines_wait_for_each_other(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "quantization=none,nf4",
        "trainer.engine=packed,trl",
        "hydra.launcher.slots=3",
    )
    ended = station.run(*multirun(tiny_base, *more), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    results = [final(tmp_path / "jobs" / "trials" / str(job)) for job in range(4)]
    assert [(result["status"], result["engine"]) for result in results] == [
        ("completed", engine) for engine in ("packed", "trl", "packed", "trl")
    ]
    for packed, trl in ((0, 1), (2, 3)):
        ours, theirs = (
            losses(tmp_path / "jobs" / "trials" / str(job)) for job in (packed, trl)
        )
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_the_basic_launcher_still_runs_jobs_one_by_one(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    ended = station.run(
        *multirun(tiny_base, "lora=r4,r8", "hydra/launcher=basic"), cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert [
        final(tmp_path / "jobs" / "trials" / str(job))["status"] for job in range(2)
    ] == ["completed"] * 2


@pytest.mark.parametrize("slots", ["0", "-1", "many", "1.5"])
def test_slots_that_cannot_be_are_refused(
    slots: str, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    ended = station.run(
        *multirun(tiny_base, "lora=r4,r8", f"hydra.launcher.slots={slots}"),
        cwd=tmp_path,
    )
    assert ended.returncode == 1
    assert error_of(ended.stderr).startswith(
        f"error: hydra.launcher.slots={slots}: must be "
    )
    assert not list(tmp_path.rglob("result.json"))


def test_a_callback_hears_of_each_jobs_start_and_end(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """What Hydra tells of jobs that it runs itself."""
    heard = """
from hydra.experimental.callback import Callback
import sys, types
class Tells(Callback):
    def on_job_start(self, config, **more):
        print("start", config.hydra.job.num, config.lora.r, file=sys.stderr)
    def on_job_end(self, config, job_return, **more):
        print("end", config.hydra.job.num, job_return.status.name, file=sys.stderr)
module = types.ModuleType("tells")
module.Tells = Tells
sys.modules["tells"] = module
"""
    more = (
        "lora.r=4,0",
        "hydra.launcher.slots=2",
        "+hydra.callbacks.tells._target_=tells.Tells",
    )
    ended = station.run(*multirun(tiny_base, *more), cwd=tmp_path, before=heard)
    assert ended.returncode == 1
    told = [
        line
        for line in ended.stderr.splitlines()
        if line.split()[0] in ("start", "end")
    ]
    assert sorted(told) == ["end 0 COMPLETED", "end 1 FAILED", "start 0 4", "start 1 0"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "+hydra.launcher.n_jobs=2",
            "error: hydra.launcher.n_jobs=2: no such key; hydra.launcher.slots",
        ),
        (
            "hydra.job.chdir=true",
            "error: hydra.job.chdir=true: runs that train together share one",
        ),
        (
            "+hydra.job.env_set.SHADE=r${lora.r}",
            "error: hydra.job.env_set.SHADE=r8: jobs that train in one",
        ),
    ],
)
def test_what_jobs_of_one_process_cannot_have_each_is_refused(
    arguments: str, line: str, light_station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    ended = light_station.run(
        *multirun(tiny_base, "lora=r4,r8", arguments), cwd=tmp_path
    )
    assert ended.returncode == 1
    assert error_of(ended.stderr).startswith(line)


CALLBACK = """
import os
from hydra.experimental.callback import Callback
class Recorder(Callback):
    def on_job_start(self, config, **kwargs):
        with open("variables.txt", "a") as file:
            file.write(f"{os.environ['SHADE']} {os.environ['COPIED']}\\n")
import sys, types
os.environ["COPIED"] = "yes"
module = types.ModuleType("recorder")
module.Recorder = Recorder
sys.modules["recorder"] = module
"""


def test_jobs_have_the_environment_of_the_config_and_no_log_where_it_is_disabled(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    ended = station.run(
        *multirun(
            tiny_base,
            "lora=r4,r8",
            "+hydra.job.env_set.SHADE=red",
            "hydra.job.env_copy=[COPIED]",
            "+hydra.callbacks.recorder._target_=recorder.Recorder",
            "hydra/job_logging=disabled",
        ),
        cwd=tmp_path,
        before=CALLBACK,
    )
    assert ended.returncode == 0, ended.stderr
    lines = (tmp_path / "variables.txt").read_text().splitlines()
    assert lines == ["red yes"] * 2
    assert "held-out" not in ended.stderr
