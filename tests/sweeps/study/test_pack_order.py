"""Runs in slots: when they report, begin and end relative to each other."""

import threading
from pathlib import Path
from typing import Any

import pytest
from support.runs import SHORT, Alone, Tiny, final, losses, train_in_slots

from finetune.config.schema import RunConfig
from finetune.engine.observer import Observer, Rung
from finetune.run.resources import SharedResources


class Listens(Observer):
    """Writes down what it hears, and by whom; stops at one rung."""

    def __init__(
        self, number: int, heard: list[tuple[str, int, int]], stops_at: int | None
    ) -> None:
        self._number, self._heard, self._stops_at = number, heard, stops_at

    def on_rung(self, rung: Rung) -> None:
        self._heard.append(("report", rung.index, self._number))

    def should_prune(self, rung: Rung) -> bool:
        self._heard.append(("judge", rung.index, self._number))
        return rung.index == self._stops_at


def test_all_report_a_rung_before_any_is_judged_there(
    tiny: Tiny, tmp_path: Path
) -> None:
    heard: list[tuple[str, int, int]] = []
    observers = {
        0: Listens(0, heard, None),
        1: Listens(1, heard, 2),
        2: Listens(2, heard, None),
    }
    more = (
        *SHORT,
        "trainer.max_steps=6",
        "trainer.eval_steps=2",
        "trainer.per_device_eval_batch_size=2",
    )
    configs = [
        tiny(*more, f"lora.r={4 * number + 4}", f"seed={number}") for number in range(3)
    ]
    places = train_in_slots(configs, tmp_path, 3, observers=observers)

    assert [final(place)["status"] for place in places] == [
        "completed",
        "pruned",
        "completed",
    ]
    rungs = [(0, {0, 1, 2}), (1, {0, 1, 2}), (2, {0, 1, 2}), (3, {0, 2})]
    for index, who in rungs:
        for what in ("report", "judge"):
            now, heard = heard[: len(who)], heard[len(who) :]
            assert {(kind, rung) for kind, rung, _ in now} == {(what, index)}
            assert {number for _, _, number in now} == who
    assert heard == []


def test_runs_of_other_lengths_never_hold_each_other_up(
    tiny: Tiny, tmp_path: Path
) -> None:
    """One has its rungs between the others', one takes two batches a step; all have all of
    theirs."""
    heard: list[tuple[str, int, int]] = []
    more = (
        ("trainer.max_steps=3", "trainer.eval_steps=1"),
        ("trainer.gradient_accumulation_steps=2",),
        (),
    )
    configs = [tiny(*SHORT, "trainer.eval_steps=2", *job) for job in more]
    places = train_in_slots(
        configs, tmp_path, 3, observers={n: Listens(n, heard, None) for n in range(3)}
    )

    assert [final(place)["step"] for place in places] == [3, 5, 5]
    for number, rungs in enumerate((4, 4, 4)):
        own = [(kind, index) for kind, index, by in heard if by == number]
        assert own == [
            (kind, index) for index in range(rungs) for kind in ("report", "judge")
        ]


def test_others_train_on_while_a_late_runs_adapter_is_drawn(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.fresh_adapters import FreshAdapters

    learns, draws, takes, trained = (
        Bank.forward_backward,
        FreshAdapters.create,
        SharedResources.slot,
        threading.Event(),
    )

    def forward_backward(bank: Bank, requests: Any) -> Any:
        trained.set()
        return learns(bank, requests)

    def draw(adapters: FreshAdapters, lora: Any, seed: int) -> Any:
        assert seed != 2 or trained.wait(30), "nobody trains"
        return draws(adapters, lora, seed)

    def slot(resources: SharedResources, config: RunConfig) -> Any:
        trained.clear()
        return takes(resources, config)

    monkeypatch.setattr(SharedResources, "slot", slot)
    monkeypatch.setattr(Bank, "forward_backward", forward_backward)
    monkeypatch.setattr(FreshAdapters, "create", draw)
    configs = [
        tiny(*SHORT, f"trainer.max_steps={steps}", f"seed={n}")
        for n, steps in enumerate((15, 2, 2))
    ]
    places = train_in_slots(configs, tmp_path, 2)
    assert [final(place)["step"] for place in places] == [15, 2, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_runs_that_begin_together_measure_the_base_once(
    fails: bool,
    tiny: Tiny,
    alone: Alone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others wait for the first, and go on at the same time; where it fails the next one
    measures."""
    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.requests import ForwardBackward

    execute, response = Bank.execute, []

    def granting(bank: Bank, requests: Any, meanwhile: Any = None) -> Any:
        kinds = {
            "forward_backward" if isinstance(request, ForwardBackward) else "evaluate"
            for request in requests
        }
        response.append((len(requests), *sorted(kinds)))
        found = execute(bank, requests, meanwhile)
        return [ValueError("broken")] if fails and len(response) == 2 else found

    configs = [
        tiny(*SHORT, f"seed={seed}", "trainer.per_device_eval_batch_size=2")
        for seed in range(3)
    ]
    errors: dict[int, Exception] = {}
    with monkeypatch.context() as patched:
        patched.setattr(Bank, "execute", granting)
        places = train_in_slots(configs, tmp_path, 3, errors=errors)

    first = next(
        index for index, one in enumerate(response) if "forward_backward" in one
    )
    assert set(response[:first]) == {(1, "evaluate")}
    assert response[first] == (3 - fails, "forward_backward"), "not at the same time"
    assert [*errors] == [0] * fails
    for config, place in [*zip(configs, places, strict=True)][fails:]:
        assert losses(place) == pytest.approx(alone(config), rel=1e-5)
        assert final(place)["status"] == "completed"


def test_runs_begin_and_end_while_others_compute(
    tiny: Tiny, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What beginning and end take the host, a GPU need not wait for; so in each pass one begins."""
    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.bank_slots import BankSlots
    from finetune.files.atomic import write_json
    from finetune.run import train

    passes, current, seen = 0, 0, []
    execute, save, slot = Bank.execute, train.save_adapter, BankSlots.create

    def having_drawn(slots: BankSlots, lora: Any, seed: int, model: Any) -> Any:
        seen.append((str(seed), "is drawn", current))
        return slot(slots, lora, seed, model)

    def granting(bank: Bank, requests: Any, meanwhile: Any = None) -> Any:
        nonlocal passes, current
        passes += 1
        current = passes
        try:
            return execute(bank, requests, meanwhile)
        finally:
            current = 0

    def saving(model: Any, tokenizer: Any, folder: Path, *more: Any) -> None:
        seen.append((folder.parent.name, "ends", current))
        save(model, tokenizer, folder, *more)

    def writing(path: Path, content: Any) -> None:
        if path.name == "run.json":
            seen.append((path.parent.name, "begins", current))
        write_json(path, content)

    lengths = (20, 3, 3, 2, 2)
    configs = [
        tiny(*SHORT, f"seed={seed}", f"trainer.max_steps={steps}")
        for seed, steps in enumerate(lengths)
    ]
    with monkeypatch.context() as patched:
        patched.setattr(Bank, "execute", granting)
        patched.setattr(BankSlots, "create", having_drawn)
        patched.setattr(train, "save_adapter", saving)
        patched.setattr("finetune.run.run.write_json", writing)
        places = train_in_slots(configs, tmp_path, 3)

    at = {(name, what): number for name, what, number in seen}
    assert [at[name, "begins"] for name in "012"] == [0, 0, 0], (
        "there was nobody to train meanwhile"
    )
    ended = at["1", "ends"]
    assert ended == at["2", "ends"] > 0
    assert at["4", "begins"] == at["3", "begins"] + 1 == at["3", "is drawn"] > ended + 1
    names = [(name, what) for name, what, _ in seen]
    assert names.index(("4", "begins")) < names.index(("3", "is drawn")), (
        "it is drawn while the next one begins"
    )
    assert at["4", "ends"] == at["3", "ends"] + 1
    assert [name for name, what, _ in seen if what == "ends"] == [*"12340"]
    for config, place in zip(configs, places, strict=True):
        assert losses(place) == pytest.approx(alone(config), rel=1e-5)
