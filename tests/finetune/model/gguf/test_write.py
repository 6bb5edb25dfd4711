"""GGUF files hold the model: loaded again, they predict what it predicts, and else are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import KINDS, make_model, sentencepiece_like
from support.models import CHATML

from finetune.errors import ConfigError
from finetune.model.gguf import vocabulary, write
from finetune.model.gguf.architectures import ARCHITECTURES, unsupported
from finetune.model.gguf.check import LIMITS, check_gguf
from finetune.model.gguf.write import write_gguf

MakeModel = Callable[[str], Path]


def fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {key: each.contents() for key, each in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_predicts_what_its_model_predicts(
    kind: str, make: MakeModel, tmp_path: Path
) -> None:
    model = make(kind)
    file = tmp_path / "model.gguf"
    write_gguf(model, file, "float32", "tiny")

    comparison = check_gguf(model, file, "float32")

    assert comparison is not None
    assert comparison.divergence < 1e-9
    assert comparison.largest_difference < 1e-3


@pytest.mark.parametrize("file_type", ["float16", "bfloat16", "q8_0"])
def test_other_types_differ_by_their_rounding(
    file_type: str, make: MakeModel, tmp_path: Path
) -> None:
    from gguf import GGUFReader

    model = make("llama")
    file = tmp_path / "model.gguf"
    write_gguf(model, file, file_type, "tiny")

    # A model in float32, so that what is left is the file's rounding.
    comparison = check_gguf(model, file, "q8_0")

    assert comparison is not None
    assert 0 < comparison.divergence < LIMITS["q8_0"]
    types = {each.name: each.tensor_type.name for each in GGUFReader(file).tensors}
    stored = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[file_type]
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == stored
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_rows_that_are_no_multiple_of_a_block_get_16_bits() -> None:
    from gguf import GGMLQuantizationType as Types

    assert write.stored_type("a.weight", (8, 96), Types.Q8_0) == Types.Q8_0
    assert write.stored_type("a.weight", (8, 80), Types.Q8_0) == Types.F16
    assert write.stored_type("a_norm.weight", (8, 96), Types.Q8_0) == Types.F32
    assert write.stored_type("a.bias", (96,), Types.Q8_0) == Types.F32


@pytest.mark.parametrize(("kind", "adds_space"), [("gemma3", False), ("llama", True)])
def test_a_vocabulary_as_sentencepiece_trains_it_cuts_texts_alike(
    kind: str, adds_space: bool, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", kind, sentencepiece_like(adds_space))
    file = tmp_path / "model.gguf"
    write_gguf(model, file, "float32", "tiny")

    assert check_gguf(model, file, "float32") is not None
    values = fields(file)
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.pre"] == "default"
    assert values["tokenizer.ggml.add_space_prefix"] is adds_space
    assert values["tokenizer.ggml.add_bos_token"] is True
    types = dict(
        zip(
            values["tokenizer.ggml.tokens"],
            values["tokenizer.ggml.token_type"],
            strict=True,
        )
    )
    kinds = [types[token] for token in ("<bos>", "<unk>", "<0x41>", "in")]
    assert kinds == [3, 2, 6, 1]


BOS_FIRST = "{% if first %}{{ bos_token }}{% endif %}" + CHATML
"""Begins with the BOS token if a variable of the run says so."""


@pytest.mark.parametrize(
    ("template", "variables", "adds_bos"),
    [
        (None, {}, True),
        ("{{ bos_token }}" + CHATML, {}, True),
        (CHATML, {}, False),
        (BOS_FIRST, {"first": True}, True),
        (BOS_FIRST, {}, False),
        ("{{ raise_exception('no chat') }}", {}, True),
    ],
)
def test_chats_get_a_bos_token_only_where_they_were_trained_with_it(
    template: str | None, variables: dict[str, Any], adds_bos: bool, tmp_path: Path
) -> None:
    tokenizer = sentencepiece_like(adds_space=True)
    tokenizer.chat_template = template
    model = make_model(tmp_path / "model", "llama", tokenizer)
    file = tmp_path / "model.gguf"
    write_gguf(model, file, "float32", "tiny", variables)

    assert fields(file)["tokenizer.ggml.add_bos_token"] is adds_bos
    # The comparison does not take the missing token for a fault.
    assert check_gguf(model, file, "float32", variables) is not None


def test_a_file_of_the_converter_loses_the_bos_token(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", sentencepiece_like(True))
    file = tmp_path / "model.gguf"
    write_gguf(model, file, "float32", "tiny")
    before = fields(file)
    assert before["tokenizer.ggml.add_bos_token"] is True

    vocabulary.remove_bos(file)

    assert fields(file) == before | {"tokenizer.ggml.add_bos_token": False}


def test_the_metadata_has_tokens_template_and_ends_of_answers(
    make: MakeModel, tmp_path: Path
) -> None:
    model = make("mistral")
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    file = tmp_path / "model.gguf"
    write_gguf(model, file, "float16", "tiny fine-tuned")

    values = fields(file)
    assert values["general.name"] == "tiny fine-tuned"
    assert values["general.architecture"] == "llama"
    # llama.cpp has no window for Mistral.
    assert values["llama.context_length"] == 256
    assert values["tokenizer.chat_template"] == CHATML
    assert values["tokenizer.ggml.eos_token_id"] == 1
    assert values["tokenizer.ggml.eot_token_id"] == 7
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.ggml.tokens"][:2] == ["<|im_start|>", "<|im_end|>"]
    assert values["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert len(values["tokenizer.ggml.merges"]) > 200


def test_embeddings_without_a_token_get_an_unused_one(make: MakeModel) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make("llama"))
    made = vocabulary.read_vocabulary(tokenizer, len(tokenizer) + 2)
    assert made.tokens[-1] == f"[PAD{len(tokenizer) + 1}]"
    assert made.types[-1] == 5
    with pytest.raises(ConfigError, match="the model has 10 embeddings"):
        vocabulary.read_vocabulary(tokenizer, 10)


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(
    tiny_base: Path,
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    with pytest.raises(ConfigError, match="that has no name in llama"):
        vocabulary.read_vocabulary(tokenizer, len(tokenizer))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        ("rows", "its predictions differ by"),
        ("norms", "its predictions differ by"),
        ("tokens", "its tokenizer gives other ids"),
        ("rotary", "its rotary base is 12345"),
    ],
)
def test_a_file_that_is_not_the_model_is_refused(
    spoil: str,
    problem: str,
    make: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = "gemma3" if spoil == "norms" else "llama"
    model = make(kind)
    if spoil == "rows":
        monkeypatch.setattr(write._Weights, "_interleave", lambda _, tensor, __: tensor)
    elif spoil == "norms":
        plain = ARCHITECTURES["qwen2"]
        monkeypatch.setitem(
            write.ARCHITECTURES, "gemma3_text", type(plain)("gemma3", norm_offset=0.5)
        )
    elif spoil == "tokens":
        pairs = vocabulary._pairs
        monkeypatch.setattr(vocabulary, "_pairs", lambda each: list(pairs(each))[9:])
    else:
        add = write.add_settings

        def wrong_base(writer: Any, config: Any) -> None:
            config.rope_parameters["rope_theta"] = 12345.0
            add(writer, config)

        monkeypatch.setattr(write, "add_settings", wrong_base)
    file = tmp_path / "model.gguf"
    write_gguf(model, file, "float32", "tiny")

    with pytest.raises(ConfigError, match=problem):
        check_gguf(model, file, "float32")


QWEN = {"model_type": "qwen2", "num_hidden_layers": 2}
GEMMA = {"model_type": "gemma3_text", "num_hidden_layers": 7}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "smollm3"}, "the architecture smollm3 (not one of llama, "),
        (QWEN | {"use_sliding_window": True}, "qwen2 with a sliding window"),
        (QWEN | {"hidden_act": "gelu"}, "qwen2 with the activation gelu"),
        (
            QWEN | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "qwen2 with rotary positions scaled by yarn",
        ),
        (GEMMA | {"query_pre_attn_scalar": 168}, "a scale of queries"),
        (GEMMA | {"layer_types": ["full_attention"] * 7}, "global layers are not"),
        (GEMMA | {"sliding_window_pattern": 2}, "global layers are not every 6th"),
    ],
)
def test_what_llama_cpp_computes_in_another_way_is_refused(
    values: dict[str, Any], reason: str
) -> None:
    assert reason in str(unsupported(values))


@pytest.mark.parametrize("values", [QWEN, GEMMA, {"model_type": "llama"}])
def test_usual_settings_are_written(values: dict[str, Any]) -> None:
    assert unsupported(values) is None
