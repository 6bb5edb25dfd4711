"""Tiny models of the kinds that are written as GGUF files, with tokenizers of both kinds."""

from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-heads": ("Llama", {"head_dim": 32}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 256}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 6,
            "sliding_window": 8,
        },
    ),
}
"""The class of each kind of model and what differs from `SIZES`."""


def make_model(folder: Path, kind: str, tokenizer: Any) -> Path:
    """Save a model with random weights, large enough that each of them matters, and a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    name, changes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        # A few more than tokens: a model's class may add special tokens.
        **{**SIZES, "vocab_size": len(tokenizer) + 8, **changes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.15 if parameter.dim() > 1 else 0.5
            parameter.normal_(0.0, scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sentencepiece_like(adds_space: bool) -> Any:
    """A tokenizer as those of Gemma, or of Llama 2 with a space before every text: spaces as a
    letter, bytes as a fallback, a token at the beginning."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    from finetune.data.python_docs import question_answer_pairs

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    if adds_space:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    else:
        bpe.normalizer = spaces
        bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*special, *bytes_],
        show_progress=False,
    )
    texts = [text for row in question_answer_pairs() for text in row.values()]
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=without_special_bytes(bpe),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def without_special_bytes(bpe: Any) -> Any:
    """The trainer adds the bytes as special tokens; in SentencePiece's vocabularies they are none."""
    import json

    from tokenizers import Tokenizer

    values = json.loads(bpe.to_str())
    values["added_tokens"] = [
        token
        for token in values["added_tokens"]
        if not token["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(values))
