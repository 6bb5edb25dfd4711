"""`python -m sweeps work`: workers that join a running study, and leave it."""

import dataclasses
import json
import pickle
import signal
from pathlib import Path

import pytest
from optuna.trial import TrialState
from support.commands import Station, wait_until
from support.configs import study_overrides
from support.driving import session_of
from support.gates import gate, gated
from support.postgres import Server
from support.studies import made_study

from finetune.errors import ConfigError
from sweeps.commands.work import _find_study, _words
from sweeps.space.space import Space
from sweeps.study.stored_command import COMMAND, read_command
from sweeps.study.study import Study


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
    (tmp_path / "mine" / "search").mkdir(parents=True)
    ranks = tmp_path / "mine" / "search" / "ranks.yaml"
    ranks.write_text("params: {lora.r: [2, 4, 8]}")
    study = [
        *study_overrides(tiny_base, "joined"),
        "hydra.sweeper.n_trials=4",
        "trainer.max_steps=8",
        "trainer.save_steps=1",
        "hydra/sweeper/pruner=none",
        f"--config-dir={tmp_path / 'mine'}",
        "search=ranks",
    ]
    folder = joined_folder = one / "outputs/sweeps/joined"
    joins = ["work", str(folder)]
    if storage == "postgresql":
        study.append("hydra.sweeper.storage=${oc.env:STUDY_DATABASE}")
        joins = ["work", "joined", "--storage", server.address]
        joined_folder = other / "outputs/sweeps/joined"

    begun = station.start(*study, cwd=one, before=gated(one))
    wait_until(gate(one, 1, "reached").exists, begun)
    gate(other, 1, "open").touch()
    joined = station.start(*joins, cwd=other, module="sweeps", before=gated(other))
    wait_until(gate(other, 2, "reached").exists, joined)
    joined.send_signal(signal.SIGINT)
    gate(other, 2, "open").touch()
    left = joined.wait()
    for number in range(1, 5):
        gate(one, number, "open").touch()
    ended = begun.wait()

    assert left.returncode != 0
    last = "error: interrupted; its trials are given back, and go on elsewhere"
    assert left.stderr.splitlines()[-1] == last
    assert "Traceback" not in left.stderr
    assert ended.returncode == 0, ended.stderr
    trials = Study.load(folder).trials()
    states = [(trial.number, trial.state) for trial in trials]
    assert states == [(number, TrialState.COMPLETE) for number in range(4)]
    assert all(trial.params["lora.r"] in (2, 4, 8) for trial in trials[1:])
    results = {result_of(joined_folder, 1), result_of(folder, 2)}
    assert results == {"completed"}
    if storage == "journal":
        assert "resuming after step 5" in (folder / "trials/2/train.log").read_text()
    else:
        assert result_of(joined_folder, 2) == "interrupted"
        assert not (folder / "trials/1").exists()
    again = station.run(*joins, cwd=other, module="sweeps")
    assert again.returncode == 0, again.stderr
    assert "4 trials of 4 finished, none left to begin here" in again.stderr


def result_of(folder: Path, number: int) -> str:
    content = json.loads((folder / "trials" / str(number) / "result.json").read_text())
    return str(content["status"])


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


def test_what_a_launcher_writes_of_a_session_holds_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit pickles it into a file, for workers that have the environment too."""
    monkeypatch.setenv("STUDY_DATABASE", "postgresql://me:hunter2horse@127.0.0.1/x")
    session = session_of(space=Space.parse({}, []), folder=tmp_path)
    storage = "${oc.env:STUDY_DATABASE}"
    settings = dataclasses.replace(session.settings, storage=storage)
    session = dataclasses.replace(session, settings=settings)
    assert session.address == "postgresql://me:hunter2horse@127.0.0.1/x"

    written = pickle.dumps(session)

    assert b"hunter2horse" not in written
    assert pickle.loads(written).address == session.address
    monkeypatch.delenv("STUDY_DATABASE")
    with pytest.raises(ConfigError, match="STUDY_DATABASE"):
        _ = pickle.loads(written).address
