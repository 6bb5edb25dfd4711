"""Keys and values of a layer that later layers of its type use too (Gemma 4)."""

import torch


class SharedHeads:
    """Keys and values, from a layer's forward pass to its backward pass."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Begin without gradients.

        Args:
            key: [tokens, heads, head_dim], rotated.
            value: [tokens, heads, head_dim].
        """
        self.key = key
        self.value = value
        # In float32: in 16 bits the sum over many layers would lose the smaller ones.
        self._gradients: list[torch.Tensor] = []

    def collect(self, gradients: list[torch.Tensor]) -> None:
        """Add the gradients of a layer that uses the keys and values.

        Args:
            gradients: Of keys, before the rotation, and values [tokens, heads, head_dim].
        """
        if not self._gradients:
            self._gradients = [gradient.float() for gradient in gradients]
            return
        for total, gradient in zip(self._gradients, gradients, strict=True):
            total.add_(gradient)

    def add_to(self, gradients: list[torch.Tensor]) -> None:
        """Add all gradients to those of the layer that computed the keys and values.

        Args:
            gradients: As in `collect`; overwritten.
        """
        # Empty where no layer uses them.
        for gradient, total in zip(gradients, self._gradients, strict=False):
            gradient.add_(total)
