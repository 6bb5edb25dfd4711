"""Workers, launchers and databases that are killed: each trial is trained once, and none is lost.

The table of all launchers and storages, a hundred faults, takes half an hour: `make test-faults`.
"""

import contextlib
import importlib.util
import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import Station, wait_until
from support.configs import study_overrides
from support.faults import WORKERS, FaultyStudy, variables_of
from support.postgres import Server
from support.ray_cluster import ray_cluster

pytestmark = pytest.mark.fault

FAULTS = 17
"""In each case of the table: 102 in all."""

PACKAGES = {"ray": "hydra_ray_launcher", "submitit_local": "hydra_submitit_launcher"}
"""Plugins that are no dependencies, by their launchers."""

KINDS = {
    "journal": ("worker", "launcher"),
    "database": ("worker", "database", "launcher"),
}

TABLE = [
    pytest.param(launcher, storage, FAULTS, marks=pytest.mark.matrix)
    for launcher in ("joblib", "submitit_local", "ray")
    for storage in ("journal", "database")
]


@pytest.mark.parametrize(
    ("launcher", "storage", "faults"), [("joblib", "database", 3), *TABLE]
)
def test_faults_lose_no_trial_and_train_none_twice(
    launcher: str,
    storage: str,
    faults: int,
    request: pytest.FixtureRequest,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    require_package(launcher)
    server: Server | None = None
    if storage == "database":
        server = request.getfixturevalue("server")
    chance = random.Random(f"{launcher} {storage}")
    kinds = itertools.cycle(KINDS[storage])
    inflicted = 0
    for round_ in itertools.count():
        place = tmp_path / str(round_)
        with options_of(launcher, place, server) as options:
            name = f"{launcher}{faults}_{round_}"
            overrides = [*study_overrides(tiny_base, name), *options]
            with FaultyStudy(station, overrides, name, place, chance, server) as study:
                kind = next(kinds)
                while inflicted < faults and study.inflict(kind):
                    inflicted += 1
                    kind = next(kinds)
                study.end()
                assert study.leftovers() == []
        if inflicted == faults:
            return


@pytest.mark.matrix
def test_a_killed_worker_is_replaced_alone(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    """submitit tells of it while the others live; two workers never have one GPU."""
    require_package("submitit_local")
    overrides = [
        *study_overrides(tiny_base, "alone"),
        "hydra/launcher=submitit_local",
    ]
    chance = random.Random(0)
    with FaultyStudy(
        station, overrides, "alone", tmp_path / "study", chance, None
    ) as study:
        wait_until(lambda: len(study.workers()) == WORKERS, study.process)
        os.kill(study.workers()[0], signal.SIGKILL)
        most = 0
        while study.process.poll() is None:
            most = max(most, len(study.workers()))
            time.sleep(0.05)
        study.end()
        assert most <= WORKERS
        assert study.leftovers() == []


def require_package(launcher: str) -> None:
    package = PACKAGES.get(launcher)
    if package and not importlib.util.find_spec(f"hydra_plugins.{package}"):
        pytest.skip(f"{package} is not installed")


@contextlib.contextmanager
def options_of(
    launcher: str, place: Path, server: Server | None
) -> Iterator[list[str]]:
    """The overrides that choose a launcher, and what it needs."""
    options = [f"hydra/launcher={launcher}"]
    if launcher != "ray":
        yield options
        return
    with ray_cluster(variables_of(place, server)) as address:
        yield [*options, f"+hydra.launcher.ray.init.address={address}"]
