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
from finetune.engine.packed.gpu.rotated_norm import rotated_norm
from finetune.engine.packed.gpu.shared_heads import SharedHeads
from finetune.model.decoder_blocks import DecoderBlock


@dataclass(frozen=True)
class _NormActivations:
    """Input and statistics of the norm of queries, keys or values."""

    x: torch.Tensor
    """[tokens · heads, head_dim]"""
    inverse_rms: torch.Tensor
    """[tokens · heads]"""


@dataclass(frozen=True)
class HeadActivations:
    """What the heads keep for their backward pass."""

    norms: dict[str, _NormActivations]
    """By `q`, `k` and `v`, of those that are normalised."""
    gate: torch.Tensor | None
    """Of attention's output, before the sigmoid [tokens · heads, head_dim]; None: there is none."""


@dataclass(frozen=True)
class HeadGradients:
    """Room for the gradients of the query, key and value layers' outputs."""

    outputs: list[torch.Tensor]
    """[tokens, columns], as many as there are layers."""
    heads: list[torch.Tensor]
    """Of queries, keys and values [tokens, heads, head_dim]: views of the outputs, but for queries
    beside a gate, and for keys and values that no layer computes."""
    gate: torch.Tensor | None
    """Of the gate, a view of the queries' output [tokens · heads, head_dim]."""


class Heads:
    """From the outputs of the query, key and value layers to what attention takes, and back."""

    def __init__(
        self,
        module: Any,
        projections: Sequence[str],
        config: Any,
        block: DecoderBlock,
        layer_type: str | None,
    ) -> None:
        """Read the settings.

        Args:
            module: Transformers' attention module.
            projections: Those of `block.qkv` that the module has.
            config: The base's text config.
            block: What the base's blocks are made of.
            layer_type: Selects the angles of the rotary embedding (`PassContext.angles`).
        """
        self.head_dim: int = module.head_dim
        self._query_columns = config.num_attention_heads * self.head_dim
        self._key_columns = self._query_columns // module.num_key_value_groups
        self._is_joined = len(block.qkv) == 1
        """Whether one layer computes all three."""
        self._computed = "qkv" if self._is_joined else "qkv"[: len(projections)]
        """Those of queries, keys and values that have a layer."""
        self._is_reused = bool(getattr(module, "store_full_length_kv", False))
        """Whether later layers use its keys and values too."""
        self._has_gate = block.has_output_gate
        self._layer_type = layer_type
        # SmolLM3 has layers without the rotary embedding.
        self._rotary = bool(getattr(module, "use_rope", True))
        self._scales_queries = block.scales_queries
        self._norms: dict[str, RmsNorm] = {}
        """Of queries (`q`), keys (`k`) and values (`v`)."""
        if block.has_head_norms:
            for name in self._computed[:2]:
                norm = getattr(module, f"{name}_norm")
                self._norms[name] = read_norm(norm, block)
        if block.has_value_norm and "k" in self._norms:
            weight = torch.ones_like(self._norms["k"].weight)
            self._norms["v"] = RmsNorm(weight, module.v_norm.eps, rounds_last=True)

    def forward(
        self, outputs: list[torch.Tensor], context: PassContext
    ) -> tuple[dict[str, torch.Tensor], HeadActivations]:
        """Compute queries, keys and values.

        Args:
            outputs: Of the query, key and value layers that there are, or of the one layer that
                computes all three [tokens, columns]; overwritten, and the list is emptied.
            context: The pass.

        Returns:
            By `q`, `k` and `v` [tokens, heads, head_dim]; tokens may lie apart in memory. And the
            activations.
        """
        tokens = len(outputs[0])
        gate = None
        if self._has_gate:
            # Beside each head's queries; they are normalised, so they get memory of their own.
            queries, gate = self._beside_gate(outputs[0])
            parts = [queries, *self._as_heads(outputs[1:])]
        else:
            parts = self._as_heads(self._split(outputs))
        heads = dict(zip(self._computed, parts, strict=True))
        if self._computed == "qk":
            # Before the norms, which differ.
            heads["v"] = heads["k"]
        # `heads` alone refers to them now, so each is freed once a norm's output replaces it.
        outputs.clear()
        parts.clear()
        activations = {}
        rotation = self.rotation(context)
        rotated = self._computed[:2]
        for name, norm in self._norms.items():
            x = heads[name]
            if x.dim() == 3:
                x = x.view(-1, self.head_dim)
            if rotation is not None and name in rotated:
                y, inverse_rms = rotated_norm(x, norm, *rotation)
            else:
                y, inverse_rms, _ = rms_norm(x, norm)
            (heads[name],) = self._as_heads([y.view(tokens, -1)])
            activations[name] = _NormActivations(x, inverse_rms)
            del x, y
        if rotation is not None:
            # In place: the backward pass needs the angles alone.
            for name in rotated:
                if name not in self._norms:
                    apply_rotary(heads[name], *rotation, 1.0)
        if self._scales_queries and context.query_scales is not None:
            heads["q"].mul_(context.query_scales)
        self._share(heads, context)
        return heads, HeadActivations(activations, gate)

    def _share(self, heads: dict[str, torch.Tensor], context: PassContext) -> None:
        """Take keys and values from an earlier layer, or keep them for later ones."""
        if self._computed == "q":
            shared = context.shared_heads[self._layer_type]
            heads["k"] = shared.key
            heads["v"] = shared.value
        elif self._is_reused and self._layer_type not in context.shared_heads:
            # Not when the layer is computed again: gradients have been collected by then.
            shared = SharedHeads(heads["k"], heads["v"])
            context.shared_heads[self._layer_type] = shared

    def _split(self, outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Queries, keys and values [tokens, columns]."""
        if not self._is_joined:
            return outputs
        columns = [self._query_columns, self._key_columns, self._key_columns]
        return torch.split(outputs[0], columns, 1)

    def _as_heads(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[tokens, heads, head_dim] of [tokens, columns]."""
        return [row.view(len(row), -1, self.head_dim) for row in rows]

    def _beside_gate(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and gate [tokens · heads, head_dim] of the layer that computes both."""
        rows = output.view(-1, 2 * self.head_dim)
        return rows[:, : self.head_dim], rows[:, self.head_dim :]

    def empty_gradients(self, query: torch.Tensor) -> HeadGradients:
        """Make room for the gradients.

        Args:
            query: Has the dtype and the number of tokens.
        """
        tokens = len(query)
        columns = [self._query_columns, self._key_columns, self._key_columns]
        if self._is_joined:
            outputs = [query.new_empty(tokens, sum(columns))]
            return HeadGradients(outputs, self._as_heads(self._split(outputs)), None)
        rows = [query.new_empty(tokens, count) for count in columns]
        outputs = rows[: len(self._computed)]
        gate = None
        if self._has_gate:
            outputs[0] = query.new_empty(tokens, 2 * self._query_columns)
            _, gate = self._beside_gate(outputs[0])
        return HeadGradients(outputs, self._as_heads(rows), gate)

    def rotation(
        self, context: PassContext
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines of the angles [tokens, rotary_dim]; None: nothing is rotated."""
        return context.angles[self._layer_type] if self._rotary else None

    def backward(
        self,
        gradients: HeadGradients,
        activations: HeadActivations,
        context: PassContext,
    ) -> None:
        """Turn gradients before the rotation into those of the layers' outputs, in their place.

        Args:
            gradients: From `empty_gradients`, with those of the heads set.
            activations: From `forward`.
            context: The pass.
        """
        heads = dict(zip("qkv", gradients.heads, strict=True))
        if self._computed == "q":
            context.shared_heads[self._layer_type].collect(gradients.heads[1:])
        elif self._is_reused:
            shared = context.shared_heads.pop(self._layer_type)
            shared.add_to(gradients.heads[1:])
        if self._scales_queries and context.query_scales is not None:
            heads["q"].mul_(context.query_scales)
        for name, norm_activations in activations.norms.items():
            gradient = heads[name].view(-1, self.head_dim)
            result = gradient
            grad_residual = None
            if name == "q" and self._has_gate:
                result, _ = self._beside_gate(gradients.outputs[0])
            elif name == "v" and self._computed == "qk":
                # Keys and values are two norms of the same output.
                result = grad_residual = heads["k"].view(-1, self.head_dim)
            rms_norm_backward(
                gradient,
                norm_activations.x,
                self._norms[name],
                norm_activations.inverse_rms,
                grad_residual=grad_residual,
                grad_x=result,
            )
