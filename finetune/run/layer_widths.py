"""The widths of a base's layers, which memory is counted by."""

from dataclasses import dataclass, replace
from typing import Any

from finetune.model.architectures import largest_value
from finetune.run.expert_costs import ExpertShape, expert_shape, mean_inner_width


@dataclass(frozen=True)
class Widths:
    """Elements that one token has in the tensors of a layer."""

    hidden: int
    """Between layers, and in the norms."""
    queries: int
    keys: int
    """Its keys; the values have as many."""
    inner: int
    """Inside a feed-forward layer; of a mixture outside of its experts, the layers' mean."""
    experts: ExpertShape | None = None
    shares_keys: bool = False
    """Whether it has no keys and values of its own, but those of an earlier layer (Gemma 4)."""


def read_widths(shapes: Any, base: Any = None) -> Widths:
    """Read the widths of a base's text config, with transformers' defaults.

    Args:
        shapes: The config.
        base: The base, with or without weights and adapters, for its experts; None: it has none.
    """
    hidden: int = shapes.hidden_size
    heads: int = shapes.num_attention_heads
    key_heads: int = largest_value(shapes, "num_key_value_heads") or heads
    head_size: int = largest_value(shapes, "head_dim") or hidden // heads
    # Keys that are expanded from a few columns (MLA), for each head.
    expanded: int | None = largest_value(shapes, "qk_nope_head_dim")
    if expanded:
        head_size = expanded + (largest_value(shapes, "qk_rope_head_dim") or 0)
    inner: int = largest_value(shapes, "intermediate_size") or 4 * hidden
    experts = None
    if base is not None:
        experts = expert_shape(base, shapes.num_hidden_layers)
    if experts is not None:
        inner = mean_inner_width(base, shapes.num_hidden_layers)
    return Widths(
        hidden,
        heads * head_size,
        key_heads * head_size,
        inner,
        experts,
    )


def widths_by_layer(shapes: Any) -> list[Widths]:
    """Read the widths of each layer of a base that the GPU's decoder computes.

    Args:
        shapes: The base's text config.
    """
    layers: int = shapes.num_hidden_layers
    if not getattr(shapes, "is_heterogeneous", False):
        widths = [read_widths(shapes)] * layers
    else:
        widths = [read_widths(layer) for layer in shapes.per_layer_config]
    # The last layers of Gemma 4.
    first_sharing = layers - (getattr(shapes, "num_kv_shared_layers", None) or 0)
    growth = 2 if getattr(shapes, "use_double_wide_mlp", False) else 1
    for number in range(first_sharing, layers):
        layer = widths[number]
        widths[number] = replace(
            layer, keys=0, inner=growth * layer.inner, shares_keys=True
        )
    return widths
