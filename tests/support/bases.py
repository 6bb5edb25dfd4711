"""Tiny bases of several kinds, and bases whose files are changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.architectures import PACKED
from support.models import with_tokenizer_of

VOCABULARY = 600
"""Tokens of the tiny base's tokenizer."""

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **HEADS}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}
EXPERTS = {
    **SHAPE,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SHAPE, "max_position_embeddings": 40}),
    "mistral": (
        "Mistral",
        {**SHAPE, "max_position_embeddings": 400, "sliding_window": 16},
    ),
    "gpt2": ("GPT2", {**GPT, "n_positions": 40}),
    "gptj": ("GPTJ", {**GPT, "n_positions": 40, "rotary_dim": 8}),
    "opt": (
        "OPT",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
        },
    ),
    "bloom": ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mamba": ("Mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "falcon_mamba": (
        "FalconMamba",
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    ),
    "gemma3n": (
        "Gemma3nText",
        {**PACKED["Gemma3nText"], "vocab_size_per_layer_input": VOCABULARY},
    ),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
}


def make_base(tiny_base: Path, folder: Path, kind: str, **changes: Any) -> Path:
    """Save a tiny random base of a kind, with the tiny base's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    name, shape = KINDS[kind]
    end = {"eos_token_id": 1, "pad_token_id": None, "bos_token_id": None}
    config = getattr(transformers, f"{name}Config")(
        **{"vocab_size": VOCABULARY, **end, **shape, **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    return with_tokenizer_of(tiny_base, model, folder)


def quantized_base(base: Path, folder: Path, **arguments: Any) -> Path:
    """Save a base as bitsandbytes quantises it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**arguments)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    return with_tokenizer_of(base, model, folder)


def with_changed_weights(
    base: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Path:
    """Copy a base with other names or tensors in its weight file."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def with_changed_json(
    base: Path, folder: Path, file: str = "config.json", **changes: Any
) -> Path:
    """Copy a base with other values in one of its JSON files; None removes a key."""
    shutil.copytree(base, folder)
    values = json.loads((folder / file).read_text())
    values |= changes
    values = {key: value for key, value in values.items() if value is not None}
    (folder / file).write_text(json.dumps(values))
    return folder
