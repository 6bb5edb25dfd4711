"""Token ids, lengths and targets are compared with the base's sizes before its weights load."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.bad_input import matches
from support.bases import make_base, with_changed_json
from support.commands import Station
from support.runs import SHORT, Tiny, final, write_jsonl

from finetune.errors import ConfigError
from finetune.run.run import run

pytestmark = pytest.mark.usefixtures("fresh_cache")

WEIGHTS_LOAD = "no GPU: training on the CPU"
"""Logged on a CPU right before a base's weights load."""
PLAIN = [
    "quantization=none",
    "dataset.test_fraction=0",
    "dataset.eval_fraction=0",
    *SHORT,
    "trainer.max_steps=1",
]


def text_rows(tmp_path: Path, tokens: int) -> Path:
    """Rows of plain text, of which the longest has so many tokens with its end."""
    texts = ["1" * (tokens - 1)] + ["1" * 5] * 5
    return write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])


def refused_before_loading(
    config: Any, folder: Path, caplog: pytest.LogCaptureFixture, says: str
) -> None:
    with caplog.at_level("INFO"), pytest.raises(ConfigError) as refused:
        run(config, folder)
    assert matches(says, str(refused.value)), refused.value
    assert WEIGHTS_LOAD not in caplog.text


def with_tokens(tiny_base: Path, folder: Path, *tokens: str) -> Path:
    """The tiny base, whose tokenizer has more tokens than its embedding has rows."""
    from transformers import AutoTokenizer

    shutil.copytree(tiny_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


NEW = ["<new0>", "<new1>"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a <new0> here"}, "token 600 (<new0>) stands in the train rows"),
        ({"text": "a <new1> here"}, "token 601 (<new1>) stands in the train rows"),
        (
            {"prompt": "<new1>?", "completion": "b"},
            "token 601 (<new1>) stands in the train rows",
        ),
    ],
)
def test_rows_with_tokens_that_the_embedding_lacks_are_refused(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    row: dict[str, str],
    says: str,
) -> None:
    base = with_tokens(tiny_base, tmp_path / "base", *NEW)
    rows = write_jsonl(tmp_path / "rows.jsonl", [row] * 6)
    config = tiny(*PLAIN, f"model.name_or_path={base}", f"dataset.path={rows}")
    expected = f"model.name_or_path={base}: its embedding has 600 rows, but {says}; …"
    refused_before_loading(config, tmp_path / "run", caplog, expected)


def test_held_out_rows_are_looked_at_too(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = with_tokens(tiny_base, tmp_path / "base", *NEW)
    rows = text_rows(tmp_path, 9)
    held_out = write_jsonl(tmp_path / "eval.jsonl", [{"text": "a <new1> here"}])
    paths = (f"dataset.path={rows}", f"dataset.eval_path={held_out}")
    config = tiny(*PLAIN, f"model.name_or_path={base}", *paths)
    expected = "…600 rows, but token 601 (<new1>) stands in the eval rows; …"
    refused_before_loading(config, tmp_path / "run", caplog, expected)


def test_an_end_that_the_embedding_lacks_is_refused(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    base = with_tokens(tiny_base, tmp_path / "base", "<end>")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(base)
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 6
    )
    config = tiny(*PLAIN, f"model.name_or_path={base}", f"dataset.path={rows}")
    expected = "…: its embedding has 600 rows, but token 600 (<end>) ends an answer; …"
    refused_before_loading(config, tmp_path / "run", caplog, expected)


def test_unused_tokens_beyond_the_embedding_do_not_matter(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    base = with_tokens(tiny_base, tmp_path / "base", *NEW)
    rows = text_rows(tmp_path, 9)
    run(
        tiny(*PLAIN, f"model.name_or_path={base}", f"dataset.path={rows}"),
        tmp_path / "run",
    )
    assert final(tmp_path / "run")["status"] == "completed"


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj"])
def test_rows_longer_than_a_table_of_positions_are_refused(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    base = make_base(tiny_base, tmp_path / "base", kind)
    name = f"model.name_or_path={base}"
    fits = tiny(
        *PLAIN, name, f"dataset.path={text_rows(tmp_path, 40)}", "dataset.max_length=50"
    )
    run(fits, tmp_path / "fits")
    assert final(tmp_path / "fits")["status"] == "completed"

    caplog.clear()
    long = tiny(
        *PLAIN, name, f"dataset.path={text_rows(tmp_path, 41)}", "dataset.max_length=50"
    )
    sizes = f"the longest train row has 41 tokens, {name} has 40 positions"
    expected = f"dataset.max_length=50: {sizes}; must be at most 40"
    refused_before_loading(long, tmp_path / "long", caplog, expected)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
UNLIMITED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "beyond the trained positions": ("llama", {}, True),
    "scaled RoPE": (
        "llama",
        {"rope_parameters": {**YARN, "rope_theta": 10000.0}},
        False,
    ),
    "sliding window": ("mistral", {}, False),
    "no positions": ("bloom", {}, False),
    "no attention": ("mamba", {}, False),
}


@pytest.mark.parametrize("kind", list(UNLIMITED))
def test_bases_that_compute_their_positions_train_on_longer_rows(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    name, changes, warned = UNLIMITED[kind]
    base = make_base(tiny_base, tmp_path / "base", name, **changes)
    rows = text_rows(tmp_path, 60)
    config = tiny(*PLAIN, f"model.name_or_path={base}", f"dataset.path={rows}")
    with caplog.at_level("INFO"):
        run(config, tmp_path / "run")
    assert final(tmp_path / "run")["status"] == "completed"
    line = f"the longest train row has 60 tokens, model.name_or_path={base} has 40 positions"
    assert (line in caplog.text) == warned


def test_rows_that_are_cut_fit(tiny: Tiny, tiny_base: Path, tmp_path: Path) -> None:
    base = make_base(tiny_base, tmp_path / "base", "gpt2")
    rows = text_rows(tmp_path, 60)
    name = (
        f"model.name_or_path={base}",
        f"dataset.path={rows}",
        "dataset.max_length=40",
    )
    run(tiny(*PLAIN, *name), tmp_path / "run")
    assert final(tmp_path / "run")["status"] == "completed"


HEAD = (
    "matches lm_head, the output layer, whose adapter would not be trained; allowed: …"
)
TARGETS = [
    ("gpt2", "[c_attn]", None),
    ("gpt2", "[c_attn,c_proj,c_fc]", None),
    ("gpt2", "all-linear", None),
    ("gpt2", "[q_proj]", "matches no linear layer; allowed: c_attn, c_fc, c_proj"),
    ("gpt2", "[lm_head]", HEAD),
    ("mamba", "[in_proj,x_proj]", None),
    ("mamba", "all-linear", None),
    (
        "mamba",
        "[out_proj]",
        "matches out_proj, which PEFT can't adapt in a base of type mamba; …",
    ),
    ("mamba", "[x_proj,out_proj]", "matches out_proj, which PEFT can't adapt …"),
    ("mamba", ".*proj", "matches out_proj, which PEFT can't adapt …"),
    ("mamba", "[conv1d]", "matches no linear layer; allowed: dt_proj, in_proj, x_proj"),
    ("falcon_mamba", "all-linear", None),
    ("falcon_mamba", "[out_proj]", "matches out_proj, which PEFT can't adapt …"),
    ("gemma3n", "all-linear", None),
    (
        "gemma3n",
        "[correction_coefs]",
        "matches correction_coefs, whose adapter would not be trained in a base of type "
        "gemma3n_text; allowed: …, prediction_coefs, …",
    ),
    ("gemma3n", ".*coefs", "matches correction_coefs, whose adapter …"),
    ("llama", "[q_proj,lm_head]", HEAD),
    ("llama", "lm_head", HEAD),
    ("llama", "'.*'", "matches …"),
    ("llama", "'['", "is no regular expression (…); allowed: a list of down_proj, …"),
    ("opt", "[fc1,k_proj]", None),
]
WITHOUT = {
    "mamba": "out_proj, which PEFT can't adapt",
    "falcon_mamba": "out_proj, which PEFT can't adapt",
    "gemma3n": "correction_coefs, whose adapter would not be trained",
}
"""Layers that `all-linear` leaves out, by the kind of base, and why."""


@pytest.mark.parametrize(
    ("kind", "targets", "says"),
    TARGETS,
    ids=[f"{kind}-{targets}" for kind, targets, _ in TARGETS],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_targets_are_those_that_can_be_trained(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    targets: str,
    says: str | None,
    tied: bool,
) -> None:
    if not tied and "lm_head" not in targets:
        pytest.skip("the head is not a target")
    base = make_base(tiny_base, tmp_path / "base", kind, tie_word_embeddings=tied)
    rows = text_rows(tmp_path, 9)
    names = (f"model.name_or_path={base}", f"dataset.path={rows}")
    config = tiny(
        *PLAIN, *names, f"lora.target_modules={targets}", "trainer.engine=trl"
    )
    if says is not None:
        expected = f"lora.target_modules=…: {says}"
        refused_before_loading(config, tmp_path / "run", caplog, expected)
        return
    with caplog.at_level("INFO"):
        run(config, tmp_path / "run")
    assert final(tmp_path / "run")["status"] == "completed"
    prefix = "lora.target_modules=all-linear: without"
    lines = [line for line in caplog.messages if line.startswith(prefix)]
    without = WITHOUT.get(kind) if targets == "all-linear" else None
    assert lines == ([] if without is None else [f"{prefix} {without}"])


def test_a_config_that_is_no_json_is_refused(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    base = with_changed_json(tiny_base, tmp_path / "base")
    (base / "config.json").write_text("[1, 2]")
    with pytest.raises(
        ConfigError, match=r"model\.name_or_path=.*: its config\.json holds no map"
    ):
        run(tiny(*PLAIN, f"model.name_or_path={base}"), tmp_path / "run")


def test_a_plan_refuses_what_a_run_refuses(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    base = with_tokens(tiny_base, tmp_path / "base", *NEW)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a <new0> here"}] * 6)
    keys = [f"model.name_or_path={base}", f"dataset.path={rows}"]
    done = station.run(*PLAIN, *keys, module="finetune.plan", cwd=tmp_path)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "its embedding has 600 rows, but token 600 (<new0>) stands in" in line
