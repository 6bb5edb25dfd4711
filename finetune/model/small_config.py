"""A base's config with small sizes, to try out in a moment what the base's code computes.

Widths of heads, norms, activations, scalars and caps stay. Hidden sizes, vocabulary and windows
become small. Which layers stay is chosen in `layer_kinds`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.model.architectures import WINDOWS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VOCABULARY = 160
WINDOW = 8
"""Tokens that a token sees in layers with a window."""
INNER = 96
"""Width inside a feed-forward layer."""

INNER_NAMES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
"""What is in the names of keys for the width inside a feed-forward layer."""

OTHER_SIZES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "num_experts": 32,
    "num_local_experts": 32,
    "n_routed_experts": 32,
    # Tokens that a state space computes together, with memory for each pair of them.
    "chunk_size": 16,
    "mamba_chunk_size": 16,
}
"""Largest values of sizes that depend on no other one."""


WITHOUT_EFFECT = ("quantization_config", "auto_map", "dtype", "_name_or_path")
"""Keys that do not change what a base's code computes in float32."""


def narrow_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return a config with small sizes, and with all layers.

    Args:
        config: The text config of a base; it is not changed.

    Raises:
        Exception: The config's class does not accept the sizes; whatever it raises.
    """
    values = config.to_dict()
    for name in WITHOUT_EFFECT:
        values.pop(name, None)
    _shrink_heads(values, config)
    for name, value in values.items():
        values[name] = _shrunk(name, value)
    _fit_mamba_heads(values, _key(config, "hidden_size"))
    narrow: PreTrainedConfig = type(config).from_dict(values)
    return narrow


def config_with_layers(
    config: "PreTrainedConfig", selected: Sequence[int]
) -> "PreTrainedConfig":
    """Return a config with a few of its layers.

    Args:
        config: It is not changed.
        selected: Numbers of layers, in their order.
    """
    values = config.to_dict()
    layers = layer_count(config)
    for name, items in _lists_of_layers(values, layers).items():
        values[name] = [items[number] for number in selected]
    if values.get("per_layer_config"):
        config_of_layers = {}
        for new_number, number in enumerate(selected):
            keys = _keys_of_layer(values, number)
            if keys:
                config_of_layers[new_number] = dict(keys)
        values["per_layer_config"] = config_of_layers
    if _shared_layers(values):
        first = layers - _shared_layers(values)
        values["num_kv_shared_layers"] = sum(number >= first for number in selected)
    for name in _layer_count_keys(config):
        if name in values:
            values[name] = len(selected)
    small: PreTrainedConfig = type(config).from_dict(values)
    return small


def layer_count(config: "PreTrainedConfig") -> int:
    """Return how many blocks a base has."""
    for name in _layer_count_keys(config):
        count: int | None = getattr(config, name, None)
        if count is not None:
            return count
    raise ValueError("no number of layers")


def _layer_count_keys(config: "PreTrainedConfig") -> tuple[str, str]:
    """Return the keys that may hold the number of layers.

    LongCat's `num_hidden_layers` is twice its number of blocks, `num_layers`.
    """
    return ("num_layers", _key(config, "num_hidden_layers"))


def _key(config: "PreTrainedConfig", name: str) -> str:
    """Return the name that a config's class has for a size."""
    key: str = config.attribute_map.get(name, name)
    return key


def listed_kinds(config: "PreTrainedConfig") -> list[str]:
    """Return for each layer what tells it from others in the config.

    These are its items in lists of all layers, its own keys, and whether it uses the keys and
    values of a layer before it.
    """
    values = config.to_dict()
    layers = layer_count(config)
    lists = _lists_of_layers(values, layers).values()
    first_shared = layers - _shared_layers(values)
    kinds = []
    for number in range(layers):
        items = [value[number] for value in lists]
        keys = _keys_of_layer(values, number)
        kinds.append(repr([items, keys, number >= first_shared]))
    return kinds


def _lists_of_layers(values: Mapping[str, Any], layers: int) -> dict[str, list[Any]]:
    lists = {}
    for name, value in values.items():
        is_token = name.endswith(("token_id", "token_ids"))
        if isinstance(value, list) and len(value) == layers and not is_token:
            lists[name] = value
    return lists


def _keys_of_layer(values: Mapping[str, Any], number: int) -> Any:
    """The keys of one layer alone (`per_layer_config`, by the layer's number as text)."""
    config_of_layers: Mapping[Any, Any] = values.get("per_layer_config") or {}
    for key, keys in config_of_layers.items():
        if int(key) == number:
            return keys
    return None


def _shared_layers(values: Mapping[str, Any]) -> int:
    """How many of the last layers use the keys and values of layers before them (Gemma 4)."""
    return values.get("num_kv_shared_layers") or 0


def _shrink_heads(values: dict[str, Any], config: "PreTrainedConfig") -> None:
    """Reduce the number of heads, and with it the hidden size. The heads' width stays."""
    hidden: int = _size(values, config, "hidden_size")
    heads: int | None = _size(values, config, "num_attention_heads")
    if heads is None:
        raise ValueError("no attention heads")
    key_heads: int = _size(values, config, "num_key_value_heads") or heads
    head_dim: int = values.get("head_dim") or hidden // heads
    small_heads = 2 if key_heads == heads else 4
    small_hidden = small_heads * head_dim
    sizes = {
        "num_attention_heads": small_heads,
        "num_key_value_heads": _fewer(key_heads, heads, small_heads),
        "hidden_size": small_hidden,
    }
    for keys in (values.get("per_layer_config") or {}).values():
        if "num_key_value_heads" in keys:
            few = _fewer(keys["num_key_value_heads"], heads, small_heads)
            keys["num_key_value_heads"] = few
    # Other keys with the same number are the same size by another name.
    for name, value in values.items():
        is_size = isinstance(value, int) and not name.endswith(("_id", "_embeddings"))
        if is_size and value == hidden and not _is_inner(name):
            values[name] = small_hidden
    for name, size in sizes.items():
        key = _key(config, name)
        # Others are properties that follow from other keys, or None.
        if values.get(key) is not None:
            values[key] = size


def _size(values: Mapping[str, Any], config: "PreTrainedConfig", name: str) -> Any:
    """Return a size, also one that follows from other keys; None if a config has none."""
    key = _key(config, name)
    # Where layers have values of their own, the attribute can't be read (Gemma 4).
    return values[key] if key in values else getattr(config, name, None)


def _fit_mamba_heads(values: dict[str, Any], hidden_name: str) -> None:
    """Let the heads of Mamba layers be as wide together as the layers (Granite 4)."""
    width = values.get("mamba_d_head")
    if isinstance(width, int) and values.get("mamba_n_heads"):
        inner: int = values.get("mamba_expand", 1) * values[hidden_name]
        # A divisor of the layers' width stays one where the hidden size is a multiple of it.
        values["mamba_d_head"] = math.gcd(width, inner)
        values["mamba_n_heads"] = inner // values["mamba_d_head"]
        # The same width once more (Falcon H1).
        if "mamba_d_ssm" in values:
            values["mamba_d_ssm"] = inner


def _is_inner(name: str) -> bool:
    return any(part in name for part in INNER_NAMES)


def _fewer(key_heads: int, heads: int, small_heads: int) -> int:
    """Few key/value heads: one for each head, one for all, or one for two heads."""
    if key_heads == heads:
        return small_heads
    return 1 if key_heads == 1 else small_heads // 2


def _shrunk(name: str, value: Any) -> Any:
    """A value of the config, small if it is one of the sizes."""
    if isinstance(value, list) and _is_inner(name):
        return [_shrunk(name, item) for item in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if "vocab_size" in name:
        return VOCABULARY
    if name.endswith("token_id"):
        return value % VOCABULARY
    if _is_inner(name):
        return min(value, INNER)
    if name in WINDOWS:
        return min(value, WINDOW)
    limit = OTHER_SIZES.get(name)
    return value if limit is None else min(value, limit)
