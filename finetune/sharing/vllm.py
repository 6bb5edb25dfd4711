"""What vLLM serves of a run: adapters, ranks and flags that it takes.

Read in its version 0.33.0 (`vllm/config/lora.py`, `vllm/lora/peft_helper.py`) and recorded here;
`tests/sweeps/answer/test_serving.py` checks it against an installed vLLM.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank` from which all its versions take one that is large enough."""

PLAIN_INITIALIZATIONS = ("gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` after which the adapter is one of the unchanged base."""


def vllm_rank(rank: int) -> int:
    """Return the value of `--max-lora-rank` for adapters up to a rank."""
    return min(value for value in VLLM_RANKS if value >= rank)


def vllm_refusal(config: Mapping[str, Any]) -> str | None:
    """Return what vLLM does not serve of an adapter; None: it serves it.

    Ranks and scalings of single layers are among it, because only the newest versions read them.

    Args:
        config: the adapter's `adapter_config.json`.
    """
    initialization = config.get("init_lora_weights", True)
    is_plain = not isinstance(initialization, str)
    targets = config.get("target_modules") or []
    reasons = {
        "DoRA": config.get("use_dora"),
        "biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        f"init_lora_weights={initialization}": not is_plain
        and initialization.lower() not in PLAIN_INITIALIZATIONS,
        "ranks of single layers": config.get("rank_pattern"),
        "alphas of single layers": config.get("alpha_pattern"),
        "modules_to_save": config.get("modules_to_save"),
        "trained tokens": config.get("trainable_token_indices"),
        "adapters on experts": config.get("target_parameters"),
        "repeated layers": config.get("layer_replication"),
        "adapters on embeddings": not isinstance(targets, str)
        and any(name.endswith(("embed_tokens", "lm_head")) for name in targets),
        f"a rank above {VLLM_RANKS[-1]}": config["r"] > VLLM_RANKS[-1],
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def template_flag(variables: Mapping[str, Any]) -> str:
    """Return vLLM's flag for the variables that a chat template is rendered with, or nothing."""
    if not variables:
        return ""
    argument = shlex.quote(json.dumps(dict(variables)))
    return f" --default-chat-template-kwargs {argument}"
