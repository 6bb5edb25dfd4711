"""Shortcuts are used where they compute what the plain way computes, and nowhere else.

The plain way is written anew here: each row alone, without padding and without a cache.
"""

import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.architectures import ARCHITECTURES, tiny_model
from support.models import load, load_tokenizer, with_tokenizer_of
from support.runs import Tiny, final, write_jsonl

from finetune.data.encoding import IGNORED
from finetune.errors import ConfigError

pytestmark = [
    pytest.mark.usefixtures("fresh_cache"),
    pytest.mark.filterwarnings("ignore"),
]

VOCABULARY = 600
Row = dict[str, list[int]]

BY_DEFAULT = ("Llama", "Qwen3_5Text", "Bloom", "Rwkv")
"""One that all shortcuts hold for, and one of each kind for which some do not."""

SEPARATES_ROWS = {
    "Llama", "GPTNeoX", "Gemma2", "Gemma3Text", "Phi3", "Olmo2", "Starcoder2", "Granite", "GPT2",
    "Qwen3Moe", "Mixtral", "GPTNeo", "CodeGen", "GPTBigCode", "Cohere2", "Gemma", "DeepseekV3",
}  # fmt: skip
"""Architectures whose rows of a packed sequence don't see each other, in transformers 5.23."""


def architectures(default: tuple[str, ...]) -> Any:
    marks = {
        name: () if name in default else pytest.mark.matrix for name in ARCHITECTURES
    }
    return pytest.mark.parametrize(
        "architecture", [pytest.param(name, marks=mark) for name, mark in marks.items()]
    )


def rows_with_prefix(length: int = 24) -> list[Row]:
    """Rows of many lengths that begin in the same way, as with a system turn."""
    draw = random.Random(0)
    prefix = [draw.randrange(2, VOCABULARY) for _ in range(length)]
    rows = []
    for question, answer in [(1, 5), (9, 2), (4, 12), (2, 1), (6, 6)]:
        ends = [draw.randrange(2, VOCABULARY) for _ in range(question + answer)]
        labels = [IGNORED] * (length + question) + ends[question:]
        rows.append({"input_ids": prefix + ends, "labels": labels})
    return rows


def loss_alone(model: Any, row: Row) -> float:
    """The summed loss of a row's answer, from one plain forward pass of the row alone."""
    import torch

    with torch.no_grad():
        logits = model.eval()(
            input_ids=torch.tensor([row["input_ids"]]), use_cache=False
        ).logits[0]
    logarithms = torch.log_softmax(logits.double(), -1)
    total = 0.0
    for position, label in enumerate(row["labels"][1:]):
        if label != IGNORED:
            total -= float(logarithms[position, label])
    return total


def answer_alone(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """A prompt's most likely continuation, each token from a plain forward pass."""
    import torch

    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    answer: list[int] = []
    while len(answer) < tokens and answer[-1:] != [tokenizer.eos_token_id]:
        with torch.no_grad():
            output = model.eval()(
                input_ids=torch.tensor([ids + answer]), use_cache=False
            )
        answer.append(int(output.logits[0, -1].argmax()))
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


def evaluated(
    model: Any, rows: list[Row], tiny: Tiny, batch_size: int = 3
) -> list[float]:
    from datasets import Dataset

    from finetune.engine.evaluation import evaluate

    quantization = tiny("quantization=none").quantization
    return list(
        evaluate(model, Dataset.from_list(rows), batch_size, quantization).row_losses
    )


def answered(
    model: Any, tokenizer: Any, prompts: list[str], tiny: Tiny, tokens: int
) -> list[str]:
    from finetune.engine.generation import generate_answers

    quantization = tiny("quantization=none").quantization
    return generate_answers(
        model, tokenizer, prompts, quantization, max_new_tokens=tokens, max_length=None
    )


PROMPTS = [
    "Hm?",
    "What does math.gcd do in Python, and why would anybody ask?",
    "Sea, or not?",
]


@architectures(BY_DEFAULT)
def test_losses_and_answers_are_those_of_each_row_alone(
    architecture: str, tiny: Tiny, tiny_base: Path
) -> None:
    tokenizer = load_tokenizer(tiny())
    model = tiny_model(architecture, len(tokenizer), tokenizer.eos_token_id)
    rows = rows_with_prefix()
    alone = [loss_alone(model, row) for row in rows]
    assert evaluated(model, rows, tiny) == pytest.approx(alone, rel=1e-4)
    expected = [answer_alone(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert answered(model, tokenizer, PROMPTS, tiny, 12) == expected


@architectures(("Llama", "GptOss", "Bloom", "Mamba"))
def test_packed_sequences_hold_where_rows_do_not_see_each_other(
    architecture: str, tiny: Tiny
) -> None:
    import torch

    from finetune.engine.evaluation import packed_sequences_hold

    model = tiny_model(architecture, VOCABULARY, 1)
    first, second = (row["input_ids"] for row in rows_with_prefix(4)[:2])
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([second]), use_cache=False).logits[0]
        try:
            packed = model(
                input_ids=torch.tensor([first + second]),
                position_ids=torch.tensor([[*range(len(first)), *range(len(second))]]),
                use_cache=False,
            ).logits[0, len(first) :]
            separate = torch.allclose(packed, alone, rtol=1e-4, atol=1e-4)
        except TypeError:  # it has no position_ids
            separate = False
    holds = packed_sequences_hold(model, 32, tiny("quantization=none").quantization)
    assert holds == separate == (architecture in SEPARATES_ROWS)


def broken(fault: str, dtype: str = "float32") -> Any:
    """A Llama whose code has one fault, as remote code may have it."""
    import torch
    from transformers import LlamaForCausalLM

    class Broken(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **arguments: Any) -> Any:
            cache = arguments.get("past_key_values")
            if fault == "no mask":
                arguments["attention_mask"] = None
                arguments.pop("position_ids", None)
            if (
                fault == "cache without order"
                and cache is not None
                and cache.get_seq_length()
            ):
                arguments["position_ids"] = torch.zeros_like(input_ids)
            output = super().forward(input_ids=input_ids, **arguments)
            if fault == "batch" and len(input_ids) > 1:
                output.logits = output.logits + output.logits.roll(1, 0)
            return output

    torch.manual_seed(0)
    model = Broken(tiny_model("Llama", VOCABULARY, 1).config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model.eval().to(getattr(torch, dtype))


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.message
        for record in caplog.records
        if record.name == "finetune.engine.probes"
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fault", "evaluation", "generation"),
    [
        ("none", [], []),
        ("no mask", [], ["answering one prompt after another"]),
        (
            "cache without order",
            ["evaluating each row whole"],
            ["answering one prompt after another", "answering without a cache"],
        ),
        (
            "batch",
            ["evaluating each row whole", "evaluating one row after another"],
            ["answering one prompt after another"],
        ),
    ],
)
def test_a_base_with_a_fault_goes_the_plain_way_and_one_line_says_so(
    fault: str,
    evaluation: list[str],
    generation: list[str],
    dtype: str,
    tiny: Tiny,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    tokenizer = load_tokenizer(tiny())
    model, rows = broken(fault, dtype), rows_with_prefix()
    alone = [loss_alone(model, row) for row in rows]
    rounding = 1e-4 if dtype == "float32" else 0.1
    for _ in range(2):  # the second time it is known
        assert evaluated(model, rows, tiny) == pytest.approx(alone, rel=rounding)
    assert [line.partition(",")[0] for line in lines_of(caplog)] == evaluation
    caplog.clear()
    for _ in range(2):
        answers = answered(model, tokenizer, PROMPTS, tiny, 6)
    lines = lines_of(caplog)
    assert [line.partition(",")[0] for line in lines] == generation
    assert all("(llama: they differ by " in line for line in lines)
    if dtype == "float32":
        assert answers == [
            answer_alone(model, tokenizer, prompt, 6) for prompt in PROMPTS
        ]


def test_that_a_shortcut_holds_is_recorded_for_the_next_process(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.engine import check_record, probes

    config = tiny("quantization=none")
    rows = rows_with_prefix()
    plain: Callable[..., Any] = probes.plain_logits
    calls: list[int] = []

    def count(*arguments: Any) -> Any:
        calls.append(1)
        return plain(*arguments)

    monkeypatch.setattr("finetune.engine.evaluation.plain_logits", count)
    evaluated(load(config), rows, tiny)
    evaluated(load(config), rows, tiny)  # loaded again, as by another process
    assert calls == [1]
    (record,) = (tmp_path / "cache" / "shortcuts").iterdir()
    assert json.loads(record.read_text()) == {
        "shortcut": "SHARED_PREFIX",
        "model_type": "llama",
    }
    monkeypatch.setattr(check_record, "version", lambda library: "another")
    evaluated(load(config), rows, tiny)
    assert calls == [1, 1]


def test_that_a_shortcut_does_not_hold_is_not_recorded(
    tiny: Tiny, tmp_path: Path
) -> None:
    model = tiny_model("Mamba", VOCABULARY, 1)
    evaluated(model, rows_with_prefix(), tiny)
    records = [
        json.loads(file.read_text())
        for file in (tmp_path / "cache/shortcuts").iterdir()
    ]
    assert [record["shortcut"] for record in records] == ["ROWS_TOGETHER"]


def test_a_diverged_adapter_shows_nothing_about_the_base(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    caplog.set_level(logging.INFO)
    model, rows = load(tiny("quantization=none")), rows_with_prefix()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    values = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.fill_(torch.nan)
        assert all(loss != loss for loss in evaluated(model, rows, tiny))
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
    alone = [loss_alone(model, row) for row in rows]
    assert evaluated(model, rows, tiny) == pytest.approx(alone, rel=1e-6)
    assert lines_of(caplog) == []


def test_a_probe_is_as_long_as_the_window_that_rows_exceed() -> None:
    from finetune.engine.probes import _probe_length

    model = tiny_model("Gemma2", VOCABULARY, 1)  # a window of 16 tokens
    assert _probe_length(model, 16) == 6
    assert _probe_length(model, 17) == 20
    phi = tiny_model("Phi3", VOCABULARY, 1)
    phi.config.sliding_window = None
    phi.config.rope_parameters = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 32,
    }
    assert _probe_length(phi, 32) == 6
    assert _probe_length(phi, 33) == 31


def test_positions_whose_scale_depends_on_the_longest_row_are_computed_one_row_after_another(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a row of more than 32 tokens, a shorter one would have the long rows' frequencies."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    caplog.set_level(logging.INFO)
    config = tiny_model("Phi3", VOCABULARY, 1).config.to_dict()
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
    }
    config |= {
        "sliding_window": None,
        "rope_parameters": rope,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 32,
    }
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config.from_dict(config)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    rows = rows_with_prefix(26)
    assert {len(row["input_ids"]) > 32 for row in rows} == {True, False}
    alone = [loss_alone(model, row) for row in rows]
    assert evaluated(model, rows, tiny) == pytest.approx(alone, rel=1e-4)
    starts = ["evaluating each row whole", "evaluating one row after another"]
    assert [line.partition(",")[0] for line in lines_of(caplog)] == starts


class WrongBackend:
    """A backend that forgets what it should compute."""

    logits_chunk = 1024

    borrows_blocks = False

    def __init__(self, right: Any) -> None:
        self._right = right

    def attach(self, slot: Any) -> None:
        self._right.attach(slot)

    def forward(self, *arguments: Any) -> Any:
        hidden, trace = self._right.forward(*arguments)
        return hidden * 1.01 + 0.1, trace


def test_a_gpu_decoder_that_is_wrong_is_replaced_by_autograd(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    from finetune.engine.packed.autograd_backend import AutogradBackend
    from finetune.engine.packed.bank import Bank
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    caplog.set_level(logging.INFO)
    config = tiny("quantization=none")
    base = load_base(find_base(config.model), config)
    bank = Bank(base, config, WrongBackend(AutogradBackend(base, False)))
    bank.slots.create(config.lora, 0)
    assert isinstance(bank.backends.current, AutogradBackend)
    (line,) = lines_of(caplog)
    assert line.startswith(
        "training with PyTorch's slower operations: the GPU kernels compute"
    )


def test_a_base_whose_attention_ignores_the_packed_batch_is_refused_in_one_line(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As remote code of type llama does that calls an attention function by itself."""
    import contextlib

    from finetune.engine.packed import attention
    from finetune.run.resources import SharedResources

    monkeypatch.setattr(
        attention,
        "attention_implementation",
        lambda *_: contextlib.nullcontext(),
    )
    config = tiny("quantization=none")
    with (
        pytest.raises(ConfigError) as error,
        SharedResources().slot(config) as create_slot,
    ):
        create_slot()
    assert re.fullmatch(
        "trainer.engine=packed: the packed engine computes other logits than the base's own code "
        r"\(llama: they differ by \d+\.\d\d%\); allowed: trl",
        str(error.value),
    )


def test_an_error_in_a_packed_batch_is_in_the_refusal(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of experts without an attribute that later versions of transformers have."""
    from finetune.engine.packed import attention
    from finetune.run.resources import SharedResources

    def attend(*_: Any, **__: Any) -> None:
        raise AttributeError("no attribute 'window'")

    monkeypatch.setattr(attention.PackedAttention, "attend", attend)
    config = tiny("quantization=none")
    with (
        pytest.raises(
            ConfigError, match=r"\(llama: AttributeError: no attribute 'window'\)"
        ),
        SharedResources().slot(config) as create_slot,
    ):
        create_slot()


def same_system(folder: Path) -> Path:
    rows = [
        {
            "messages": [
                {
                    "role": "system",
                    "content": "You answer in one short sentence, in plain words.",
                },
                {"role": "user", "content": f"What is {number} + {number}?"},
                {
                    "role": "assistant",
                    "content": f"It is {2 * number}." + " Really!" * number,
                },
            ]
        }
        for number in range(10)
    ]
    return write_jsonl(folder / "rows.jsonl", rows)


def saved(architecture: str, tiny_base: Path, folder: Path, config: Any) -> Path:
    """A tiny base of an architecture in a folder, with the tiny base's tokenizer."""
    tokenizer = load_tokenizer(config)
    model = tiny_model(architecture, len(tokenizer), tokenizer.eos_token_id)
    return with_tokenizer_of(tiny_base, model, folder / "base")


TARGETS = {
    "Mamba": "[in_proj,x_proj]",
    "FalconMamba": "[in_proj,x_proj]",
    "Mamba2": "[in_proj]",
}
"""PEFT refuses other layers of these architectures."""


def run_overrides(architecture: str, base: Path, rows: Path) -> list[str]:
    return [
        f"model.name_or_path={base}",
        f"dataset.path={rows}",
        "dataset.limit=null",
        "dataset.eval_fraction=0.3",
        "dataset.test_fraction=0",
        "trainer=debug",
        "trainer.max_steps=2",
        "quantization=none",
        f"lora.target_modules={TARGETS.get(architecture, 'all-linear')}",
    ]


@architectures(("Qwen3_5Text",))
def test_a_run_completes_with_samples_and_its_losses_are_those_of_rows_alone(
    architecture: str, tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from finetune.model.loading import load_base
    from finetune.model.source import find_base
    from finetune.run.resources import SharedResources
    from finetune.run.run import run

    base = saved(architecture, tiny_base, tmp_path, tiny())
    config = tiny(*run_overrides(architecture, base, same_system(tmp_path)))
    run(config, tmp_path / "run")
    assert final(tmp_path / "run")["status"] == "completed"
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert len(samples) == 2
    assert all({"before", "after"} <= sample.keys() for sample in samples)

    resources = SharedResources()
    rows = list(
        resources.tokens("eval", resources.rows(config.dataset).evaluation, config)
    )
    model = load_base(find_base(config.model), config)
    tokens = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    expected = sum(loss_alone(model, row) for row in rows) / tokens
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    measured = next(
        json.loads(line)["eval/loss"] for line in lines if "eval/loss" in line
    )
    assert measured == pytest.approx(expected, rel=1e-4)


@architectures(("GptOss",))
def test_packing_is_refused_before_the_first_step_where_rows_would_see_each_other(
    architecture: str, tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from finetune.run.run import run

    base = saved(architecture, tiny_base, tmp_path, tiny())
    packing = (
        "dataset.packing=true",
        "dataset.max_length=128",
        "sample_prompts=[]",
        "trainer.engine=trl",
    )
    config = tiny(*run_overrides(architecture, base, same_system(tmp_path)), *packing)
    if architecture in SEPARATES_ROWS:
        run(config, tmp_path / "run")
        assert final(tmp_path / "run")["status"] == "completed"
        return
    with pytest.raises(ConfigError) as error:
        run(config, tmp_path / "run")
    model_type = json.loads((base / "config.json").read_text())["model_type"]
    assert str(error.value) == (
        "dataset.packing=true: the rows of a sequence would see each other with this base "
        f"({model_type}); allowed: false"
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
