"""Tiny models of random weights, of many architectures."""

from typing import Any

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
POSITIONS = {"max_position_embeddings": 256}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
WINDOW = {"head_dim": 16, "sliding_window": 16}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": TINY,
    "Qwen3_5Text": {**TINY, **LINEAR_ATTENTION, "head_dim": 16},
    "GPTNeoX": {**TINY, **POSITIONS},
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "Gemma2": {**TINY, **WINDOW},
    "OPT": {
        **TINY,
        **POSITIONS,
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
    },
    "Lfm2": {**TINY, "layer_types": ["conv", "full_attention"]},
    "GptOss": {**TINY, **WINDOW, **EXPERTS},
    "Gemma3Text": {
        **TINY,
        **WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Phi3": {**TINY, "sliding_window": 16, "pad_token_id": None},
    "Olmo2": TINY,
    "FalconMamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "Mamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 16,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "Starcoder2": {**TINY, **POSITIONS, "sliding_window": 16},
    "RecurrentGemma": {
        **TINY,
        "lru_width": 64,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "Granite": TINY,
    "GPT2": GPT2,
    "Qwen3Moe": {
        **TINY,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "Mixtral": {**TINY, **EXPERTS, "sliding_window": 16},
    "GPTNeo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
        **POSITIONS,
    },
    "Mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "Falcon": {**TINY, "alibi": True, "new_decoder_architecture": False},
    "CodeGen": {**GPT2, "rotary_dim": 8},
    "GPTBigCode": GPT2,
    "Cohere2": {**TINY, "sliding_window": 16},
    "Gemma": {**TINY, "head_dim": 16},
    "Qwen3Next": {
        **TINY,
        **LINEAR_ATTENTION,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64},
    "XGLM": {
        "d_model": 64,
        "ffn_dim": 128,
        "num_layers": 2,
        "attention_heads": 4,
        **POSITIONS,
    },
    "BertGeneration": {**TINY, **POSITIONS, "is_decoder": True},
    "Jamba": {
        **TINY,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "DeepseekV3": {
        **TINY,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
}
"""Name of the config's class without `Config`: its sizes."""


def tiny_model(architecture: str, vocabulary: int, end: int) -> Any:
    """Create a model of an architecture, with weights so large that all it computes shows.

    Args:
        architecture: A key of `ARCHITECTURES`.
        vocabulary: Number of tokens.
        end: Id of the end token.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    tokens = {
        "vocab_size": vocabulary,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    config_class = getattr(transformers, f"{architecture}Config")
    config = config_class(**{**tokens, **ARCHITECTURES[architecture]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model.eval()
