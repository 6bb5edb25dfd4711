"""One run, end to end, on a tiny real model: what it leaves, that it repeats, that it goes on
after a stop."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import SLOW_STEPS, Forked, Station, wait_until
from support.configs import compose, tiny_overrides
from support.runs import write_jsonl

from finetune.config.schema import RunConfig
from finetune.engine.observer import Observer, Rung
from finetune.engine.schedule import evaluation_rungs
from finetune.errors import Interrupted
from finetune.exit_codes import INTERRUPTED
from finetune.run.context import RunContext
from finetune.run.run import run

Tiny = Callable[..., RunConfig]
DROPOUT = (
    "lora.dropout=0.1",
    "optimizer.learning_rate=0.01",
    "trainer.per_device_train_batch_size=2",
)
by_both = pytest.mark.parametrize(
    "engine", ["trainer.engine=packed", "trainer.engine=trl"]
)
by_trl_slowly = pytest.mark.parametrize(
    "engine",
    [
        "trainer.engine=packed",
        pytest.param("trainer.engine=trl", marks=pytest.mark.slow),
    ],
)


def result_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """All logged lines, without what depends on the clock."""
    rows = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        {
            name: value
            for name, value in row.items()
            if name != "train/tokens_per_second"
        }
        for row in rows
    ]


def adapter_of(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_leaves_a_run_folder_whose_adapter_plain_peft_loads(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    objective = run(tiny("trainer.max_steps=4"), tmp_path)

    result = result_of(tmp_path)
    assert result["status"] == "completed"
    assert result["objective"] == {"name": "eval/loss", "value": objective}
    assert result["error"] is None
    assert result["engine"] == "packed"
    assert result["slots"] == 1
    assert result["effective_batch_size"] == 4
    assert result["tokens_per_second"] == pytest.approx(
        result["train_tokens"] / result["train_seconds"]
    )
    assert result["peak_memory_bytes"] > 2**20
    assert result["versions"]["torch"]
    assert result["base_model"]["sha256"]
    assert len(result["dataset_fingerprint"]) == 16
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "adapter"
    )
    assert model.peft_config["default"].r == 16
    AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert [
        set(row) for row in json.loads((tmp_path / "samples.json").read_text())
    ] == [{"prompt", "expected", "before", "after"}] * 2
    names = {name for row in metrics_of(tmp_path) for name in row}
    assert {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "eval/loss",
        "objective",
        "test/loss",
    } <= names


@by_both
def test_counts_tokens_without_padding(engine: str, tiny: Tiny, tmp_path: Path) -> None:
    from support.rows import tokenize

    from finetune.data.rows import load_rows
    from finetune.model.source import find_base
    from finetune.model.tokenizer import load_tokenizer

    config = tiny(
        engine,
        "dataset.limit=12",
        "trainer.per_device_train_batch_size=4",
        "sample_prompts=[]",
    )
    run(config, tmp_path)

    tokens = tokenize(
        "train",
        load_rows(config.dataset).train,
        load_tokenizer(find_base(config.model), config.model),
        config.dataset,
    )
    assert result_of(tmp_path)["train_tokens"] == sum(
        length for length in tokens.lengths
    )


@by_trl_slowly
def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    engine: str, tiny: Tiny, tmp_path: Path
) -> None:
    for name, seed in (("one", 7), ("two", 7), ("other", 8)):
        run(
            tiny(*DROPOUT, engine, "trainer.max_steps=6", f"seed={seed}"),
            tmp_path / name,
        )

    assert metrics_of(tmp_path / "one") == metrics_of(tmp_path / "two")
    assert adapter_of(tmp_path / "one") == adapter_of(tmp_path / "two")
    assert adapter_of(tmp_path / "one") != adapter_of(tmp_path / "other")


@by_both
def test_trains_the_adapter_in_float32(engine: str, tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run(
        tiny(engine, "trainer.max_steps=2", "quantization=nf4", "sample_prompts=[]"),
        tmp_path,
    )
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rounded = [weight.bfloat16().float().equal(weight) for weight in weights.values()]
    assert not any(rounded)


class StopsAt(Observer):
    def __init__(self, rung: int) -> None:
        self.rung, self.seen = rung, []  # type: tuple[int, list[Rung]]

    def on_rung(self, rung: Rung) -> None:
        self.seen.append(rung)

    def should_prune(self, rung: Rung) -> bool:
        return rung.index == self.rung


@by_both
def test_an_observer_hears_every_rung_and_may_stop_the_run(
    engine: str, tiny: Tiny, tmp_path: Path
) -> None:
    observer = StopsAt(2)
    run(
        tiny(
            engine, "trainer.max_steps=8", "trainer.eval_steps=2", "sample_prompts=[]"
        ),
        tmp_path,
        RunContext(observer),
    )

    assert [rung.step for rung in observer.seen] == [0, 2, 4]
    assert result_of(tmp_path)["status"] == "pruned"
    assert result_of(tmp_path)["step"] == 4
    assert [row["step"] for row in metrics_of(tmp_path) if "train/loss" in row] == [
        1,
        2,
        3,
        4,
    ]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_a_pruned_run_saves_no_adapter_where_nobody_needs_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny("trainer.max_steps=2", "trainer.eval_steps=1", "sample_prompts=[]")
    run(config, tmp_path, RunContext(StopsAt(1), saves_pruned_adapter=False))
    assert result_of(tmp_path)["status"] == "pruned"
    assert not (tmp_path / "adapter").exists()


class StopsAfter(Observer):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step: int) -> bool:
        return step == self.step


@by_both
def test_evaluates_where_it_is_told_to_and_counts_rungs_by_how_far_they_are(
    engine: str, tiny: Tiny, tmp_path: Path
) -> None:
    observer = StopsAt(-1)
    more = ("trainer.max_steps=9", "trainer.eval_steps=[0.1,3,20]", "sample_prompts=[]")
    run(tiny(engine, *more), tmp_path, RunContext(observer))
    assert [(rung.step, rung.index) for rung in observer.seen] == [
        (0, 0),
        (1, 1),
        (3, 3),
        (9, 10),
    ]


@pytest.mark.parametrize(
    ("setting", "total", "expected"),
    [
        (0.25, 60, {0: 0, 15: 1, 30: 2, 45: 3, 60: 4}),
        (3, 10, {0: 0, 3: 1, 6: 2, 9: 3, 10: 4}),
        (0, 10, {0: 0, 10: 1}),
        (500, 60, {0: 0, 60: 1}),
        ([0.333, 0.037, 0.111], 432, {0: 0, 16: 1, 48: 3, 144: 9, 432: 27}),
        ([0.037, 0.111, 0.333], 60, {0: 0, 3: 1, 7: 3, 20: 9, 60: 27}),
        ([2, 7], 8, {0: 0, 2: 1, 7: 4, 8: 5}),
        ([0, 8, 9], 8, {0: 0, 8: 1}),
        ([0.99], 8, {0: 0, 8: 1}),
        ([0.5, 2, 2], 4, {0: 0, 2: 1, 4: 2}),
        ([0.037, 0.111, 0.333], 4, {0: 0, 1: 1, 2: 9, 4: 27}),
        ([], 8, {0: 0, 8: 1}),
    ],
)
def test_rungs(
    setting: float | list[float], total: int, expected: dict[int, int]
) -> None:
    assert evaluation_rungs(setting, total) == expected


@by_both
def test_an_observer_may_stop_the_run_between_rungs(
    engine: str, tiny: Tiny, tmp_path: Path
) -> None:
    run(
        tiny(engine, "trainer.max_steps=8", "sample_prompts=[]"),
        tmp_path,
        RunContext(StopsAfter(3)),
    )

    assert (result_of(tmp_path)["status"], result_of(tmp_path)["step"]) == ("pruned", 3)
    assert [row["step"] for row in metrics_of(tmp_path) if "train/loss" in row] == [
        1,
        2,
        3,
    ]


@by_both
def test_stops_early_and_keeps_the_best_adapter(
    engine: str, tiny: Tiny, tmp_path: Path
) -> None:
    # A rate that soon overshoots: held-out loss falls first and rises then.
    wild = (
        "optimizer.learning_rate=0.3",
        "optimizer.lr_scheduler_type=constant",
        "quantization=none",
        engine,
    )
    config = tiny(
        *wild,
        "trainer.max_steps=60",
        "trainer.eval_steps=1",
        "trainer.early_stopping_patience=2",
        "objective_at=best",
    )
    objective = run(config, tmp_path)

    losses = [row["eval/loss"] for row in metrics_of(tmp_path) if "eval/loss" in row]
    assert objective == min(losses)
    assert losses[-1] > objective
    assert len(losses) < 60

    from support.rows import tokenize

    from finetune.data.rows import load_rows
    from finetune.engine.evaluation import evaluate
    from finetune.run.load import load_run

    trained = load_run(tmp_path)
    held_out = tokenize(
        "eval", load_rows(config.dataset).evaluation, trained.tokenizer, config.dataset
    )
    assert evaluate(
        trained.with_adapter(), held_out, 8, config.quantization
    ).loss == pytest.approx(objective, rel=1e-5)
    assert measured_on_test_rows(config, tmp_path) == pytest.approx(
        result_of(tmp_path)["metrics"]["test/loss"], rel=1e-5
    )


def measured_on_test_rows(config: RunConfig, folder: Path) -> float:
    """What the saved adapter makes of the test rows, measured by plain PEFT."""
    from support.rows import tokenize

    from finetune.data.rows import load_rows
    from finetune.engine.evaluation import evaluate
    from finetune.run.load import load_run

    trained = load_run(folder)
    rows = tokenize(
        "test", load_rows(config.dataset).test, trained.tokenizer, config.dataset
    )
    return evaluate(trained.with_adapter(), rows, 8, config.quantization).loss


def test_an_adapter_that_was_put_back_is_measured_in_bfloat16_too(
    tiny: Tiny, tmp_path: Path
) -> None:
    """As `objective_at=best` does at a run's end; where matrix products have another dtype than
    the weights."""
    from finetune.engine.packed.training import PackedTraining
    from finetune.engine.steps import drive
    from finetune.model.adapter import load_adapter
    from finetune.run.resources import SharedResources

    config = tiny(
        "optimizer.learning_rate=0.3",
        "trainer.max_steps=6",
        "quantization.bnb_4bit_compute_dtype=bfloat16",
    )
    resources = SharedResources()
    run(config, tmp_path, RunContext(resources=resources, interactive=False))
    held_out = resources.tokens(
        "eval", resources.rows(config.dataset).evaluation, config
    )
    with resources.slot(config) as place:
        slot = place()
        training = PackedTraining(config, slot, held_out, 1)
        fresh = drive(training.evaluate(held_out)).loss
        load_adapter(slot.model, tmp_path / "adapter")
        trained = drive(training.evaluate(held_out)).loss

    losses = [row["eval/loss"] for row in metrics_of(tmp_path) if "eval/loss" in row]
    assert (fresh, trained) == (losses[0], losses[-1])
    assert fresh != trained


def test_a_fresh_adapter_is_its_base_in_bfloat16_too(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that was never written holds whatever was there before: here, no numbers."""
    import torch

    empty_like = torch.empty_like

    def soiled(like: Any, **more: Any) -> Any:
        tensor = empty_like(like, **more)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty_like", soiled)
    few = ("trainer.max_steps=3", "sample_prompts=[]", "lora.dropout=0.1")
    for name, more in (
        ("half", ("quantization.bnb_4bit_compute_dtype=bfloat16",)),
        ("exact", ()),
    ):
        run(tiny(*few, *more), tmp_path / name, RunContext(interactive=False))
    half, exact = (
        [
            row["train/loss"]
            for row in metrics_of(tmp_path / name)
            if "train/loss" in row
        ]
        for name in ("half", "exact")
    )
    assert half == pytest.approx(exact, rel=2e-3)


@by_both
def test_a_diverged_run_is_failed_and_names_the_rate(
    engine: str, tiny: Tiny, tmp_path: Path
) -> None:
    diverges = (
        "optimizer.learning_rate=1e20",
        "trainer.max_steps=20",
        "quantization=none",
        "sample_prompts=[]",
    )
    with pytest.raises(ValueError, match=r"optimizer.learning_rate=1e\+20: .*diverged"):
        run(tiny(*diverges, engine), tmp_path)

    assert result_of(tmp_path)["status"] == "failed"
    assert "optimizer.learning_rate" in result_of(tmp_path)["error"]


def test_the_published_recipe_trains_without_a_gpu_and_says_how(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"text": f"<s>[INST] What is {n}? [/INST] It is {n}.</s>"} for n in range(12)
    ]
    data = write_jsonl(tmp_path / "guanaco.jsonl", rows)
    recipe = (
        "experiment=llama2_guanaco",
        f"model.name_or_path={tiny_base}",
        f"dataset.path={data}",
        "tracker=none",
    )
    with caplog.at_level("INFO", logger="finetune"):
        objective = run(compose(*recipe), tmp_path / "run")

    assert objective is None
    assert (
        "no GPU: training on the CPU, in float32, the paged optimizer in plain memory"
        in caplog.messages
    )
    result = result_of(tmp_path / "run")
    assert result["status"] == "completed"
    assert result["objective"] is None
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert [row["prompt"] for row in samples] == [
        "Who is Leonardo Da Vinci?",
        "What is Datacamp Career track?",
    ]


STEPS = (
    "trainer.max_steps=12",
    "trainer.save_steps=4",
    "trainer.eval_steps=6",
    *DROPOUT,
)


@by_trl_slowly
def test_a_run_killed_after_its_last_step_is_finished_not_trained_on(
    engine: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(*STEPS, engine, "trainer.max_steps=5", "sample_prompts=[]")
    with monkeypatch.context() as patch:
        # The kill comes before.
        patch.setattr("finetune.run.run._remove_checkpoints", lambda *_: None)
        run(config, tmp_path)
    adapter = adapter_of(tmp_path)
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "result.json").unlink()

    run(config, tmp_path)
    assert adapter_of(tmp_path) == adapter
    assert metrics_of(tmp_path)[-1]["step"] == 5


@by_trl_slowly
def test_only_a_completed_run_loses_its_checkpoints(
    engine: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Unless the user has said how many stay."""
    best = "objective_at=best"
    config = tiny(*STEPS, engine, "sample_prompts=[]", best)
    run(config, tmp_path, RunContext(StopsAt(1)))
    assert list((tmp_path / "checkpoints").glob("checkpoint-*"))

    (tmp_path / "result.json").unlink()
    run(config, tmp_path)
    assert result_of(tmp_path)["status"] == "completed"
    assert not (tmp_path / "checkpoints").exists()
    assert adapter_of(tmp_path)


def test_checkpoints_stay_where_their_number_is_given(
    tiny: Tiny, tmp_path: Path
) -> None:
    run(
        tiny(*STEPS, "sample_prompts=[]", "+trainer.extra.save_total_limit=2"), tmp_path
    )
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) == 2


def test_a_run_on_a_mixture_goes_on_and_says_what_it_read(
    tiny: Tiny, tmp_path: Path
) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]
    first = write_jsonl(tmp_path / "first.jsonl", [*rows[:20], {"prompt": 5}])
    second = write_jsonl(tmp_path / "second.jsonl", rows[20:])
    path = f"dataset.path=[{first},{{path:{second},weight:2}}]"
    keys = (
        path,
        "dataset.on_bad_row=skip",
        "dataset.eval_fraction=0.1",
        "dataset.limit=null",
    )
    config = tiny(*STEPS, *keys, "dataset.test_fraction=0.1", "sample_prompts=[]")
    run(config, tmp_path / "run", RunContext(StopsAt(1)))
    run(config, tmp_path / "run")

    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["rows"]["eval"], result["rows"]["test"]) == (4, 4)
    assert 32 < result["rows"]["train"] < 64
    [skipped] = result["rows"]["skipped"]
    assert skipped["source"] == str(first)
    assert skipped["number"] == 21
    assert list(result["rows"]["dropped"].values()) == [1]
    assert result["rows"]["notes"][0].startswith("training rows by weight: ")
    other = dataclasses.replace(config.dataset, path=[str(first), str(second)])
    with pytest.raises(ValueError, match=r"dataset\.path=.*the run that began in"):
        run(dataclasses.replace(config, dataset=other), tmp_path / "run")


def test_a_run_does_not_go_on_with_other_rows(tiny: Tiny, tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(60)],
    )
    config = tiny(*STEPS, f"dataset.path={data}", "dataset.eval_fraction=0.1")
    run(config, tmp_path / "run", RunContext(StopsAt(1)))
    write_jsonl(
        data,
        [
            {"prompt": f"What is {n}?", "completion": f"It is {n} now."}
            for n in range(60)
        ],
    )

    with pytest.raises(
        ValueError, match=r"dataset_fingerprint=.*the run that began in"
    ):
        run(config, tmp_path / "run")


@by_trl_slowly
def test_a_checkpoint_that_was_cut_short_costs_no_other(
    engine: str, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny(*STEPS, engine, "sample_prompts=[]")
    run(config, tmp_path / "whole")
    run(
        config, tmp_path / "run", RunContext(StopsAt(1))
    )  # at step 6, after the checkpoint of step 4
    (tmp_path / "run" / "checkpoints" / "checkpoint-8").mkdir()
    run(config, tmp_path / "run")

    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "whole")


@by_trl_slowly
def test_a_run_killed_while_it_kept_its_best_adapter_can_be_finished(
    engine: str, tiny: Tiny, tmp_path: Path
) -> None:
    best = (
        *STEPS,
        engine,
        "objective_at=best",
        "trainer.eval_steps=2",
        "sample_prompts=[]",
    )
    run(tiny(*best), tmp_path / "whole")
    run(tiny(*best), tmp_path / "run", RunContext(StopsAt(3)))
    newest = max(
        (tmp_path / "run" / "checkpoints").glob("best-*"),
        key=lambda path: int(path.name[5:]),
    )
    newest.rename(newest.with_name(f".{newest.name}.draft"))
    run(tiny(*best), tmp_path / "run")

    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "whole")


def started(station: Station, tiny_base: Path, folder: Path, engine: str) -> Forked:
    """A run as a process of its own, in a given folder, in the middle of its steps."""
    arguments = [*tiny_overrides(tiny_base), *STEPS, engine, f"hydra.run.dir={folder}"]
    process = station.start(*arguments, cwd=folder.parent, before=SLOW_STEPS)
    wait_until(
        lambda: any(folder.glob("checkpoints/checkpoint-*/progress.json")), process
    )
    return process


@pytest.mark.fault
@by_both
def test_a_killed_run_goes_on_bit_for_bit(
    engine: str, station: Station, tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    run(tiny(*STEPS, engine), tmp_path / "whole")
    started(station, tiny_base, tmp_path / "killed", engine).kill()
    assert not (tmp_path / "killed" / "adapter").exists()

    resumed = station.run(f"resume={tmp_path / 'killed'}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step" in resumed.stderr
    assert adapter_of(tmp_path / "killed") == adapter_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")


@pytest.mark.fault
@by_both
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_goes_on(
    number: int,
    engine: str,
    station: Station,
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    run(tiny(*STEPS, engine), tmp_path / "whole")
    folder = tmp_path / "stopped"
    process = started(station, tiny_base, folder, engine)
    process.send_signal(number)
    ended = process.wait()

    assert ended.returncode == INTERRUPTED
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: interrupted after step")
    assert f"resume={os.path.relpath(folder, tmp_path)}" in last
    assert result_of(folder)["status"] == "interrupted"
    resumed = station.run(f"resume={folder}", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert result_of(folder)["status"] == "completed"
    assert adapter_of(folder) == adapter_of(tmp_path / "whole")


class Taken(Interrupted):
    goes_on_elsewhere = True


@pytest.mark.parametrize("error", [Interrupted, Taken])
def test_a_run_that_goes_on_elsewhere_leaves_the_copy_alone(
    error: type[Interrupted], tiny: Tiny, tmp_path: Path
) -> None:
    class Loser(Observer):
        def on_step(self, step: int) -> bool:
            raise error("taken")

    config = tiny("trainer.max_steps=2", f"mirror={tmp_path / 'copies'}")
    with pytest.raises(error):
        run(config, tmp_path / "run", RunContext(observer=Loser()))
    is_copied = any((tmp_path / "copies").rglob("result.json"))
    assert is_copied == (error is Interrupted)
