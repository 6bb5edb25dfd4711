"""Fixtures of the tests of GGUF files."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.gguf_models import make_model

MakeModel = Callable[[str], Path]


@pytest.fixture
def make(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeModel:
    """Makes the folder of a tiny model of a kind, whose byte-level tokenizer has a name in llama.cpp:
    that of the rule by which it cuts texts."""
    from transformers import AutoTokenizer

    from finetune.model.gguf.pre_tokenizers import PRE_TOKENIZERS, TEXT

    def make_named(kind: str) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        folder = make_model(tmp_path / kind, kind, tokenizer)
        # Loaded by its model's class, which has a rule of its own for Qwen.
        ids = AutoTokenizer.from_pretrained(folder).encode(TEXT)
        digest = hashlib.sha256(str(ids).encode()).hexdigest()
        name = "qwen2" if kind.startswith("qwen") else "gpt-2"
        monkeypatch.setitem(PRE_TOKENIZERS, digest, name)
        return folder

    return make_named
