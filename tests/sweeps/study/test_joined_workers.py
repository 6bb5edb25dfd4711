"""`python -m sweeps work`: workers that join a running study, and leave it."""

import signal
from pathlib import Path

import pytest
from optuna.trial import TrialState
from support.commands import SLOW_STEPS, Station, wait_until
from support.configs import study_overrides
from support.postgres import Server, with_address
from support.studies import made_study

from finetune.errors import ConfigError
from finetune.files.run_folder import checkpoints_in
from sweeps.commands.work import _find_study, _words
from sweeps.study.stored_command import COMMAND, read_command
from sweeps.study.study import Study

FOUR_TRIALS = (
    "hydra.sweeper.n_trials=4",
    "trainer.max_steps=16",
    "trainer.save_steps=1",
    "hydra/sweeper/pruner=none",
)


@pytest.mark.fault
@pytest.mark.parametrize("storage", ["journal", "postgresql"])
def test_a_worker_joins_and_leaves_and_the_study_has_its_trials(
    storage: str,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the journal in the same folder; with PostgreSQL only the database is common."""
    monkeypatch.setenv("STUDY_DATABASE", server.address)
    one, other = tmp_path / "one", tmp_path / "other"
    study = [*study_overrides(tiny_base, "joined"), *FOUR_TRIALS]
    joins = ["work", str(one / "outputs/sweeps/joined")]
    folder = one / "outputs/sweeps/joined"
    joined_folder = folder
    if storage == "postgresql":
        study.append("hydra.sweeper.storage=${oc.env:STUDY_DATABASE}")
        joins = ["work", "joined", "--storage", server.address]
        joined_folder = other / "outputs/sweeps/joined"
    begun = station.start(*study, cwd=one, before=SLOW_STEPS)
    wait_until(lambda: any(folder.glob("trials/0/checkpoints/*")), begun)
    joined = station.start(*joins, cwd=other, module="sweeps", before=SLOW_STEPS)
    taken = joined_folder / "trials" / "1"
    wait_until(lambda: bool(checkpoints_in(taken / "checkpoints")), joined)
    joined.send_signal(signal.SIGINT)
    left = joined.wait()
    ended = begun.wait()

    assert left.returncode != 0
    last = "error: interrupted; its trials are given back, and go on elsewhere"
    assert left.stderr.splitlines()[-1] == last
    assert "Traceback" not in left.stderr
    assert ended.returncode == 0, ended.stderr
    states = [(trial.number, trial.state) for trial in Study.load(folder).trials()]
    assert states == [(number, TrialState.COMPLETE) for number in range(4)]
    if storage == "journal":
        assert "resuming after step" in (taken / "train.log").read_text()
    assert (folder / "trials/1/result.json").exists()
    again = station.run(*joins, cwd=other, module="sweeps")
    assert again.returncode == 0, again.stderr
    assert "4 trials of 4 finished, none left to begin here" in again.stderr
    assert "127.0.0.1" not in (folder / "study.json").read_text()


@pytest.mark.fault
def test_machines_with_nothing_in_common_but_the_database_share_the_trials(
    station: Station, tiny_base: Path, tmp_path: Path, server: Server
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    address = server.address.replace("+psycopg2", "")
    (one / "mine" / "search").mkdir(parents=True)
    (one / "mine" / "search" / "ranks.yaml").write_text("params: {lora.r: [2, 4, 8]}")
    study = [
        *study_overrides(tiny_base, "split"),
        *FOUR_TRIALS,
        "hydra.sweeper.storage=${oc.env:STUDY_DATABASE}",
        f"--config-dir={one / 'mine'}",
        "search=ranks",
    ]
    before = with_address(server.address) + "\n" + SLOW_STEPS
    begun = station.start(*study, cwd=one, before=before)
    trials = one / "outputs/sweeps/split/trials"
    wait_until(lambda: any(trials.glob("0/checkpoints/*")), begun)
    joins = ("work", "split", "--storage", address, "hydra.sweeper.n_jobs=1")
    joined = station.start(*joins, cwd=other, module="sweeps", before=SLOW_STEPS)
    ended = [running.wait() for running in (begun, joined)]

    assert [run.returncode for run in ended] == [0, 0], ended
    there, here = (
        {int(path.parent.name) for path in machine.rglob("trials/*/result.json")}
        for machine in (one, other)
    )
    assert there | here == set(range(4))
    assert not there & here
    assert here
    assert "lora.r=" in ended[1].stderr


def test_the_stored_command_leaves_out_what_is_the_machines_or_holds_secrets(
    tmp_path: Path, station: Station, tiny_base: Path
) -> None:
    study = [
        *study_overrides(tiny_base, "s"),
        "hydra.sweeper.n_trials=1",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.timeout=10000",
        "hydra/launcher=basic",
        "lora.r=choice(4,8)",
    ]
    ended = station.run(*study, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    stored, address = _find_study(str(tmp_path / "outputs/sweeps/s"), None)

    command = read_command(stored)
    words = _words(stored, command, address, ["hydra.sweeper.n_jobs=3"])

    assert command.working_directory == str(tmp_path)
    assert "lora.r=choice(4,8)" in command.overrides
    kept = " ".join(command.overrides)
    for key in ("n_jobs", "timeout", "launcher", "study_name", "mode"):
        assert f"hydra.sweeper.{key}" not in kept
        assert f"hydra/{key}" not in kept
    assert "hydra.sweeper.n_jobs=3" in words
    assert f"hydra.sweep.dir={tmp_path}/outputs/sweeps/s" in words


def test_what_is_missing_to_join_is_said_in_one_line(tmp_path: Path) -> None:
    study = made_study(tmp_path / "s", [])
    with pytest.raises(ConfigError, match="the command that began it joins it"):
        read_command(study)
    command = {
        "overrides": [],
        "config_name": "config",
        "config_folders": ["/nowhere/conf"],
        "working_directory": str(tmp_path),
    }
    study.optuna.set_user_attr(COMMAND, command)
    with pytest.raises(ConfigError, match="/nowhere/conf is not on this machine"):
        read_command(study)
    study.optuna.set_user_attr(COMMAND, {**command, "config_folders": []})
    with pytest.raises(ConfigError, match="the study's config is its own; allowed: "):
        _words(study, read_command(study), None, ["lora.r=8"])


def test_a_password_in_the_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        _find_study("s", "postgresql://me:hunter2horse@127.0.0.1/x")
    assert "hunter2horse" not in str(refused.value)
    with pytest.raises(ConfigError, match="must be null"):
        _find_study("s", "journal")
    with pytest.raises(ConfigError, match="no such study in sqlite"):
        _find_study("s", f"sqlite:///{tmp_path}/studies.db")
