"""Runs that train together: what one lacks or breaks is its own, they judge at the same time, and each is itself."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from support.commands import Station
from support.configs import study_overrides, tiny_overrides
from support.runs import final, losses, train_in_slots, write_jsonl
from support.wandb_log import wandb_files, wandb_history

from finetune.config.schema import RunConfig
from finetune.engine.observer import Observer, Rung
from finetune.errors import ConfigError
from finetune.run.context import RunContext
from finetune.run.resources import SharedResources
from finetune.run.run import run
from sweeps.study.study import FINISHED, Study

Tiny = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = (
    "trainer.max_steps=5",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[]",
    "trainer.per_device_train_batch_size=2",
    "dataset.max_length=64",
)


@pytest.fixture
def alone(tmp_path: Path) -> Callable[[RunConfig], list[float]]:
    """The losses of a run that nobody trains beside."""

    def train(config: RunConfig) -> list[float]:
        folder = tmp_path / "alone" / str(len(list(tmp_path.glob("alone/*"))))
        run(config, folder, RunContext(interactive=False))
        return losses(folder)

    return train


Alone = Callable[[RunConfig], list[float]]


# Memory, and errors


@pytest.mark.parametrize(
    ("what", "slots"),
    [
        pytest.param(what, slots, marks=() if (what, slots) == ("forward_backward", 5) else pytest.mark.slow)
        for what in ("forward_backward", "evaluate")
        for slots in (4, 5)
    ],
)
def test_too_little_memory_makes_the_pack_smaller_and_loses_no_run(
    what: str, slots: int, tiny: Tiny, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from finetune.engine.packed.bank import Bank

    real, sizes = getattr(Bank, what), []

    def small(bank: Bank, requests: Any) -> Any:
        sizes.append(len(requests))
        if len(requests) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(bank, requests)

    configs = [tiny(*SHORT, f"seed={seed}", "lora.dropout=0.1", f"lora.r={seed + 2}") for seed in range(slots + 3)]
    resources = SharedResources()
    with monkeypatch.context() as patched:
        patched.setattr(Bank, what, small)
        places = train_in_slots(configs, tmp_path, slots, resources)

    assert resources.bank(configs[0]).capacity == 2, "not what memory has room for"
    assert [size for size in sizes if size > 2] == [slots], "tried again and again"
    assert [final(place)["status"] for place in places] == ["completed"] * len(configs)
    later = [str(number) for number in range(slots, slots + 3)]
    assert final(places[slots])["companions"] == later[1:2], "more have begun than there is memory for"
    for config, place in zip(configs, places, strict=True):
        assert losses(place) == pytest.approx(alone(config), rel=1e-5)


def test_memory_that_is_too_small_for_one_is_that_ones_error(
    tiny: Tiny, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large batch of one run fits into no pack, nor alone; the others' do."""
    import torch

    from finetune.engine.packed.bank import Bank

    real = Bank.forward_backward

    def small(bank: Bank, requests: Any) -> Any:
        if sum(len(request.rows) for request in requests) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(bank, requests)

    sizes = (2, 8, 3)
    configs = [tiny(*SHORT, f"trainer.per_device_train_batch_size={size}") for size in sizes]
    errors: dict[int, Exception] = {}
    with monkeypatch.context() as patched:
        patched.setattr(Bank, "forward_backward", small)
        places = train_in_slots(configs, tmp_path, 3, errors=errors)

    assert [*errors] == [1]
    assert isinstance(errors[1], torch.OutOfMemoryError)
    assert "out of memory" in final(places[1])["error"]
    for number in (0, 2):
        assert losses(places[number]) == pytest.approx(alone(configs[number]), rel=1e-5)


@pytest.mark.parametrize("when", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_error_in_one_runs_batch_reaches_that_run_alone(
    when: int, tiny: Tiny, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.engine.packed.bank import Bank

    real = Bank.forward_backward

    def breaks(bank: Bank, requests: Any) -> Any:
        if any(request.slot.seed == 1 and request.dropout_step == when for request in requests):
            real(bank, requests)  # as far as to the gradients
            raise ValueError("index out of range")
        return real(bank, requests)

    configs = [tiny(*SHORT, f"seed={seed}", "lora.dropout=0.2") for seed in range(4)]
    errors: dict[int, Exception] = {}
    resources = SharedResources()
    with monkeypatch.context() as patched:
        patched.setattr(Bank, "forward_backward", breaks)
        places = train_in_slots(configs, tmp_path, 3, resources, errors=errors)

    assert {number: str(error) for number, error in errors.items()} == {1: "index out of range"}
    assert [final(place)["status"] for place in places] == ["completed", "failed", "completed", "completed"]
    assert final(places[1])["step"] == when - 1
    assert final(places[3])["companions"] == ["0", "2"], "the slot that is free takes the next run at once"
    assert resources.bank(configs[0]).capacity is None
    for number in (0, 2, 3):
        assert losses(places[number]) == pytest.approx(alone(configs[number]), rel=1e-5)


# Runs that can't train together


class Careful(SharedResources):
    """SharedResources that let go of no base on which runs train."""

    def drop(self, kind: str) -> None:
        bank = self._kept.get(kind, (None, None))[1]
        assert kind != "bank" or bank is None or not bank.slots_in_use
        super().drop(kind)


NONE, NF4, TRL, PACKED = "quantization=none", "quantization=nf4", "trainer.engine=trl", "trainer.engine=packed"


@pytest.mark.parametrize(
    "jobs",
    [
        ((NONE,), (NF4,), (NONE,)),
        ((TRL,), (PACKED,), (TRL, "seed=1")),
        *(
            pytest.param(jobs, marks=pytest.mark.slow)
            for jobs in (
                ((TRL,), (TRL, "lora.r=4")),
                ((PACKED,), (TRL,), (PACKED, "seed=1")),
                ((NF4, "trainer.gradient_checkpointing=true"), (NONE, TRL), (NF4,), (NONE, PACKED), (NF4, TRL)),
                ((TRL, "lora.bias=all"), (PACKED,), (TRL,)),
            )
        ),
    ],
    ids=lambda jobs: "_".join(",".join(job) for job in jobs),
)
def test_runs_that_cannot_share_a_base_wait_for_each_other(
    jobs: tuple[tuple[str, ...], ...], tiny: Tiny, alone: Alone, tmp_path: Path
) -> None:
    configs = [tiny(*SHORT, *job) for job in jobs]
    places = train_in_slots(configs, tmp_path, 3, Careful())
    for config, place in zip(configs, places, strict=True):
        assert final(place)["status"] == "completed"
        assert losses(place) == pytest.approx(alone(config), rel=1e-5)
        assert final(place)["metrics"]["eval/loss"] < final(place)["metrics"]["train/loss"] + 1


# Rungs


class Listens(Observer):
    """Writes down what it hears, and by whom; stops at one rung."""

    def __init__(self, number: int, heard: list[tuple[str, int, int]], stops_at: int | None) -> None:
        self._number, self._heard, self._stops_at = number, heard, stops_at

    def on_rung(self, rung: Rung) -> None:
        self._heard.append(("report", rung.index, self._number))

    def judge(self, rung: Rung) -> bool:
        self._heard.append(("judge", rung.index, self._number))
        return rung.index == self._stops_at


def test_all_report_a_rung_before_any_is_judged_there(tiny: Tiny, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    observers = {0: Listens(0, heard, None), 1: Listens(1, heard, 2), 2: Listens(2, heard, None)}
    more = (*SHORT, "trainer.max_steps=6", "trainer.eval_steps=2", "trainer.per_device_eval_batch_size=2")
    configs = [tiny(*more, f"lora.r={4 * number + 4}", f"seed={number}") for number in range(3)]
    places = train_in_slots(configs, tmp_path, 3, observers=observers)

    assert [final(place)["status"] for place in places] == ["completed", "pruned", "completed"]
    rungs = [(0, {0, 1, 2}), (1, {0, 1, 2}), (2, {0, 1, 2}), (3, {0, 2})]
    for index, who in rungs:
        for what in ("report", "judge"):
            now, heard = heard[: len(who)], heard[len(who) :]
            assert {(kind, rung) for kind, rung, _ in now} == {(what, index)}
            assert {number for _, _, number in now} == who
    assert heard == []


def test_runs_of_other_lengths_never_hold_each_other_up(tiny: Tiny, tmp_path: Path) -> None:
    """One has its rungs between the others', one takes two batches a step; all have all of theirs."""
    heard: list[tuple[str, int, int]] = []
    more = (("trainer.max_steps=3", "trainer.eval_steps=1"), ("trainer.gradient_accumulation_steps=2",), ())
    configs = [tiny(*SHORT, "trainer.eval_steps=2", *job) for job in more]
    places = train_in_slots(configs, tmp_path, 3, observers={n: Listens(n, heard, None) for n in range(3)})

    assert [final(place)["step"] for place in places] == [3, 5, 5]
    for number, rungs in enumerate((4, 4, 4)):
        own = [(kind, index) for kind, index, by in heard if by == number]
        assert own == [(kind, index) for index in range(rungs) for kind in ("report", "judge")]


def test_others_train_on_while_a_late_runs_adapter_is_drawn(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.engine.packed.bank import Bank

    learns, draws, takes, trained = Bank.forward_backward, Bank.draw_adapter, SharedResources.slot, threading.Event()

    def forward_backward(bank: Bank, requests: Any) -> Any:
        trained.set()
        return learns(bank, requests)

    def draw(bank: Bank, lora: Any, seed: int) -> Any:
        assert seed != 2 or trained.wait(30), "nobody trains"
        return draws(bank, lora, seed)

    def slot(resources: SharedResources, config: RunConfig) -> Any:
        trained.clear()
        return takes(resources, config)

    monkeypatch.setattr(SharedResources, "slot", slot)
    monkeypatch.setattr(Bank, "forward_backward", forward_backward)
    monkeypatch.setattr(Bank, "draw_adapter", draw)
    configs = [tiny(*SHORT, f"trainer.max_steps={steps}", f"seed={n}") for n, steps in enumerate((15, 2, 2))]
    places = train_in_slots(configs, tmp_path, 2)
    assert [final(place)["step"] for place in places] == [15, 2, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_runs_that_begin_together_measure_the_base_once(
    fails: bool, tiny: Tiny, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for the first, and go on at the same time; where it fails the next one measures."""
    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.requests import ForwardBackward

    execute, response = Bank.execute, []

    def granting(bank: Bank, requests: Any, meanwhile: Any = None) -> Any:
        kinds = {"forward_backward" if isinstance(request, ForwardBackward) else "evaluate" for request in requests}
        response.append((len(requests), *sorted(kinds)))
        found = execute(bank, requests, meanwhile)
        return [ValueError("broken")] if fails and len(response) == 2 else found

    configs = [tiny(*SHORT, f"seed={seed}", "trainer.per_device_eval_batch_size=2") for seed in range(3)]
    errors: dict[int, Exception] = {}
    with monkeypatch.context() as patched:
        patched.setattr(Bank, "execute", granting)
        places = train_in_slots(configs, tmp_path, 3, errors=errors)

    first = next(index for index, one in enumerate(response) if "forward_backward" in one)
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
    from finetune.files.atomic import write_json
    from finetune.model import loading as base

    passes, current, seen = 0, 0, []
    execute, save, slot = Bank.execute, base.save_adapter, Bank.create_slot

    def having_drawn(bank: Bank, lora: Any, seed: int, model: Any) -> Any:
        seen.append((str(seed), "is drawn", current))
        return slot(bank, lora, seed, model)

    def granting(bank: Bank, requests: Any, meanwhile: Any = None) -> Any:
        nonlocal passes, current
        passes += 1
        current = passes
        try:
            return execute(bank, requests, meanwhile)
        finally:
            current = 0

    def saving(model: Any, tokenizer: Any, folder: Path) -> None:
        seen.append((folder.parent.name, "ends", current))
        save(model, tokenizer, folder)

    def writing(path: Path, content: Any) -> None:
        if path.name == "run.json":
            seen.append((path.parent.name, "begins", current))
        write_json(path, content)

    lengths = (20, 3, 3, 2, 2)
    configs = [tiny(*SHORT, f"seed={seed}", f"trainer.max_steps={steps}") for seed, steps in enumerate(lengths)]
    with monkeypatch.context() as patched:
        patched.setattr(Bank, "execute", granting)
        patched.setattr(Bank, "create_slot", having_drawn)
        patched.setattr(base, "save_adapter", saving)
        patched.setattr("finetune.run.run.write_json", writing)
        places = train_in_slots(configs, tmp_path, 3)

    at = {(name, what): number for name, what, number in seen}
    assert [at[name, "begins"] for name in "012"] == [0, 0, 0], "there was nobody to train meanwhile"
    ended = at["1", "ends"]
    assert ended == at["2", "ends"] > 0
    assert at["4", "begins"] == at["3", "begins"] + 1 == at["3", "is drawn"] > ended + 1
    names = [(name, what) for name, what, _ in seen]
    assert names.index(("4", "begins")) < names.index(("3", "is drawn")), "it is drawn while the next one begins"
    assert at["4", "ends"] == at["3", "ends"] + 1
    assert [name for name, what, _ in seen if what == "ends"] == [*"12340"]
    for config, place in zip(configs, places, strict=True):
        assert losses(place) == pytest.approx(alone(config), rel=1e-5)


def test_what_fails_between_two_runs_is_said_and_not_taken_for_a_batchs_error(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a storage that is gone when the next run is to be taken."""
    from finetune.engine.packed.bank import Bank
    from finetune.files.run_folder import RunFolder
    from finetune.run.run import run_steps
    from sweeps.study.pack import PackedRun, train_together

    works = iter([9, 2, OSError("the storage is gone")])
    real, batches, resources = Bank.forward_backward, [], SharedResources()

    def forward_backward(bank: Bank, requests: Any) -> Any:
        batches.extend((id(request.slot), request.dropout_step) for request in requests)
        bank._let_the_host_work()  # as where a GPU computes
        return real(bank, requests)

    def take() -> PackedRun | None:
        steps = next(works, None)
        if not isinstance(steps, int):
            if steps is not None:
                raise steps
            return None
        folder = RunFolder(tmp_path / str(steps))
        config = tiny(*SHORT, f"trainer.max_steps={steps}")
        work = run_steps(config, folder, RunContext(resources=resources, interactive=False, evaluate_test_rows=False))
        return PackedRun(folder.path.name, work, tmp_path / "log", set())

    monkeypatch.setattr(Bank, "forward_backward", forward_backward)
    with pytest.raises(OSError, match="the storage is gone"):
        train_together(take, 2)
    assert len(batches) > 4
    assert len(set(batches)) == len(batches), "a batch was tried again"
    assert final(tmp_path / "9")["status"] == "interrupted"
    assert final(tmp_path / "2")["status"] == "completed"


def test_nothing_changes_the_default_dtype_while_adapters_are_drawn(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch has one for all threads, and transformers sets it to the base's own where a model is built."""
    import torch

    base = shutil.copytree(tiny_base, tmp_path / "bfloat16")
    shapes = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**shapes, "dtype": "bfloat16"}))
    sets, takes = torch.set_default_dtype, SharedResources.slot
    seen: list[torch.dtype] = []

    def slot(resources: SharedResources, config: RunConfig) -> Any:
        monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: (seen.append(dtype), sets(dtype)))
        return takes(resources, config)

    monkeypatch.setattr(SharedResources, "slot", slot)
    configs = [tiny(*SHORT, f"model.name_or_path={base}", "lora/target=q_v", f"seed={n}") for n in range(2)]
    train_in_slots(configs, tmp_path / "runs", 2)
    assert set(seen) == {torch.float32}


def test_a_result_tells_the_engine_the_slots_and_who_trained_beside(tiny: Tiny, tmp_path: Path) -> None:
    configs = [tiny(*SHORT, f"trainer.max_steps={steps}") for steps in (2, 5, 5, 2)]
    places = train_in_slots(configs, tmp_path, 2)
    told = [{key: final(place)[key] for key in ("engine", "slots", "companions")} for place in places]
    assert told == [
        {"engine": "packed", "slots": 2, "companions": packed_with}
        for packed_with in (["1"], ["0", "2"], ["1", "3"], ["2"])
    ]


# Numbers: other bases, shared beginnings, dropout


def models() -> dict[str, tuple[str, dict[str, Any]]]:
    """Architectures by name: their classes' prefix, and what is peculiar to each."""
    return {
        "mistral": ("Mistral", {"sliding_window": 8}),
        "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
        "llama3": (
            "Llama",
            {
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
        ),
    }


def make_base(name: str, tiny_base: Path, folder: Path) -> Path:
    """A base of two layers whose weights, norms and biases too, are random."""
    import torch
    import transformers

    prefix, peculiar = models()[name]
    common = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**common, **ids, **peculiar)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", list(models()))
def test_equals_trl_on_other_architectures(name: str, tiny: Tiny, tiny_base: Path, tmp_path: Path) -> None:
    """Sliding windows shorter than the rows, biases, norms of queries and keys, layers without positions."""
    base = make_base(name, tiny_base, tmp_path / "base")
    for engine in ("trl", "packed"):
        more = (f"model.name_or_path={base}", NONE, "trainer.max_steps=10", f"trainer.engine={engine}")
        run(
            tiny(*SHORT, *more, "trainer.per_device_train_batch_size=3"),
            tmp_path / engine,
            RunContext(interactive=False),
        )
    theirs, ours = losses(tmp_path / "trl"), losses(tmp_path / "packed")
    assert len(ours) == 10
    assert ours == pytest.approx(theirs, rel=1e-5)
    there, here = (final(tmp_path / engine)["metrics"] for engine in ("trl", "packed"))
    assert here["eval/loss"] == pytest.approx(there["eval/loss"], rel=1e-5)
    assert here["eval/accuracy"] == there["eval/accuracy"]


@pytest.mark.parametrize(
    "quantization", ["int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp4", "nf4_double"))]
)
def test_equals_itself_alone_on_other_quantizations(
    quantization: str, tiny: Tiny, alone: Alone, tmp_path: Path
) -> None:
    configs = [
        tiny(*SHORT, f"quantization={quantization}", f"seed={seed}", f"lora.dropout={seed / 10}") for seed in range(3)
    ]
    for config, place in zip(configs, train_in_slots(configs, tmp_path, 3), strict=True):
        assert losses(place) == pytest.approx(alone(config), rel=1e-5)


@pytest.mark.parametrize(
    "quantization", ["nf4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "int8"))]
)
def test_recomputed_activations_give_the_same_losses(quantization: str, tiny: Tiny, tmp_path: Path) -> None:
    found = []
    for checkpointing in ("true", "false"):
        more = (f"trainer.gradient_checkpointing={checkpointing}", f"quantization={quantization}", "lora.dropout=0.2")
        configs = [tiny(*SHORT, *more, f"seed={seed}") for seed in range(2)]
        found.append([losses(place) for place in train_in_slots(configs, tmp_path / checkpointing, 2)])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_rows_that_begin_alike_equal_trl(tiny: Tiny, tmp_path: Path) -> None:
    """The same question in all rows, and answers that begin alike: of these no token may go missing."""
    answers = [f"The answer is {'so ' * (number % 5)}{number}." for number in range(30)]
    question = "What is the meaning of this rather long question, which all the rows have in common?"
    rows = [{"prompt": question, "completion": answer} for answer in answers]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    held_out = (f"dataset.path={data}", "dataset.eval_fraction=0.2")
    for engine in ("trl", "packed"):
        more = (*held_out, NONE, "trainer.per_device_train_batch_size=4", f"trainer.engine={engine}")
        run(tiny(*SHORT, *more, "trainer.max_steps=10"), tmp_path / engine, RunContext(interactive=False))
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "trl"), rel=1e-5)
    there, here = (final(tmp_path / engine)["metrics"] for engine in ("trl", "packed"))
    assert here["eval/loss"] == pytest.approx(there["eval/loss"], rel=1e-5)
    assert here["eval/accuracy"] == there["eval/accuracy"]


SCHEDULES = [
    "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "constant",
    "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_trls(schedule: str, tiny: Tiny, tmp_path: Path) -> None:
    kwargs = {"cosine_with_min_lr": "{min_lr_rate:0.1}", "warmup_stable_decay": "{num_decay_steps:3}"}
    given = [f"++trainer.extra.lr_scheduler_kwargs={kwargs[schedule]}"] if schedule in kwargs else []
    rates = []
    for engine in ("trl", "packed"):
        more = (f"optimizer.lr_scheduler_type={schedule}", "optimizer.warmup_ratio=0.25", f"trainer.engine={engine}")
        run(tiny(*SHORT, *more, *given, "trainer.max_steps=9"), tmp_path / engine, RunContext(interactive=False))
        rows = [json.loads(line) for line in (tmp_path / engine / "metrics.jsonl").read_text().splitlines()]
        rates.append([row["train/learning_rate"] for row in rows if "train/learning_rate" in row])
    assert rates[1] == pytest.approx(rates[0], rel=1e-12)
    assert len(rates[1]) == 9
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "trl"), rel=1e-5)


def test_dropout_is_drawn_by_the_runs_seed_and_its_batch(tiny: Tiny) -> None:
    """Neither by its place in the pack nor by anything that was drawn before."""
    import torch

    from finetune.engine.packed.requests import ForwardBackward

    config = tiny("lora.dropout=0.5", "lora.init_lora_weights=false", NONE)
    resources = SharedResources()
    bank = resources.bank(config)
    rows = resources.tokens("train", resources.rows(config.dataset).train, config).to_list()[:2]
    slots = [bank.create_slot(config.lora, seed) for seed in range(3)]
    for slot in slots[1:]:
        slot.vector.copy_(slots[0].vector)
        slot.round()

    def loss(seed: int, draw: int) -> float:
        torch.rand(1)
        return bank.forward_backward([ForwardBackward(slots[seed], rows, 1.0, draw)])[0].loss

    every = [loss(seed, draw) for seed in range(3) for draw in (1, 2, 3)]
    assert len(set(every)) == 9
    assert [loss(seed, draw) for seed in range(3) for draw in (1, 2, 3)] == every
    packed = bank.forward_backward([ForwardBackward(slot, rows, 1.0, 2) for slot in reversed(slots)])
    assert [learnt.loss for learnt in packed] == pytest.approx([loss(seed, 2) for seed in (2, 1, 0)], rel=1e-5)


def test_dropout_leaves_what_an_adapter_adds_as_it_is_on_average() -> None:
    import torch

    from finetune.engine.packed.lora_linear import Adapter, SlotTokens, lora_linear

    class Slot:
        seed = 3
        dropout = 0.0

    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 4, bias=False).requires_grad_(False)
    a, b = torch.rand(2, 32), torch.rand(4, 2)
    adapter = Adapter(0, 0.5, a, b, torch.zeros_like(a), torch.zeros_like(b))
    x = torch.rand(1, 1, 32).expand(1, 4000, 32)
    found = {}
    for Slot.dropout in (0.0, 0.25, 0.5):
        stretch: Any = SlotTokens(Slot(), adapter, 0, 4000, 1)  # type: ignore[arg-type]
        added = lora_linear(x, torch.zeros((), requires_grad=True), None, layer, [stretch]) - layer(x)
        found[Slot.dropout] = added[0].detach()
    assert torch.allclose(found[0.0], 0.5 * x[0] @ a.t() @ b.t(), rtol=1e-4)
    for dropout in (0.25, 0.5):
        assert torch.allclose(found[dropout].mean(0), found[0.0].mean(0), rtol=0.02)
        assert float(found[dropout].std(0).min()) > 0.05


def test_each_layer_draws_dropout_of_its_own(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from finetune.engine.packed.requests import ForwardBackward

    seeds: list[int] = []

    class Telling(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            seeds.append(seed)
            return super().manual_seed(seed)

    config = tiny("lora.dropout=0.5", NONE)
    resources = SharedResources()
    slots = [resources.bank(config).create_slot(config.lora, seed) for seed in (0, 2**32 - 1)]
    rows = resources.tokens("train", resources.rows(config.dataset).train, config).to_list()[:2]
    monkeypatch.setattr(torch, "Generator", Telling)
    for draw in (1, 2):
        slots[0].bank.forward_backward([ForwardBackward(slot, rows, 1.0, draw) for slot in slots])
    assert len(set(seeds)) == 2 * 2 * len(slots[0].adapters)


# The engine


UNSUPPORTED = {
    "lora.use_dora=true": ("lora.use_dora=true",),
    "lora.bias=all": ("lora.bias=all",),
    "lora.init_lora_weights=pissa": ("lora.init_lora_weights=pissa", NONE),
    "lora.extra={'lora_bias': True}": ("+lora.extra.lora_bias=true",),
    "lora.target_modules=['lm_head', 'q_proj'] (with the head)": ("lora.target_modules=[lm_head,q_proj]",),
    "lora.target_modules=.*(head|q_proj) (with the head)": ("lora.target_modules='.*(head|q_proj)'",),
    "optimizer.name=adamw_8bit": ("optimizer=adamw_8bit",),
    "optimizer.name=lion_32bit": ("optimizer.name=lion_32bit",),
    "dataset.packing=true": ("dataset.packing=true",),
    "trainer.extra={'neftune_noise_alpha': 5}": ("+trainer.extra.neftune_noise_alpha=5",),
    "model.attn_implementation=eager": ("model.attn_implementation=eager",),
    "model.extra={'num_hidden_layers': 1}": ("+model.extra.num_hidden_layers=1",),
    "quantization.bnb_4bit_compute_dtype=float16": ("quantization.bnb_4bit_compute_dtype=float16",),
    "model.dtype=bfloat16": ("model.dtype=bfloat16", NONE),
}


@pytest.mark.parametrize(("reason", "overrides"), UNSUPPORTED.items(), ids=list(UNSUPPORTED))
def test_what_is_not_for_the_packed_engine_is_trls_and_said(
    reason: str, overrides: tuple[str, ...], tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base

    source = find_base(tiny().model)
    with caplog.at_level("INFO"):
        assert choose_engine(tiny(*overrides, "trainer.engine=trl"), source) == "trl"
        assert caplog.messages == []
        assert choose_engine(tiny(*overrides, "trainer.engine=auto"), source) == "trl"
    (line,) = caplog.messages
    assert line.startswith(f"engine: trl, as packed does not do {reason}")
    with pytest.raises(ConfigError) as refused:
        choose_engine(tiny(*overrides, "trainer.engine=packed"), source)
    assert str(refused.value).startswith(f"trainer.engine=packed: does not do {reason}")
    assert str(refused.value).endswith("; allowed: auto, trl")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (NONE,),
        ("quantization=int8",),
        ("optimizer=paged_adamw_32bit",),
        ("lora.init_lora_weights=gaussian",),
        ("lora.target_modules=.*_proj",),
        ("+trainer.extra.save_total_limit=2",),
        ("model.attn_implementation=sdpa",),
        ("model.dtype=float32", NONE),
    ],
    ids=str,
)
def test_what_is_for_the_packed_engine_is_its_without_a_word(
    overrides: tuple[str, ...], tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base

    with caplog.at_level("INFO"):
        for engine in ("auto", "packed"):
            config = tiny(*overrides, f"trainer.engine={engine}")
            assert choose_engine(config, find_base(config.model)) == "packed"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"model_type": "gemma2"}, "(of type gemma2)"), ({"attention_dropout": 0.1}, "attention_dropout=0.1")],
    ids=str,
)
def test_a_base_of_another_kind_is_trls(
    change: dict[str, Any], reason: str, tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | change))
    config = tiny(f"model.name_or_path={folder}")
    assert choose_engine(config, find_base(config.model)) == "trl"
    refused = tiny(f"model.name_or_path={folder}", "trainer.engine=packed")
    with pytest.raises(ConfigError) as error:
        choose_engine(refused, find_base(refused.model))
    assert reason in str(error.value)


DORA = ("lora.use_dora=true", "trainer.max_steps=1", "sample_prompts=[]")


def test_a_command_refuses_the_engine_before_the_base_is_loaded(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    asked = station.run(*tiny_overrides(tiny_base), *DORA, "trainer.engine=packed", cwd=tmp_path)
    assert asked.returncode == 1
    (line,) = [line for line in asked.stderr.splitlines() if line.startswith("error: ")]
    assert line == "error: trainer.engine=packed: does not do lora.use_dora=true; allowed: auto, trl"
    assert "no GPU" not in asked.stderr


def test_a_study_refuses_the_engine_before_it_begins(station: Station, tiny_base: Path, tmp_path: Path) -> None:
    asked = station.run(*study_overrides(tiny_base, "s"), *DORA, "trainer.engine=packed", cwd=tmp_path)
    assert asked.returncode == 1
    (line,) = [line for line in asked.stderr.splitlines() if line.startswith("error: ")]
    assert line == "error: trainer.engine=packed: does not do lora.use_dora=true; allowed: auto, trl"
    assert not list(tmp_path.rglob("study.journal"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((*DORA, "hydra.sweeper.slots=3"), "lora.use_dora=true"),
        (("lora.use_dora=choice(true,false)",), "lora.use_dora=true"),
    ],
    ids=["all", "some"],
)
def test_a_study_has_one_engine_and_says_once_why_it_is_trl(
    overrides: tuple[str, ...], reason: str, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = ("hydra.sweeper.n_trials=2", "dataset.limit=8")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, *overrides, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stderr.splitlines() if "engine" in line]
    assert said == [f"engine: trl, as packed does not do {reason}"]
    for number in range(2):
        result = final(tmp_path / "outputs/sweeps/s/trials" / str(number))
        assert (result["engine"], result["slots"], result["companions"]) == ("trl", 1, [])


# A study


TRIALS = 5


@pytest.fixture(scope="module")
def packed_study(station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study whose trials have trained in three slots."""
    place = tmp_path_factory.mktemp("packed")
    return run_study(station, tiny_base, place, "tracker=wandb")


def run_study(station: Station, tiny_base: Path, place: Path, *more: str) -> Path:
    study = (f"hydra.sweeper.n_trials={TRIALS}", "hydra.sweeper.slots=3", "trainer.max_steps=6")
    ended = station.run(*study_overrides(tiny_base, "s"), *study, *more, cwd=place)
    assert ended.returncode == 0, ended.stderr
    return place / "outputs" / "sweeps" / "s"


def logged(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows


def test_a_packed_study_holds_its_trials_and_each_says_who_was_beside(packed_study: Path) -> None:
    trials = Study.load(packed_study).trials()
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert trials[0].state == TrialState.COMPLETE
    results = [final(packed_study / "trials" / str(number)) for number in range(TRIALS)]
    assert {(result["engine"], result["slots"]) for result in results} == {("packed", 3)}
    beside = {(number, int(other)) for number, result in enumerate(results) for other in result["companions"]}
    assert {(0, 1), (0, 2), (1, 2)} <= beside
    assert all((other, number) in beside for number, other in beside)
    assert all(any(number == own for own, _ in beside) for number in range(TRIALS))


def test_each_trials_log_holds_its_own_lines_alone(packed_study: Path) -> None:
    for trial in Study.load(packed_study).trials():
        folder = packed_study / "trials" / str(trial.number)
        lines = (folder / "train.log").read_text().splitlines()
        steps = [line.split(" - ", 1)[1].split()[1].split("/")[0] for line in lines if " - step " in line]
        shown = [str(row["step"]) for row in logged(folder) if "train/loss" in row or "eval/loss" in row]
        assert steps == shown
        others = [f"trial {number}" for number in range(TRIALS) if number != trial.number]
        assert not [line for line in lines for other in others if other in line]


def test_a_trial_ends_between_rungs_when_better_ones_come_to_its_last(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    # Beside the baseline's 1e-3: the second ends at its first rung, and the third takes its place.
    points = ",".join(f"{{optimizer.learning_rate: {rate}}}" for rate in (2e-3, 1e-6, 1e-2))
    rungs = ("optimizer.warmup_ratio=0", "trainer.max_steps=40", "trainer.eval_steps=[5]")
    more = ("optimizer.learning_rate=tag(log,interval(1e-6,1e-1))", f"hydra.sweeper.start=[{points}]")
    study = run_study(station, tiny_base, tmp_path, *rungs, *more, "hydra.sweeper.n_trials=4")
    first, second, third = Study.load(study).trials()[1:]
    assert (second.state, second.user_attrs["step"]) == (TrialState.PRUNED, 5)
    assert third.state == TrialState.COMPLETE
    assert first.state == TrialState.PRUNED
    assert 10 <= first.user_attrs["step"] < 20
    assert first.user_attrs["reason"] == "worse than others at its last rung, as more came to it"


def test_each_slot_has_its_own_wandb_run_with_trls_names(packed_study: Path, tiny: Tiny, tmp_path: Path) -> None:
    run(tiny(*SHORT, "trainer.engine=trl", "tracker=wandb"), tmp_path, RunContext(interactive=False))
    wanted = history_names(tmp_path)
    uid = Study.load(packed_study).uid
    for number in range(TRIALS):
        folder = packed_study / "trials" / str(number)
        opened = [record.run.run_id for records in wandb_files(folder) for record in records if record.HasField("run")]
        assert set(opened) == {f"{uid}-{number}"}
        names = history_names(folder)
        assert names <= wanted
        assert names == wanted or final(folder)["status"] == "pruned"
        for name in ("train/loss", "eval/loss"):
            shown = [row[name] for row in history(folder) if name in row]
            assert shown == [row[name] for row in logged(folder) if name in row]


def history(folder: Path) -> list[dict[str, Any]]:
    return [row for records in wandb_files(folder) for row in wandb_history(records)]


def history_names(folder: Path) -> set[str]:
    return {name for row in history(folder) for name in row if not name.startswith("test/")}


def test_the_winner_of_a_pack_trained_again_alone_is_the_same_to_rounding(
    packed_study: Path, station: Station, tmp_path: Path
) -> None:
    more = ("experiment=best", "hydra.run.dir=again", "tracker=none")
    again = station.run("--config-dir", str(packed_study), *more, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "again") == pytest.approx(losses(packed_study / "best"), rel=1e-5)
    there, here = (final(folder)["metrics"] for folder in (packed_study / "best", tmp_path / "again"))
    assert here["eval/loss"] == pytest.approx(there["eval/loss"], rel=1e-5)
    assert here["test/loss"] == pytest.approx(there["test/loss"], rel=1e-5)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_packed_study(
    packed_study: Path, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    again = run_study(station, tiny_base, tmp_path)

    def told(folder: Path) -> list[Any]:
        trials = Study.load(folder).trials(*FINISHED)
        return [(trial.number, trial.state, trial.params, trial.values, trial.intermediate_values) for trial in trials]

    assert told(again) == told(packed_study)
    for number in range(TRIALS):
        one, other = (folder / "trials" / str(number) for folder in (again, packed_study))
        assert losses(one) == losses(other)
        assert final(one)["companions"] == final(other)["companions"]
