"""The sum of a layer's output and the residual stream, with a norm between them in Gemma."""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.linear_group import LinearGroup
from finetune.engine.packed.gpu.rms_norm import (
    RmsNorm,
    add_rms_norm,
    read_norm,
    rms_norm_backward,
)
from finetune.model.decoder_blocks import DecoderBlock


@dataclass(frozen=True)
class OutputNormActivations:
    """What the norm keeps for its backward pass."""

    x: torch.Tensor
    """The layer's output [tokens, hidden_size]."""
    inverse_rms: torch.Tensor
    """[tokens]"""


class OutputNorm:
    """Adds a layer's output to the residual stream, through a norm where the base has one."""

    def __init__(self, module: Any, name: str | None, block: DecoderBlock) -> None:
        """Read the norm.

        Args:
            module: Transformers' decoder layer.
            name: The norm's name in it; None: there is none.
            block: What the base's blocks are made of.
        """
        self.norm: RmsNorm | None = None
        if name is not None:
            self.norm = read_norm(getattr(module, name), block)

    def forward(
        self,
        layer: LinearGroup,
        x: torch.Tensor,
        residual: torch.Tensor,
        context: PassContext,
    ) -> tuple[torch.Tensor, torch.Tensor | None, OutputNormActivations | None]:
        """Compute residual + norm(layer(x)).

        Args:
            layer: A group of one layer.
            x: Its input [tokens, in_features].
            residual: [tokens, hidden_size]; overwritten by the sum.
            context: The pass.

        Returns:
            The sum [tokens, hidden_size]; `shrunk` of the layer; the activations of the norm.
        """
        if self.norm is None:
            (total,), shrunk = layer.forward(x, context, residual=residual)
            return total, shrunk, None
        (output,), shrunk = layer.forward(x, context)
        inverse_rms = add_rms_norm(residual, output, self.norm)
        return residual, shrunk, OutputNormActivations(output, inverse_rms)

    def backward(
        self, grad_total: torch.Tensor, activations: OutputNormActivations | None
    ) -> torch.Tensor:
        """Return the gradient of the layer's output [tokens, hidden_size]."""
        if self.norm is None:
            return grad_total
        assert activations is not None
        return rms_norm_backward(
            grad_total, activations.x, self.norm, activations.inverse_rms
        )
