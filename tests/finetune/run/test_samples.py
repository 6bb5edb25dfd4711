"""The sample prompts: what a run and a study's winner keep of them, and that no run fails by
them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import RunConfig
from finetune.data.prompts import first_answer
from finetune.data.types import Row
from finetune.errors import Interrupted
from finetune.run.context import RunContext
from finetune.run.resources import SharedResources
from finetune.run.run import run

Tiny = Callable[..., RunConfig]
DEBUG = (
    "trainer=debug",
    "quantization=none",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[Hm?]",
)


def errors() -> dict[str, Exception]:
    import torch

    return {
        "of an expert": RuntimeError(
            "The size of tensor a (2) must match\nthe size of tensor b (62)"
        ),
        "of the GPU's memory": torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2 GiB"
        ),
        "of the host's memory": MemoryError("no room"),
        "of a template": ValueError("no such role"),
    }


def failing(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, calls: set[int]
) -> None:
    """Let these calls of `answer`, counted from 0, fail; the others answer "Hm."."""
    number = 0

    def answer(*_: Any, **__: Any) -> Any:
        yield from ()
        nonlocal number
        number += 1
        if number - 1 in calls:
            raise error
        return ["Hm."]

    for engine in ("packed.training.PackedTraining", "loaded_model.LoadedModel"):
        monkeypatch.setattr(f"finetune.engine.{engine}.generate_answers", answer)


def content(file: Path) -> Any:
    return json.loads(file.read_text())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING"
    ]


AFTER, BEFORE = {"after": "Hm."}, {"before": "Hm."}


@pytest.mark.parametrize(
    ("engine", "name", "calls", "row"),
    [
        ("packed", "of an expert", {0}, AFTER),
        ("packed", "of the GPU's memory", {1}, BEFORE),
        ("packed", "of the host's memory", {0, 1}, {}),
        ("packed", "of a template", {0, 1}, {}),
        ("trl", "of an expert", {0}, AFTER),
        ("trl", "of an expert", {1}, BEFORE),
        ("trl", "of the GPU's memory", {0, 1}, {}),
    ],
)
def test_a_run_is_completed_whatever_its_samples_raise(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    engine: str,
    name: str,
    calls: set[int],
    row: dict[str, str],
) -> None:
    error = errors()[name]
    failing(monkeypatch, error, calls)

    run(tiny(*DEBUG, f"trainer.engine={engine}", "tracker=tensorboard"), tmp_path)

    assert content(tmp_path / "result.json")["status"] == "completed"
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert content(tmp_path / "samples.json") == [{"prompt": "Hm?", **row}]
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    when = {0: "before", 1: "after"}
    assert warnings_of(caplog) == [
        f"the sample prompts are not answered {when[call]} training: {reason}"
        for call in sorted(calls)
    ]


@pytest.mark.parametrize(
    ("engine", "error", "call"),
    [
        ("packed", KeyboardInterrupt(), 0),
        ("packed", Interrupted("stopped"), 1),
        ("trl", KeyboardInterrupt(), 1),
        ("trl", Interrupted("stopped"), 0),
    ],
)
def test_an_interruption_while_sampling_ends_the_run(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    error: BaseException,
    call: int,
) -> None:
    failing(monkeypatch, error, {call})
    with pytest.raises(type(error)):
        run(tiny(*DEBUG, f"trainer.engine={engine}"), tmp_path)
    assert content(tmp_path / "result.json")["status"] == "interrupted"


@pytest.mark.parametrize(
    ("measured", "calls"), [(False, {0}), (False, {1}), (True, {0, 1})]
)
def test_a_winners_failing_samples_leave_its_test_loss(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    calls: set[int],
    measured: bool,
) -> None:
    from finetune.run.final_evaluation import evaluate_finished_run

    resources = SharedResources()
    run(
        tiny(*DEBUG),
        tmp_path,
        RunContext(resources=resources, interactive=False, evaluate_test_rows=measured),
    )
    failing(monkeypatch, RuntimeError("no room"), calls)
    caplog.set_level("INFO")

    evaluation = evaluate_finished_run(tmp_path, resources, answer_prompts=True)

    assert evaluation is not None
    stages = [line for line in caplog.messages if line.startswith("answering")]
    assert [stage.split()[-1] for stage in stages] == ["base", "adapter"]
    assert content(tmp_path / "result.json")["metrics"]["test/loss"] == evaluation.loss
    assert len(warnings_of(caplog)) == len(calls)
    assert len(content(tmp_path / "samples.json")[0]) == 3 - len(calls)


def test_a_base_that_has_no_room_for_samples_alone_leaves_a_winners_test_loss(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from finetune.run.final_evaluation import evaluate_finished_run

    run(tiny(*DEBUG), tmp_path, RunContext(interactive=False))

    def no_room(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("finetune.model.loading.load_base", no_room)

    assert (
        evaluate_finished_run(tmp_path, SharedResources(), answer_prompts=True)
        is not None
    )
    assert warnings_of(caplog) == [
        "the sample prompts are not answered after training: MemoryError: no room"
    ]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_a_mixture_of_experts_answers_after_training(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL turns on its router logits, which can't be had token by token."""
    import torch
    from support.models import with_tokenizer_of
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shapes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
    }
    more = {"vocab_size": 600, "num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shapes, **experts, **more))
    base = with_tokenizer_of(tiny_base, model, tmp_path / "base")

    # Prompts of different lengths need padding, and with it the cache that router logits can't
    # have.
    prompts = "sample_prompts=[Hm?,What does it do and why?]"
    config = tiny(
        *DEBUG,
        "dataset.limit=40",
        "dataset.eval_fraction=0.2",
        f"model.name_or_path={base}",
        prompts,
    )
    run(config, tmp_path / "run")

    samples = content(tmp_path / "run" / "samples.json")
    assert len(samples) == 2
    assert all(set(sample) == {"prompt", "before", "after"} for sample in samples)
    assert not warnings_of(caplog)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "It is known."},
]
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT}, "It is."),
        ({"messages": CHAT[1:3]}, "It is."),
        # A conversation that begins with the assistant.
        ({"messages": [CHAT[2], *CHAT[3:]]}, "It is known."),
        ({"messages": CHAT[:2]}, None),
        ({"messages": [CHAT[1], CHAT[3], CHAT[4]]}, None),
        ({"messages": [CHAT[1], {"role": "assistant", "tool_calls": [CALL]}]}, None),
        ({"text": "It is."}, None),
    ],
)
def test_the_expected_answer_is_the_rows_answer_to_its_first_question(
    row: dict[str, Any], expected: str | None
) -> None:
    assert first_answer(Row(row)) == expected


@pytest.mark.parametrize("prompts", ["null", "[Hm?]"])
def test_only_prompts_of_rows_have_an_expected_answer(
    prompts: str, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny(*DEBUG, f"sample_prompts={prompts}", "dataset.eval_fraction=0.2")
    run(config, tmp_path)

    samples = content(tmp_path / "samples.json")
    held_out = {}
    for row in SharedResources().rows(config.dataset).evaluation:
        question, answer = row["messages"]
        held_out[question["content"]] = answer["content"]
    assert samples
    for sample in samples:
        assert sample.get("expected") == held_out.get(sample["prompt"])
        assert ("expected" in sample) == (prompts == "null")
