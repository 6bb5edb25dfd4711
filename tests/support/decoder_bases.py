"""Small bases of every architecture that the GPU's decoder computes, and slots on them."""

from pathlib import Path
from typing import Any

SLOTS = (
    ("lora.r=4", "lora/target=all_linear", "lora.alpha=8"),
    ("lora.r=16", "lora/target=q_v", "lora.use_rslora=true"),
    ("lora.r=2", "lora.target_modules=[down_proj,o_proj]"),
)
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA4: dict[str, Any] = {
    "sliding_window": 6,
    "head_dim": 32,
    "global_head_dim": 64,
    "final_logit_softcapping": 5.0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 32},
    "qwen2": {},
    "mistral": {"sliding_window": 6},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "ministral3": {
        "sliding_window": 6,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 8,
        },
    },
    "phi3": {
        "sliding_window": 6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "qwen3_5_text": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
    },
    "gemma3_text": {
        "sliding_window": 6,
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    # Like E2B: two layers use the keys and values of the second, one those of the first.
    "gemma4_text": {
        **GEMMA4,
        "num_hidden_layers": 5,
        "layer_types": [SLIDING, FULL, SLIDING, FULL, FULL],
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 512,
    },
    # Like 31B.
    "gemma4_text (keys are values)": {
        **GEMMA4,
        "layer_types": [SLIDING, FULL, FULL],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
    },
}


def random_base(architecture: str, tiny_base: Path, folder: Path) -> Path:
    """A base of a few layers with random weights, beside the tokenizer of another."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_base, folder)
    shapes = AutoConfig.from_pretrained(folder).to_dict()
    wanted = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    shapes = {
        name: shapes[name]
        for name in (*wanted, "num_key_value_heads", "eos_token_id", "pad_token_id")
    }
    shapes["num_hidden_layers"] = (
        3  # with checkpointing the last is not computed again, and the first is the first
    )
    torch.manual_seed(0)
    model_type = architecture.partition(" ")[0]
    shapes |= ARCHITECTURES[architecture]
    fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shapes))
    for weight in fresh.parameters():
        if weight.ndim == 1:  # norms are all ones, biases all zero
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
    for name, scalar in fresh.named_buffers():
        if name.endswith("layer_scalar"):  # they are one
            scalar.copy_(0.5 + torch.rand(1))
    fresh.save_pretrained(folder)
    return folder
