"""Queries, keys and values of one block of the GPU decoder: split, normalised, rotated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.rms_norm import (
    RmsNorm,
    read_norm,
    rms_norm,
    rms_norm_backward,
)
from finetune.engine.packed.gpu.rotary import apply_rotary
from finetune.model.decoder_blocks import DecoderBlock


@dataclass(frozen=True)
class _NormActivations:
    """Input and statistics of the norm of queries or keys."""

    x: torch.Tensor
    """[tokens · heads, head_dim]"""
    inverse_rms: torch.Tensor
    """[tokens · heads]"""


@dataclass(frozen=True)
class HeadActivations:
    """What the heads keep for their backward pass, by `q` and `k`; empty without norms."""

    norms: dict[str, _NormActivations]


class Heads:
    """From the outputs of the query, key and value layers to what attention takes, and back."""

    def __init__(
        self, module: Any, config: Any, block: DecoderBlock, layer_type: str | None
    ) -> None:
        """Read the settings.

        Args:
            module: Transformers' attention module.
            config: The base's text config.
            block: What the base's blocks are made of.
            layer_type: Selects the angles of the rotary embedding (`PassContext.angles`).
        """
        self.head_dim: int = module.head_dim
        query_columns = config.num_attention_heads * self.head_dim
        key_columns = config.num_key_value_heads * self.head_dim
        self._columns = [query_columns, key_columns, key_columns]
        """Of queries, keys and values."""
        self._is_joined = len(block.qkv) == 1
        """Whether one layer computes all three."""
        self._layer_type = layer_type
        # SmolLM3 has layers without the rotary embedding.
        self._rotary = bool(getattr(module, "use_rope", True))
        self._scales_queries = block.scales_queries
        self._norms: dict[str, RmsNorm] = {}
        """Of queries (`q`) and keys (`k`)."""
        if block.head_norms:
            for name in ("q", "k"):
                norm = getattr(module, f"{name}_norm")
                self._norms[name] = read_norm(norm, block)

    def forward(
        self, outputs: list[torch.Tensor], context: PassContext
    ) -> tuple[dict[str, torch.Tensor], HeadActivations]:
        """Compute queries, keys and values.

        Args:
            outputs: Of the query, key and value layers, or of the one layer that computes all
                three [tokens, columns]; overwritten, and the list is emptied.
            context: The pass.

        Returns:
            By `q`, `k` and `v` [tokens, heads, head_dim]; tokens may lie apart in memory. And the
            activations.
        """
        heads = dict(zip("qkv", self._split(outputs), strict=True))
        # `heads` alone refers to them now, so each is freed once a norm's output replaces it.
        outputs.clear()
        activations = {}
        for name, norm in self._norms.items():
            shape = heads[name].shape
            x = heads[name].view(-1, self.head_dim)
            y, inverse_rms, _ = rms_norm(x, norm)
            heads[name] = y.view(shape)
            activations[name] = _NormActivations(x, inverse_rms)
        if self._rotary:
            # In place: the backward pass needs the angles alone.
            for name in ("q", "k"):
                apply_rotary(heads[name], *context.angles[self._layer_type], 1.0)
        if self._scales_queries and context.query_scales is not None:
            heads["q"].mul_(context.query_scales)
        return heads, HeadActivations(activations)

    def _split(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views of the layers' outputs [tokens, heads, head_dim]."""
        if self._is_joined:
            outputs = torch.split(outputs[0], self._columns, 1)
        return [output.view(len(output), -1, self.head_dim) for output in outputs]

    def empty_gradients(
        self, heads: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Make room for the gradients of queries, keys and values.

        Args:
            heads: Queries, keys and values.

        Returns:
            The gradients of the layers' outputs [tokens, columns], as many as there are layers, and
            views of them in the shapes of the heads.
        """
        tokens = len(heads[0])
        sizes = [sum(self._columns)] if self._is_joined else self._columns
        outputs = [heads[0].new_empty(tokens, size) for size in sizes]
        return outputs, self._split(outputs)

    def rotation(
        self, context: PassContext
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines of the angles [tokens, rotary_dim]; None: nothing is rotated."""
        return context.angles[self._layer_type] if self._rotary else None

    def backward(
        self,
        gradients: Sequence[torch.Tensor],
        activations: HeadActivations,
        context: PassContext,
    ) -> None:
        """Turn gradients before the rotation into those of the layers' outputs, in place.

        Args:
            gradients: Of queries, keys and values, from `empty_gradients`.
            activations: From `forward`.
            context: The pass.
        """
        heads = dict(zip("qkv", gradients, strict=True))
        if self._scales_queries and context.query_scales is not None:
            heads["q"].mul_(context.query_scales)
        for name, norm_activations in activations.norms.items():
            gradient = heads[name].view(-1, self.head_dim)
            rms_norm_backward(
                gradient,
                norm_activations.x,
                self._norms[name],
                norm_activations.inverse_rms,
                grad_x=gradient,
            )
