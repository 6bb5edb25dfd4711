"""Runs that share a base, rows and tokens are the runs alone, bit for bit, and leave no memory
behind."""

import contextlib
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import train_in_slots

from finetune.config.schema import RunConfig
from finetune.engine.observer import Observer
from finetune.run.context import RunContext
from finetune.run.resources import SharedResources
from finetune.run.run import run

Tiny = Callable[..., RunConfig]


FEW = ("trainer.max_steps=3", "dataset.max_length=64", "sample_prompts=[]")
RUN = (*FEW, "lora.dropout=0.1", "lora.r=4", "lora/target=attention", "seed=3")


def left_by(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The adapter, and all that was logged while it was trained, but for the clock's."""
    rows = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    logged = [
        {
            name: value
            for name, value in row.items()
            if name != "train/tokens_per_second"
        }
        for row in rows
    ]
    training = [
        row
        for row in logged
        if "test/loss" not in row and "adapter/parameters" not in row
    ]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), training


class Breaks(Observer):
    """Fails in the midst of training."""

    def on_step(self, step: int) -> bool:
        raise RuntimeError("broken")


class Prunes(Observer):
    def on_step(self, step: int) -> bool:
        return True


Alone = Callable[[RunConfig], Any]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """What a run alone leaves; each is run once."""
    known: dict[str, Any] = {}

    def find(config: RunConfig) -> Any:
        key = json.dumps(config.to_dict())
        if key not in known:
            folder = tmp_path_factory.mktemp("alone")
            run(config, folder)
            known[key] = left_by(folder)
        return known[key]

    return find


NF4, NONE = "quantization=nf4", "quantization=none"
WILD = "optimizer.learning_rate=0.05"


@pytest.mark.parametrize(
    ("base", "before"),
    [
        (NF4, ("lora.r=16", "lora.dropout=0.3", WILD, "seed=0")),
        (NONE, ("lora.bias=all", WILD)),
    ],
    ids=str,
)
def test_a_run_after_another_is_the_run_alone(
    base: str, before: tuple[str, ...], tiny: Tiny, alone: Alone, tmp_path: Path
) -> None:
    resources = SharedResources()
    run(
        tiny(*FEW, base, *before),
        tmp_path / "before",
        RunContext(resources=resources, interactive=False),
    )
    run(
        tiny(*RUN, base),
        tmp_path / "after",
        RunContext(resources=resources, interactive=False),
    )

    assert left_by(tmp_path / "after") == alone(tiny(*RUN, base))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "before"),
    [
        (NONE, ("lora.r=16", "lora.dropout=0.3", WILD, "seed=0")),
        (NF4, ("lora.init_lora_weights=gaussian", "lora.use_rslora=true")),
        (NF4, ("lora.init_lora_weights=false",)),
        (NF4, ("lora.use_dora=true", WILD)),
        (NONE, ("lora.init_lora_weights=pissa", WILD)),
        (NF4, ("trainer.gradient_checkpointing=true",)),
        (
            NF4,
            (
                "trainer.group_by_length=true",
                "trainer.per_device_train_batch_size=2",
                "objective_at=best",
            ),
        ),
        (NF4, ("dataset.limit=8", "dataset.max_length=32")),
        (NF4, (NONE,)),
        (NONE, ("++lora.extra.modules_to_save=[norm]", WILD)),
    ],
    ids=str,
)
def test_a_run_after_any_other_is_the_run_alone(
    base: str, before: tuple[str, ...], tiny: Tiny, alone: Alone, tmp_path: Path
) -> None:
    test_a_run_after_another_is_the_run_alone(base, before, tiny, alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        "lora.bias=all",
        "lora.init_lora_weights=pissa",
        "lora.init_lora_weights=false",
        "lora.use_dora=true",
    ],
)
def test_a_run_that_begins_elsewhere_than_its_base_is_the_run_alone(
    lora: str, tiny: Tiny, alone: Alone, tmp_path: Path
) -> None:
    resources = SharedResources()
    run(
        tiny(*FEW, NONE, WILD),
        tmp_path / "before",
        RunContext(resources=resources, interactive=False),
    )
    run(
        tiny(*FEW, NONE, lora),
        tmp_path / "after",
        RunContext(resources=resources, interactive=False),
    )

    assert left_by(tmp_path / "after") == alone(tiny(*FEW, NONE, lora))


@pytest.mark.slow
@pytest.mark.parametrize("observer", [Breaks(), Prunes()], ids=["broken", "pruned"])
def test_a_run_after_one_that_was_cut_short_is_the_run_alone(
    observer: Observer, tiny: Tiny, alone: Alone, tmp_path: Path
) -> None:
    resources = SharedResources()
    with contextlib.suppress(RuntimeError):
        run(
            tiny(*FEW, NF4, WILD),
            tmp_path / "before",
            RunContext(observer, resources, interactive=False),
        )
    run(
        tiny(*RUN, NF4),
        tmp_path / "after",
        RunContext(resources=resources, interactive=False),
    )

    assert left_by(tmp_path / "after") == alone(tiny(*RUN, NF4))


def test_the_base_is_loaded_and_measured_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.run.resources as run_resources
    from finetune.engine import loaded_model as trl_engine
    from finetune.engine.packed import bank
    from finetune.model import loading as base

    calls: list[str] = []

    def count_calls(owner: Any, name: str, counted_as: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            calls.append(counted_as)
            return real(*arguments, **more)

        monkeypatch.setattr(owner, name, call)

    count_calls(base, "load_base", "load")
    count_calls(run_resources, "tokenize", "tokenize")
    count_calls(bank.Bank, "evaluate", "evaluate packed")
    count_calls(trl_engine, "evaluate", "evaluate trl")
    resources = SharedResources()
    held_out = len(resources.rows(tiny(*FEW).dataset).evaluation)
    for name, engine, rank in (
        ("one", "packed", 4),
        ("two", "packed", 8),
        ("three", "trl", 4),
        ("four", "trl", 8),
    ):
        more = (
            f"trainer.per_device_eval_batch_size={held_out}",
            "trainer.eval_steps=3",
            f"trainer.engine={engine}",
        )
        config = tiny(*FEW, NF4, f"lora.r={rank}", *more)
        run(
            config,
            tmp_path / name,
            RunContext(
                resources=resources, interactive=False, evaluate_test_rows=False
            ),
        )

    assert calls.count("load") == 1
    assert calls.count("tokenize") == 3
    assert calls.count("evaluate packed") == 3, (
        "the base once, each run once at its end"
    )
    assert calls.count("evaluate trl") == 3, "so too by the other engine"


@pytest.mark.parametrize(
    ("lora", "stays"), [("lora.bias=all", False), ("lora.bias=none", True)]
)
def test_a_base_that_a_run_has_changed_is_let_go(
    lora: str, stays: bool, tiny: Tiny, tmp_path: Path
) -> None:
    resources = SharedResources()
    config = tiny(*FEW, NONE, "trainer.engine=auto", lora)
    run(config, tmp_path, RunContext(resources=resources, interactive=False))
    assert (resources.loaded_bank() is not None) is stays


LEFT_AT_THE_END = """
import os
from finetune.model.memory import freeze_libraries

class Log:
    def __init__(self, name):
        self.file = open(name, "w")
        self.file.write(name)
        self.write = self.write_line  # a cycle
    def write_line(self):
        pass
    def __del__(self, write=os.write):
        write(1, b"visited")

before = Log("before")
freeze_libraries()
after = Log("after")
"""


def test_the_end_of_a_process_visits_nothing_and_loses_nothing(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", LEFT_AT_THE_END],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert shown.stdout == shown.stderr == b""
    for name in ("before", "after"):
        assert (tmp_path / name).read_text() == name


def test_what_is_let_go_leaves_memory(tiny: Tiny) -> None:
    """A base while it is kept, and no longer; the libraries are out of the garbage collector's
    sight all the time."""
    from finetune.model.memory import free_memory, unfreeze_libraries

    unfreeze_libraries()
    assert gc.get_freeze_count() == 0
    resources, config = SharedResources(), tiny(*RUN)
    with resources.slot(config) as place:
        model = weakref.ref(place().model)
    base = weakref.ref(resources.bank(config).base)
    del place
    gc.collect()
    assert base() is not None
    del resources
    free_memory()
    assert base() is None
    assert model() is None
    assert gc.get_freeze_count() > 100_000


def test_a_slot_leaves_memory_when_it_ends(tiny: Tiny, monkeypatch: Any) -> None:
    """No collection visits the adapters of other slots; one does where the slot is in a cycle."""
    resources, config = SharedResources(), tiny(*RUN)
    resources.bank(config)
    collections: list[int] = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda: collections.append(collect()))
    for is_in_cycle in (False, True, False):
        gc.disable()
        try:
            with resources.slot(config) as place:
                slot = place()
                memory = weakref.ref(slot.vector.untyped_storage())
                model, vector = slot.model, weakref.ref(slot.vector)
                if is_in_cycle:
                    slot.itself = slot
                del slot
        finally:
            gc.enable()
        assert vector() is None
        assert memory() is None
        # Its modules are left to a later slot.
        assert {w.numel() for w in model.parameters() if w.requires_grad} == {0}
        assert len(collections) == is_in_cycle
        collections.clear()


def test_the_slots_of_a_pack_leave_memory_by_themselves(
    tiny: Tiny, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also where a run's last request is an evaluation of test rows."""
    configs = [tiny(*RUN, "dataset.test_fraction=0.2", f"seed={n}") for n in range(4)]
    resources = SharedResources()
    resources.bank(configs[0])
    collections: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: collections.append(1))
    gc.disable()
    try:
        train_in_slots(configs, tmp_path, 2, resources)
        run(configs[0], tmp_path / "alone", RunContext(resources=resources))
    finally:
        gc.enable()
    assert not collections
