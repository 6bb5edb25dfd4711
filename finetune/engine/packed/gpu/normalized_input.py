"""A norm and the linear layers that read it: how attention and feed-forward layers begin."""

from dataclasses import dataclass

import torch

from finetune.engine.packed.gpu.context import PassContext
from finetune.engine.packed.gpu.linear_group import LinearGroup
from finetune.engine.packed.gpu.rms_norm import RmsNorm, rms_norm, rms_norm_backward


@dataclass(frozen=True)
class InputActivations:
    """What is kept for the backward pass."""

    x: torch.Tensor
    """Input of the norm [tokens, hidden_size]."""
    inverse_rms: torch.Tensor
    """[tokens]"""
    normalized: torch.Tensor | None
    """Input of the layers [tokens, hidden_size]; None: no adapter reads it."""
    shrunk: torch.Tensor | None
    """See `LinearGroup`."""


@dataclass(frozen=True)
class NormalizedInput:
    """A norm, and linear layers that share its output."""

    norm: RmsNorm
    layers: LinearGroup

    def forward(
        self,
        x: torch.Tensor,
        context: PassContext,
        copy_input: bool = True,
        add_adapters: bool = True,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, InputActivations]:
        """Compute layer(norm(x)) for each layer.

        Args:
            x: [tokens, hidden_size].
            context: The pass.
            copy_input: Copy x on the way, for the sum of the residual connection.
            add_adapters: Whether the outputs have the adapters' contributions.

        Returns:
            The outputs [tokens, out_features]; the copy of x or None; the activations.
        """
        normalized: torch.Tensor | None
        normalized, inverse_rms, residual = rms_norm(x, self.norm, copy_input)
        if add_adapters:
            outputs, shrunk = self.layers.forward(normalized, context)
        else:
            outputs, shrunk = self.layers.forward_unadapted(normalized, context)
        # Only the gradient of an adapter's A reads it.
        if shrunk is None:
            normalized = None
        activations = InputActivations(x, inverse_rms, normalized, shrunk)
        return outputs, residual, activations

    def backward(
        self,
        grads: list[torch.Tensor],
        grad_residual: torch.Tensor,
        activations: InputActivations,
        context: PassContext,
        need_input_grad: bool = True,
    ) -> torch.Tensor | None:
        """Compute the gradients of the adapters, which go into the slots, and of x.

        Args:
            grads: Gradients of the layers' outputs [tokens, out_features].
            grad_residual: Gradient of the copy of x [tokens, hidden_size].
            activations: From `forward`.
            context: The pass.
            need_input_grad: False for the first block, whose input has no gradient.

        Returns:
            The gradient of x [tokens, hidden_size] if it is needed.
        """
        # Without the products with the base's weights, which only the input's gradient needs.
        if not need_input_grad:
            grad_shrunk = self.layers.backward_b(grads, activations.shrunk, context)
            self.layers.backward_a(activations.normalized, grad_shrunk, context)
            return None
        grad_normalized, grad_shrunk = self.layers.backward(
            grads, activations.shrunk, context
        )
        self.layers.backward_a(activations.normalized, grad_shrunk, context)
        return rms_norm_backward(
            grad_normalized,
            x=activations.x,
            norm=self.norm,
            inverse_rms=activations.inverse_rms,
            grad_residual=grad_residual,
        )
