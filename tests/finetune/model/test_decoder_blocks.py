"""Which bases the GPU's kernels compute, by their configs alone."""

from typing import Any

import pytest
from transformers import AutoConfig

from finetune.model.decoder_blocks import decoder_block_of

E2B = {"num_hidden_layers": 35, "num_kv_shared_layers": 20, "use_double_wide_mlp": True}


@pytest.mark.parametrize(
    ("model_type", "values", "is_supported"),
    [
        ("llama", {}, True),
        ("llama", {"hidden_act": "relu"}, False),
        ("llama", {"head_dim": 1024}, False),
        ("gpt2", {}, False),
        ("gemma3_text", {}, True),
        ("gemma3_text", {"use_bidirectional_attention": True}, False),
        ("gemma4_text", E2B, True),
        ("gemma4_text", {"attention_k_eq_v": True}, True),
        ("gemma4_text", {"use_bidirectional_attention": "vision"}, True),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, False),
        ("gemma4_text", {"enable_moe_block": True}, False),
        # Wider than any published one, in some of the layers alone.
        ("gemma4_text", {"global_head_dim": 1024}, False),
        # The text config of a published model.
        ("gemma4", {"text_config": {**E2B, "model_type": "gemma4_text"}}, True),
    ],
)
def test_a_config_says_whether_the_kernels_compute_a_base(
    model_type: str, values: dict[str, Any], is_supported: bool
) -> None:
    config = AutoConfig.for_model(model_type, **values)
    assert (decoder_block_of(config) is not None) is is_supported
