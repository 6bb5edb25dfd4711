"""A base's config with small sizes, to try out in a moment what the base's code computes.

Kept are all kinds of layers, widths of heads, norms, activations, scalars and caps. Layers of the
same kind, hidden sizes, vocabulary and windows become small.
"""

import math
from collections.abc import Mapping
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
}
"""Largest values of sizes that depend on no other one."""


WITHOUT_EFFECT = ("quantization_config", "auto_map", "dtype", "_name_or_path")
"""Keys that do not change what a base's code computes in float32."""


def small_config(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return the config of a small base of the same kind.

    Args:
        config: The text config of a base; it is not changed.

    Raises:
        Exception: The config's class does not accept the sizes; whatever it raises.
    """
    values = config.to_dict()
    for name in WITHOUT_EFFECT:
        values.pop(name, None)
    names = {name: config.attribute_map.get(name, name) for name in _SIZES}
    selected = _representative_layers(values, names["num_hidden_layers"])
    _keep_layers(values, names["num_hidden_layers"], selected)
    _shrink_heads(values, names)
    for name, value in values.items():
        values[name] = _shrunk(name, value)
    _fit_mamba_heads(values, names["hidden_size"])
    small: PreTrainedConfig = type(config).from_dict(values)
    return small


_SIZES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
)


def _representative_layers(values: Mapping[str, Any], layers_name: str) -> list[int]:
    """Return one layer of each kind, at least two layers, in their order."""
    layers: int = values[layers_name]
    seen = set()
    selected = []
    for number in range(layers):
        kind = repr(_kind_of_layer(values, layers, number))
        if kind not in seen:
            seen.add(kind)
            selected.append(number)
    if len(selected) < 2 <= layers:
        selected = [0, 1]
    return selected


def _kind_of_layer(values: Mapping[str, Any], layers: int, number: int) -> list[Any]:
    """What tells a layer from others: its items in lists of all layers, and its own keys."""
    kind = [value[number] for value in _lists_of_layers(values, layers).values()]
    kind.append(_keys_of_layer(values, number))
    kind.append(number >= layers - _shared_layers(values))
    return kind


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


def _keep_layers(values: dict[str, Any], layers_name: str, selected: list[int]) -> None:
    """Leave only the selected layers in a config."""
    layers: int = values[layers_name]
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
    values[layers_name] = len(selected)


def _shrink_heads(values: dict[str, Any], names: Mapping[str, str]) -> None:
    """Reduce the number of heads, and with it the hidden size. The heads' width stays."""
    hidden: int = values[names["hidden_size"]]
    heads: int | None = values.get(names["num_attention_heads"])
    if heads is None:
        raise ValueError("no attention heads")
    key_heads: int = values.get(names["num_key_value_heads"]) or heads
    head_dim: int = values.get("head_dim") or hidden // heads
    small_heads = 2 if key_heads == heads else 4
    small_hidden = small_heads * head_dim
    values[names["num_attention_heads"]] = small_heads
    if values.get(names["num_key_value_heads"]) is not None:
        values[names["num_key_value_heads"]] = _fewer(key_heads, heads, small_heads)
    for keys in (values.get("per_layer_config") or {}).values():
        if "num_key_value_heads" in keys:
            few = _fewer(keys["num_key_value_heads"], heads, small_heads)
            keys["num_key_value_heads"] = few
    # Other keys with the same number are the same size by another name.
    for name, value in values.items():
        is_size = isinstance(value, int) and not name.endswith(("_id", "_embeddings"))
        if is_size and value == hidden and not _is_inner(name):
            values[name] = small_hidden
    values[names["hidden_size"]] = small_hidden


def _fit_mamba_heads(values: dict[str, Any], hidden_name: str) -> None:
    """Let the heads of Mamba layers be as wide together as the layers (Granite 4)."""
    width = values.get("mamba_d_head")
    if isinstance(width, int) and values.get("mamba_n_heads"):
        inner: int = values.get("mamba_expand", 1) * values[hidden_name]
        # A divisor of the layers' width stays one where the hidden size is a multiple of it.
        values["mamba_d_head"] = math.gcd(width, inner)
        values["mamba_n_heads"] = inner // values["mamba_d_head"]


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
