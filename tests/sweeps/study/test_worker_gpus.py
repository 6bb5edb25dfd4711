"""Each worker sees GPUs of its own, through every launcher."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.commands import run_cli
from support.configs import study_overrides, tiny_overrides
from support.matrix import further
from support.studies import settings_of, sweeper_config

from finetune.errors import ConfigError
from finetune.run.resources import shared_resources
from sweeps.study.launchers import _with_worker_launcher
from sweeps.study.launching import worker_count

FOUR_GPUS = """
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
class Counted(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torch.cuda":
            return None
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            import os
            module.device_count = lambda: len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")) if os.environ.get("CUDA_VISIBLE_DEVICES") != "" else 0
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Counted())
"""
"""A `sitecustomize` that lets PyTorch count GPUs by the environment; it still trains on the CPU."""


@pytest.fixture
def with_four_gpus(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with four GPUs, of which this process is to use two to five."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(FOUR_GPUS)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "2,3,4,5"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["slots", *further("submitit_local", "joblib", "ray")]
)
def test_two_workers_with_two_gpus_each_see_different_ones(
    launcher: str, with_four_gpus: dict[str, str], tiny_base: Path, tmp_path: Path
) -> None:
    more = [
        f"hydra/launcher={launcher}",
        "hydra.sweeper.gpus_per_worker=2",
        "hydra.sweeper.n_trials=4",
    ]
    if launcher == "ray":
        # There are no such GPUs, which Ray looks for by itself.
        more += [
            "+hydra.launcher.ray.init.num_gpus=4",
            "+hydra.launcher.ray.init.include_dashboard=false",
        ]
    ended = run_cli(
        *study_overrides(tiny_base, "s"), *more, cwd=tmp_path, **with_four_gpus
    )
    assert ended.returncode == 0, ended.stderr
    logs = [ended.stderr, ended.stdout]
    logs += [path.read_text() for path in tmp_path.rglob("*log.err")]
    logs += [path.read_text() for path in tmp_path.rglob("*.log")]
    shown = set(re.findall(r"worker (\d): GPU ([\d,]+)", "\n".join(logs)))
    # Ray names a worker's GPUs in any order.
    groups = {tuple(sorted(gpus.split(","))) for _, gpus in shown}
    assert groups == {("2", "3"), ("4", "5")}
    assert {worker for worker, _ in shown} == {"0", "1"}


def test_as_many_workers_as_have_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert worker_count(settings_of()) == 5
    two = "hydra.sweeper.gpus_per_worker=2"
    assert worker_count(settings_of(two)) == 2
    assert worker_count(settings_of(two, "hydra.sweeper.n_jobs=3")) == 3
    with pytest.raises(ConfigError) as refused:
        worker_count(settings_of("hydra.sweeper.gpus_per_worker=8"))
    line = "hydra.sweeper.gpus_per_worker=8: 5 GPUs are visible here"
    assert str(refused.value) == line
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert worker_count(settings_of(two)) == 1
    with pytest.raises(ConfigError, match="gpus_per_worker=0: must be at least 1"):
        settings_of("hydra.sweeper.gpus_per_worker=0")


def test_the_launcher_of_a_cluster_asks_for_each_workers_gpus() -> None:
    config = sweeper_config(
        "hydra/launcher=ray_cluster", "hydra.sweeper.gpus_per_worker=4"
    )
    ray = config.hydra.launcher.ray
    assert ray.remote == {"num_cpus": 1, "num_gpus": 4}
    assert ray.init.address == os.environ.get("RAY_ADDRESS", "auto")
    plain = sweeper_config("hydra/launcher=ray_cluster", "hydra/sweeper=basic")
    assert plain.hydra.launcher.ray.remote.num_gpus == 1
    # The launcher stays what the user chose.
    assert (
        _with_worker_launcher(config, 2, True).hydra.launcher == config.hydra.launcher
    )


@pytest.mark.parametrize(("visible", "overrides"), [(4, ["trainer.gpus=2"]), (0, [])])
def test_trials_spread_their_base_over_the_gpus_of_their_worker(
    tiny: Any, visible: int, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.model import device
    from sweeps.study.engine_choice import EngineChoice
    from sweeps.study.session import Session

    monkeypatch.setattr(device, "on_gpu", lambda: visible > 0)
    session = SimpleNamespace(
        engine=EngineChoice("packed", 2, False),
        space=SimpleNamespace(config_keys=["trainer.gradient_checkpointing"]),
        settings=settings_of("hydra.sweeper.gpus_per_worker=2"),
        common=tiny(),
    )
    composed = Session.common_overrides.fget(session)  # type: ignore[attr-defined]
    assert composed == ["trainer.engine=packed", *overrides]


def test_other_gpus_than_those_of_a_worker_are_refused(tiny: Any) -> None:
    from sweeps.study.opening import _choose_engine

    settings = settings_of("hydra.sweeper.gpus_per_worker=2")
    line = "trainer.gpus=3: each worker has hydra.sweeper.gpus_per_worker=2"
    with pytest.raises(ConfigError, match=line):
        _choose_engine(settings, [tiny("trainer.gpus=3")])


@pytest.mark.parametrize("only", [None, 3])
def test_a_worker_loads_its_base_as_the_plan_of_the_study_decides(
    only: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.study import worker
    from sweeps.study.engine_choice import EngineChoice

    ways = []

    def train_together(next_run: Any, slots: int) -> int:
        ways.append(shared_resources._borrows_blocks)
        return 0

    nothing = SimpleNamespace(
        interrupt=None, leases=None, total=1, storage_error=None, next_run=None
    )
    for name in ("Study", "_TrialSource", "BaselineSeeds"):
        monkeypatch.setattr(worker, name, lambda *_, **__: nothing)
    monkeypatch.setattr(worker, "_select_gpus", lambda *_: None)
    monkeypatch.setattr(worker, "train_together", train_together)
    for borrows in (True, False):
        session: Any = SimpleNamespace(
            engine=EngineChoice("packed", 4, False, borrows),
            settings=SimpleNamespace(study_name="s1", lost_after=1.0),
            sweeper=SimpleNamespace(is_this=True),
            folder=None,
            address=None,
        )
        worker.Worker(session, only)._work(0)
    # A trial that trains alone has one slot.
    assert ways == [only is None, False]
    assert not shared_resources._borrows_blocks


def test_blocks_are_borrowed_where_each_base_of_a_study_leaves_memory_for_it(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.study import opening
    from sweeps.study.slot_count import SlotChoice

    configs = [tiny("seed=1"), tiny("seed=2")]
    monkeypatch.setattr(opening, "choose_engine", lambda *_: "packed")
    # As if they had two bases.
    monkeypatch.setattr(
        opening,
        "by_base",
        lambda configs: {config.seed: [config] for config in configs},
    )
    settings = settings_of("hydra.sweeper.slots=auto")
    # In turns the first base has room for two slots.
    in_turns = {1: 2, 2: 6}
    for borrowed, expected in (
        ({1: 6, 2: 4}, (4, True)),
        ({1: 4}, (2, False)),
        ({}, (2, False)),
    ):

        def choose_slots(
            _: Any, config: Any, may_borrow: bool, borrowed: Any = borrowed
        ) -> SlotChoice:
            if may_borrow and config.seed in borrowed:
                return SlotChoice(borrowed[config.seed], config, True)
            return SlotChoice(in_turns[config.seed], config)

        monkeypatch.setattr(opening, "choose_slots", choose_slots)
        engine = opening._choose_engine(settings, configs)
        assert (engine.slots, engine.borrows_blocks) == expected


def test_jobs_of_several_bases_borrow_where_all_do(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.study import slot_count
    from sweeps.study.slot_count import SlotChoice

    configs = [tiny("seed=1"), tiny("seed=2")]
    # As if they had two bases.
    monkeypatch.setattr(slot_count, "base_key", lambda config: config.seed)

    def plan(_: Any, config: Any, may_borrow: bool, runs: int) -> SlotChoice:
        assert runs == 2
        if may_borrow and config.seed == 1:
            return SlotChoice(4, config, True)
        return SlotChoice(config.seed + 1, config)

    monkeypatch.setattr(slot_count, "_plan", plan)
    choice = slot_count.choose_job_slots("auto", configs)
    assert (choice.count, choice.borrows_blocks) == (2, False)


def test_confirm_borrows_as_its_study_did(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.run.resources import shared_resources
    from sweeps.study import repeats

    ways = []

    def train_together(*_: Any) -> None:
        ways.append(shared_resources._borrows_blocks)

    monkeypatch.setattr(repeats, "train_together", train_together)
    for attributes in ({"slots": 4, "borrows_blocks": True}, {"slots": 4}):
        study: Any = SimpleNamespace(optuna=SimpleNamespace(user_attrs=attributes))
        assert repeats.retrain(study, []) == {}
    assert ways == [True, False]


CHOOSES_FIRST = """
import runpy, sys
from finetune.model import device
select_gpus = device.select_gpus
def selecting(*arguments):
    print("bitsandbytes" in sys.modules, file=sys.stderr)
    select_gpus(*arguments)
device.select_gpus = selecting
sys.argv[0] = "finetune"
runpy.run_module("finetune", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sweeps", [True, False])
def test_gpus_are_chosen_before_bitsandbytes_looks_for_them(
    sweeps: bool, tiny_base: Path, tmp_path: Path
) -> None:
    overrides = study_overrides(tiny_base, "s") if sweeps else tiny_overrides(tiny_base)
    if sweeps:
        overrides += ["hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1"]
    command = [sys.executable, "-c", CHOOSES_FIRST, *overrides]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    # Only the first call in a process counts.
    answers = [line for line in ended.stderr.splitlines() if line in ("True", "False")]
    assert answers[0] == "False"
