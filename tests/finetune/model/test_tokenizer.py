"""Tokenizers without a pad token, an end or a default template, and what is saved of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.bases import make_base, with_changed_json
from support.models import CHATML, load_tokenizer
from support.runs import SHORT, Tiny, final, write_jsonl

from finetune.errors import ConfigError
from finetune.model.tokenizer import save_tokenizer
from finetune.run.run import run

pytestmark = pytest.mark.usefixtures("fresh_cache")

FILE = "tokenizer_config.json"


def saved_with(tiny_base: Path, folder: Path, **values: Any) -> Path:
    """The tiny base with other values of its tokenizer; None removes one."""
    shutil.copytree(tiny_base, folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for name, value in values.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


KINDS: dict[str, dict[str, Any]] = {
    "no pad": {"pad_token": None},
    "the end as pad": {"pad_token": "<|im_end|>"},
    "another pad": {"pad_token": "<|im_start|>"},
    "pads on the left": {"padding_side": "left"},
    "a beginning": {"bos_token": "<|im_start|>"},
    "no end": {"eos_token": None, "pad_token": None},
    "no end, but a pad": {"eos_token": None, "pad_token": "<|im_start|>"},
}
SPECIAL = (
    "eos_token",
    "pad_token",
    "bos_token",
    "unk_token",
    "padding_side",
    "chat_template",
)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_bases_special_tokens_are_saved_unchanged(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    from transformers import AutoTokenizer

    base = saved_with(tiny_base, tmp_path / "base", **KINDS[kind])
    tokenizer = load_tokenizer(tiny(f"model.name_or_path={base}"))
    used = (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side)
    assert used == ("<|im_end|>", "<|im_end|>", "right")
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == used
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    original = AutoTokenizer.from_pretrained(base)
    for name in SPECIAL:
        assert getattr(saved, name) == getattr(original, name), name
    assert saved.backend_tokenizer.to_str() == original.backend_tokenizer.to_str()


def test_a_runs_adapter_has_them_too(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    base = saved_with(tiny_base, tmp_path / "base", pad_token=None)
    for engine in ("packed", "trl"):
        folder = tmp_path / engine
        overrides = (f"model.name_or_path={base}", f"trainer.engine={engine}")
        run(tiny(*overrides, "quantization=none", *SHORT), folder)
        values = json.loads((folder / "adapter" / FILE).read_text())
        assert values.get("pad_token") is None
        assert (folder / "adapter" / "chat_template.jinja").read_text() == CHATML


def test_no_end_is_taken_from_the_bases_config_without_a_template(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = saved_with(tiny_base, tmp_path / "base", eos_token=None, chat_template=None)
    (base / "chat_template.jinja").unlink()
    with caplog.at_level("INFO"):
        tokenizer = load_tokenizer(tiny(f"model.name_or_path={base}"))
    assert tokenizer.eos_token == "<|im_end|>"
    assert (
        "tokenizer: it names no end token; <|im_end|> ends an answer" in caplog.messages
    )

    without = with_changed_json(base, tmp_path / "without", eos_token_id=[])
    with pytest.raises(
        ConfigError, match=r"^model\.name_or_path=.*: its tokenizer has no end tok"
    ):
        load_tokenizer(tiny(f"model.name_or_path={without}"))


TWO = {"rag": CHATML, "tool_use": CHATML.replace("im_start", "im_end")}


@pytest.fixture
def several(tiny_base: Path, tmp_path: Path) -> Path:
    """A base whose tokenizer has two templates and no default."""
    base = tmp_path / "several"
    shutil.copytree(tiny_base, base)
    (base / "chat_template.jinja").unlink()
    return saved_in_place(tiny_base, base, TWO)


def saved_in_place(tiny_base: Path, folder: Path, templates: dict[str, str]) -> Path:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", list(TWO))
def test_a_template_is_chosen_by_name(tiny: Tiny, several: Path, name: str) -> None:
    overrides = (f"model.name_or_path={several}", f"model.chat_template={name}")
    assert load_tokenizer(tiny(*overrides)).chat_template == TWO[name]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            "null",
            "null: the tokenizer has several and no default; allowed: …, or Jinja text",
        ),
        (
            "default",
            "default: the tokenizer has no such template; allowed: …, or Jinja text",
        ),
        (
            "chatml",
            "chatml: the tokenizer has no such template; allowed: …, or Jinja text",
        ),
        ("RAG", "RAG: the tokenizer has no such template; allowed: …, or Jinja text"),
        (
            "template.jinja",
            "template.jinja: the tokenizer has no such template; allowed: …",
        ),
        ("' '", " : must be Jinja text, or null"),
    ],
)
def test_a_template_that_is_not_there_is_refused_with_those_there_are(
    tiny: Tiny, several: Path, tmp_path: Path, value: str, says: str
) -> None:
    from support.bad_input import matches

    config = tiny(
        f"model.name_or_path={several}", f"model.chat_template={value}", *SHORT
    )
    with pytest.raises(ConfigError) as refused:
        run(config, tmp_path / "run")
    message = str(refused.value)
    assert matches(f"model.chat_template={says}", message), message
    if "…" in says:
        assert "rag" in message
        assert "tool_use" in message


def test_a_default_among_several_is_used(
    tiny: Tiny, tiny_base: Path, several: Path
) -> None:
    saved_in_place(tiny_base, several, {"default": CHATML, "tool_use": TWO["tool_use"]})
    tokenizer = load_tokenizer(tiny(f"model.name_or_path={several}"))
    assert tokenizer.get_chat_template() == CHATML


def test_a_name_where_there_is_one_template_is_refused(
    tiny: Tiny, tiny_base: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.chat_template=rag: .*; allowed: default, or Ji"
    ):
        load_tokenizer(tiny("model.chat_template=rag"))


@pytest.mark.slow
def test_a_tokenizer_without_a_backend_trains(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    base = make_base(tiny_base, tmp_path / "base", "llama", vocab_size=len(tokenizer))
    for file in base.glob("*token*"):
        file.unlink()
    (base / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(base)
    rows = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"prompt": f"What is {n}?", "completion": "It."} for n in range(9)],
    )
    config = tiny(
        f"model.name_or_path={base}",
        f"dataset.path={rows}",
        "dataset.eval_fraction=0",
        "dataset.test_fraction=0",
        "quantization=none",
        *SHORT,
    )
    run(config, tmp_path / "run")
    assert final(tmp_path / "run")["status"] == "completed"
