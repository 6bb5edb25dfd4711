"""What mixtures of experts take in memory, from the base's shapes alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.compat import gate_of_experts
from finetune.config.schema import RunConfig
from finetune.model.base_quantization import BaseQuantization, is_quantized_again
from finetune.model.experts import (
    DENSE_BYTES,
    ExpertWeight,
    expert_modules,
    weight_names,
)
from finetune.model.quantization import compute_dtype
from finetune.model.quantized_layers import expert_weights, quantizable_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHOSEN = ("top_k", "num_experts_per_tok")
"""What modules call the number of experts that a token is routed to."""

INDEX_ELEMENTS = 8
"""Of each pair of a token and an expert: its weight and three 64-bit numbers, in float32s."""

ROUTER_ELEMENTS = 4
"""Of each expert: a token's router logit, its probability and their copies."""


def quantized_expert_count(
    skeleton: "PreTrainedModel", config: RunConfig, files: BaseQuantization | None
) -> int:
    """Return how many weights of experts are in 4 bits when the base is loaded.

    Args:
        skeleton: The base without weights.
        config: The run's config.
        files: The quantization of the base's files.
    """
    settings = config.quantization
    is_loaded_as_it_is = files is not None and not is_quantized_again(files, settings)
    if not settings.load_in_4bit or is_loaded_as_it_is:
        return 0
    return sum(weight.numel() for weight in quantizable_experts(skeleton).values())


def expert_bytes(
    skeleton: "PreTrainedModel", config: RunConfig, files: BaseQuantization | None
) -> int:
    """Return the bytes of experts that stay in 16 bits (on a CPU 32) in a quantised base.

    0 for a base that is not quantised.
    """
    if not config.quantization.is_quantized:
        return 0
    weights = sum(weight.numel() for weight in expert_weights(skeleton).values())
    weights -= quantized_expert_count(skeleton, config, files)
    return weights * compute_dtype(config.quantization).itemsize


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a base, in elements for each token; they are taken to be alike."""

    share: float
    """Of the layers, those with experts."""
    pairs: int
    """Experts of a token."""
    hidden: int
    up: int
    """Outputs of an expert's first product: of a gated one twice as many as `inner`."""
    inner: int
    experts: int
    """Of a layer."""
    largest: int
    """Elements of the larger of an expert's two matrices."""
    has_bias: bool
    activation: int
    """Values of `inner` elements that the activation computes before the first is freed."""

    @property
    def stored(self) -> float:
        """What a layer keeps for the backward pass, on the average of all layers."""
        layer = self.pairs * (self.up + INDEX_ELEMENTS) + ROUTER_ELEMENTS * self.experts
        return self.share * layer

    @property
    def passing(self) -> int:
        """What the backward pass of one layer needs at its widest place."""
        # Gradients of the outputs, and of the activation its inputs, values and gradients.
        outputs = (3 if self.has_bias else 1) * self.hidden
        return self.pairs * (outputs + self.up + 4 * self.inner)

    @property
    def evaluating(self) -> int:
        """What one layer needs without a backward pass."""
        return self.pairs * (
            self.up + max(3 * self.hidden, self.activation * self.inner)
        )

    def buffer_bytes(self, config: RunConfig, dequantized: bool) -> int:
        """Return the bytes of the experts that are dequantised at once.

        Args:
            config: The run's config.
            dequantized: Whether all of them are dequantised already.
        """
        if dequantized or not config.quantization.load_in_4bit:
            return 0
        expert = self.largest * compute_dtype(config.quantization).itemsize
        at_once = max(1, DENSE_BYTES // expert)
        return int(expert * min(at_once, self.experts))


def expert_shape(model: Any, layers: int) -> ExpertShape | None:
    """Read the shape of a base's experts; None if it has none that are computed by `experts`.

    Args:
        model: The base, with or without weights and adapters.
        layers: Number of its layers.
    """
    modules = expert_modules(model)
    if not modules:
        return None
    name, experts = next(iter(modules.items()))
    first, last = (ExpertWeight(experts, each) for each in weight_names(experts))
    count, hidden, up = first.shape
    _, inner, _ = last.shape
    # Adapters on experts are wrapped around them.
    parent_name = name.replace(".base_layer", "").rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    return ExpertShape(
        share=len(modules) / layers,
        pairs=max(_chosen(parent), default=1),
        hidden=hidden,
        up=up,
        inner=inner,
        experts=count,
        largest=hidden * max(up, inner),
        has_bias=bool(experts.has_bias),
        # One of its own kind clamps, scales and shifts (gpt-oss).
        activation=5 if gate_of_experts(experts).__name__ == "_apply_gate" else 2,
    )


def _chosen(parent: Any) -> Iterator[int]:
    """Yield how many experts a token is routed to, as the modules around them say."""
    for module in parent.modules():
        for name in CHOSEN:
            value = getattr(module, name, None)
            if isinstance(value, int):
                yield value


def mean_inner_width(decoder: Any, layers: int) -> int:
    """Return the mean width of feed-forward layers outside of the experts, of all layers.

    They are those of layers without experts, and experts that all tokens are routed to.
    """
    widths: list[int] = [
        module.in_features
        for name, module in decoder.named_modules()
        if name.endswith(("down_proj", "output_linear"))
        and hasattr(module, "in_features")
    ]
    return sum(widths) // layers
