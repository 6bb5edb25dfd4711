"""Studies on a Ray cluster that runs already, and on one of their own."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState
from support.commands import run_cli
from support.configs import study_overrides
from support.studies import sweeper_config

from finetune.hydra_errors import hydra_error_line
from sweeps.study.study import Study

pytest.importorskip("ray")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of one node, this machine, without GPUs."""
    # The cluster's own token: what other clusters of this machine have is not touched.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A short path: Ray's sockets are there.
    place = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    options = ["--num-cpus=2", "--num-gpus=0", "--include-dashboard=false"]
    where = ["--node-ip-address=127.0.0.1", f"--port={port}", f"--temp-dir={place}"]
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", "--head", "--block", *options, *where]
    head = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while not _answers(port):
            assert time.monotonic() < end, "Ray does not start"
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(children, timeout=20)
        for child in alive:
            child.kill()
        head.kill()
        head.wait()
        shutil.rmtree(place, ignore_errors=True)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.mark.slow
def test_a_running_cluster_trains_a_study_and_goes_on(
    cluster: str, tiny_base: Path, tmp_path: Path
) -> None:
    more = (
        "hydra/launcher=ray_cluster",
        f"hydra.launcher.ray.init.address={cluster}",
        "hydra.launcher.ray.remote.num_gpus=0",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.n_trials=4",
        # Ray's workers begin in the directory of `ray start`.
        "dataset.path=mine.jsonl",
    )
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ended = run_cli(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    study = Study.load(tmp_path / "outputs/sweeps/s")
    assert len(study.trials(TrialState.COMPLETE, TrialState.PRUNED)) == 4
    assert _answers(int(cluster.rpartition(":")[2]))


@pytest.mark.parametrize("launcher", ["ray", "submitit_local", "submitit_slurm"])
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(
    launcher: str,
) -> None:
    from hydra.errors import MissingConfigException

    error = MissingConfigException(
        "", missing_cfg_file=f"hydra/launcher/{launcher}", options=["basic", "joblib"]
    )
    extra = launcher.partition("_")[0]
    assert hydra_error_line(error) == (
        f"hydra/launcher={launcher}: its package is not installed: "
        f'pip install "qlora-sweeps[{extra}]"'
    )


def test_composing_a_preset_loads_neither_ray_nor_submitit() -> None:
    """As `--help` and a mistake on the command line do."""
    code = "import finetune.__main__, sys; finetune.__main__.main()"
    for launcher in ("ray_cluster", "slurm", "submitit_local"):
        words = ["--cfg", "hydra", "hydra/sweeper=optuna", f"hydra/launcher={launcher}"]
        program = f"import sys, atexit; sys.argv = ['finetune', *{words!r}]; atexit.register(lambda: print('LOADED', *sorted({{'ray', 'submitit', 'torch'}} & set(sys.modules)))); {code}"
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "LOADED"
    assert sweeper_config("hydra/launcher=slurm").hydra.launcher.workers_per_job == 1
