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
MIXTURE = {
    **TINY,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
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
    "Qwen3Moe": {**MIXTURE, "decoder_sparse_step": 1},
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
        **MIXTURE,
        **LINEAR_ATTENTION,
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
        **LATENT,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
"""Name of the config's class without `Config`: its sizes."""


LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
SHORT_WINDOW = {"head_dim": 16, "sliding_window": 8}
PACKED: dict[str, dict[str, Any]] = {
    "Llama": TINY,
    "Mistral": {**TINY, "sliding_window": 8},
    "Qwen2": {
        **TINY,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "Qwen3": {**TINY, "head_dim": 32},
    "SmolLM3": {**TINY, "no_rope_layers": [1, 0]},
    "Gemma": {**TINY, "head_dim": 16},
    "Gemma2": {
        **TINY,
        **SHORT_WINDOW,
        **LAYERS,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 40,
    },
    "Gemma3Text": {**TINY, **SHORT_WINDOW, **LAYERS},
    "Gemma4Text": {
        **TINY,
        **SHORT_WINDOW,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "final_logit_softcapping": 3.0,
    },
    "Phi3": {**TINY, "sliding_window": 8},
    "Granite": {
        **TINY,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.4,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
    },
    "Ministral3": {
        **TINY,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "Olmo": TINY,
    "Olmo2": TINY,
    "Olmo3": {**TINY, **LAYERS, "sliding_window": 8},
    "Glm": {**TINY, "head_dim": 16},
    "Glm4": {**TINY, "head_dim": 16},
    "Cohere": {**TINY, "use_qk_norm": True, "logit_scale": 2.0},
    "Cohere2": {**TINY, **LAYERS, "sliding_window": 8, "logit_scale": 2.0},
    "SeedOss": {
        **TINY,
        "head_dim": 16,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    "Ernie4_5": {**TINY, "head_dim": 16, "use_bias": True},
    "HunYuanDenseV1": {**TINY, "head_dim": 16},
    "Exaone4": {**TINY, **LAYERS, "sliding_window": 8},
    "Starcoder2": {**TINY, "sliding_window": 8},
    "StableLm": {
        **TINY,
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
    "Nemotron": {**TINY, "head_dim": 16},
    "GPTNeoX": TINY,
    "Helium": {**TINY, "head_dim": 16},
    "Qwen3_5Text": {**TINY, **LINEAR_ATTENTION, "head_dim": 16},
    "Lfm2": {**TINY, "layer_types": ["conv", "full_attention"]},
    "Arcee": TINY,
    "Apertus": TINY,
    "Phi": {**TINY, "qk_layernorm": True},
    "GraniteSWA": {**TINY, **LAYERS, "sliding_window": 8, "logits_scaling": 0.4},
    "MiniCPM3": {
        **TINY,
        **LATENT,
        "dim_model_base": 16,
    },
    "HyperCLOVAX": {**TINY, "logits_scaling": 2.0},
    "Qwen3Moe": {**MIXTURE, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "GptOss": {**TINY, **SHORT_WINDOW, **LAYERS, **EXPERTS, "intermediate_size": 32},
    "GraniteMoe": {**TINY, **EXPERTS, "intermediate_size": 32, "logits_scaling": 0.4},
    "GraniteMoeHybrid": {
        **TINY,
        **EXPERTS,
        "intermediate_size": 32,
        "shared_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "Glm4MoeLite": {
        **MIXTURE,
        **LATENT,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "Mixtral": {**TINY, **EXPERTS, "intermediate_size": 32, "sliding_window": 8},
    "Qwen2Moe": {**MIXTURE, "shared_expert_intermediate_size": 32},
    "Olmoe": {**TINY, "num_experts": 4, "num_experts_per_tok": 2},
    "FalconH1": {
        **TINY,
        "mamba_d_ssm": 128,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
        "ssm_multipliers": [0.5, 2.0, 0.7, 1.5, 0.6],
        "key_multiplier": 0.6,
        "lm_head_multiplier": 0.4,
        "embedding_multiplier": 3.0,
    },
    "Gemma4Text with experts": {
        **MIXTURE,
        **SHORT_WINDOW,
        **LAYERS,
        "enable_moe_block": True,
        "num_experts_per_tok": None,
        "top_k_experts": 2,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "final_logit_softcapping": 3.0,
    },
    "Qwen3_5MoeText": {
        **MIXTURE,
        **LINEAR_ATTENTION,
        "shared_expert_intermediate_size": 32,
    },
    "DeepseekV3": ARCHITECTURES["DeepseekV3"],
    "Jamba": {**ARCHITECTURES["Jamba"], "num_experts": 4},
    "NemotronH": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "use_mamba_kernels": False,
    },
    "Gemma3nText": {
        **TINY,
        **SHORT_WINDOW,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "final_logit_softcapping": 3.0,
    },
}
"""Architectures that the packed engine trains, with values that change what they compute: windows
shorter than rows, caps, scalars, biases, layers of all kinds. Names of variants follow the class."""


def tiny_model(architecture: str, vocabulary: int, end: int) -> Any:
    """Create a model of an architecture, with weights so large that all it computes shows.

    Args:
        architecture: A key of `ARCHITECTURES` or `PACKED`.
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
    sizes = {**PACKED, **ARCHITECTURES}[architecture]
    config = config_class(**{**tokens, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model.eval()


def packed_model(architecture: str, vocabulary: int, end: int) -> Any:
    """Create a model of an architecture of `PACKED`, its norms and biases random too."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokens = {
        "vocab_size": vocabulary,
        "vocab_size_per_layer_input": vocabulary,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    config_class = getattr(transformers, f"{architecture.split()[0]}Config")
    sizes = PACKED[architecture]
    known = config_class().to_dict()
    settings = {
        name: value
        for name, value in {**tokens, **POSITIONS, **sizes}.items()
        if name in known or name in sizes
    }
    model = transformers.AutoModelForCausalLM.from_config(config_class(**settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn_like(weight) / weight.shape[-1] ** 0.5)
            else:
                weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()
