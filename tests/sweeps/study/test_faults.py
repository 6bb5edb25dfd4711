"""Workers, launchers and databases that are killed: each trial is trained once, and none is lost."""

import random
from pathlib import Path

import pytest
from support.commands import Station
from support.configs import study_overrides
from support.faults import FaultyStudy
from support.postgres import Server

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("storage", ["journal", "database"])
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_faults(storage, launcher, station: Station, server: Server, tiny_base: Path, tmp_path: Path) -> None:
    import os
    faults = int(os.environ.get("FAULTS", "6"))
    chance = random.Random(int(os.environ.get("SEED", "1")))
    kinds = ["worker", "launcher"] + (["database"] if storage == "database" else [])
    done = 0
    round_ = 0
    while done < faults:
        place = tmp_path / str(round_)
        place.mkdir()
        import contextlib
        stack = contextlib.ExitStack()
        extra = []
        if launcher == "ray":
            from support.ray_cluster import ray_cluster
            env = {"PYTHONPATH": f"{place}:" + os.environ["PYTHONPATH"], "STUDY_DATABASE": server.address}
            extra = ["+hydra.launcher.ray.init.address=" + stack.enter_context(ray_cluster(env))]
            print(extra)
        study = FaultyStudy(station, [*study_overrides(tiny_base, "s"), f"hydra/launcher={launcher}", *extra], place, chance, server if storage == "database" else None)
        if storage == "database":
            server.execute("drop schema public cascade"); server.execute("create schema public")
        while done < faults and study.inflict(kind := kinds[done % len(kinds)]):
            done += 1
            import time; print(time.strftime("%H:%M:%S"), kind, flush=True)
        study.end()
        print(time.strftime("%H:%M:%S"), "ended", study.leftovers(), flush=True)
        stack.close()
        print("\n".join(study.said)[-6000:])
        round_ += 1
