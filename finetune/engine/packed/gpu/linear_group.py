"""Frozen linear layers that share their input, with the adapters of all slots."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from finetune.engine.packed.gpu import lowrank
from finetune.engine.packed.gpu.context import PassContext
from finetune.model.quantization import dense_weight


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers with the same input.

    `shrunk` is that input through A [layers, tokens, rank]; None where no layer is adapted.
    """

    layers: list[Any]
    names: list[str]
    """Full names of the layers in the base."""
    table_row: int
    """Row of the first layer in the slots' tables; the others follow."""

    def is_adapted(self, context: PassContext) -> bool:
        """Whether some slot has an adapter on some of the layers."""
        return not context.adapted_layers.isdisjoint(self.names)

    def forward(
        self,
        x: torch.Tensor,
        context: PassContext,
        residual: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Compute the outputs of all layers, with the adapters' contributions.

        Args:
            x: The input [tokens, in_features].
            context: The pass.
            residual: The output of a group of one layer is added to it, in place.

        Returns:
            The output of each layer [tokens, out_features], and `shrunk`.
        """
        shrunk = self.shrink(x, context)
        outputs = []
        for number in range(len(self.layers)):
            outputs.append(self._forward_layer(number, x, shrunk, context, residual))
        return outputs, shrunk

    def forward_unadapted(
        self, x: torch.Tensor, context: PassContext
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Compute the outputs of all layers without the adapters' contributions, and `shrunk`.

        Arguments and results are otherwise those of `forward`.
        """
        shrunk = self.shrink(x, context)
        outputs = []
        for number, layer in enumerate(self.layers):
            outputs.append(linear(x, self._forward_weight(number, context), layer.bias))
        return outputs, shrunk

    def _forward_layer(
        self,
        number: int,
        x: torch.Tensor,
        shrunk: torch.Tensor | None,
        context: PassContext,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        weight = self._forward_weight(number, context)
        bias = self.layers[number].bias
        row = self.table_row + number
        is_adapted = shrunk is not None and self.names[number] in context.adapted_layers
        # `addmm_` adds the product to what is there without a pass of its own over memory, and
        # rounds once.
        if residual is None and is_adapted:
            assert shrunk is not None
            output = lowrank.expand(shrunk[number], context.adapters, row, len(weight))
            output.addmm_(x, weight.t())
            if bias is not None:
                output.add_(bias)
            return output
        if residual is not None and not is_adapted and bias is None:
            return residual.addmm_(x, weight.t())
        output = linear(x, weight, bias)
        if residual is None:
            return output
        if not is_adapted:
            return residual.add_(output)
        assert shrunk is not None
        lowrank.add_expanded(residual, output, shrunk[number], context.adapters, row)
        return residual

    def _forward_weight(self, number: int, context: PassContext) -> torch.Tensor:
        """A layer's weight, dequantised."""
        weight = dense_weight(self.layers[number])
        # For the backward pass of a block that is computed again, which follows at once.
        if context.weight_cache is not None:
            context.weight_cache[self.names[number]] = weight
        return weight

    def shrink(self, x: torch.Tensor, context: PassContext) -> torch.Tensor | None:
        """Compute `shrunk` alone; None where no layer is adapted."""
        if not self.is_adapted(context):
            return None
        return lowrank.shrink(
            x,
            context.adapters,
            self.table_row,
            len(self.layers),
        )

    def backward_b(
        self,
        grad_outputs: list[torch.Tensor],
        shrunk: torch.Tensor | None,
        context: PassContext,
    ) -> torch.Tensor | None:
        """Compute the gradients of B, which go into the slots, and of `shrunk`.

        Args:
            grad_outputs: Gradients of the layers' outputs [tokens, out_features].
            shrunk: From `forward`.
            context: The pass.

        Returns:
            The gradient of `shrunk` [layers, tokens, rank].
        """
        if shrunk is None:
            return None
        return lowrank.expand_backward(
            grad_outputs, shrunk, context.adapters, self.table_row
        )

    def backward(
        self,
        grad_outputs: list[torch.Tensor],
        shrunk: torch.Tensor | None,
        context: PassContext,
        through_adapters: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the gradient of the input, and as `backward_b`.

        Args:
            grad_outputs: Gradients of the layers' outputs [tokens, out_features].
            shrunk: From `forward`.
            context: The pass.
            through_adapters: Whether the input's gradient has what comes through the adapters.

        Returns:
            The gradients of the input [tokens, in_features] and of `shrunk`.
        """
        grad_shrunk = self.backward_b(grad_outputs, shrunk, context)
        grad_x = None
        # The smaller contribution first: `addmm_` then adds the large products to it, each
        # without a pass of its own over memory.
        if grad_shrunk is not None and through_adapters:
            in_features = self.layers[0].in_features
            grad_x = lowrank.shrink_backward(
                grad_shrunk, context.adapters, self.table_row, in_features
            )
        for number, grad_output in enumerate(grad_outputs):
            weight = self._backward_weight(number, context)
            if grad_x is None:
                grad_x = grad_output @ weight
            else:
                grad_x.addmm_(grad_output, weight)
            # Or two dequantised ones would be in memory.
            del weight
        assert grad_x is not None
        return grad_x, grad_shrunk

    def backward_a(
        self,
        x: torch.Tensor | None,
        grad_shrunk: torch.Tensor | None,
        context: PassContext,
    ) -> None:
        """Compute the gradients of A, which go into the slots.

        Args:
            x: The input [tokens, in_features]; None only where no layer is adapted.
            grad_shrunk: From `backward` or `backward_b`.
            context: The pass.
        """
        if grad_shrunk is not None:
            assert x is not None
            lowrank.shrink_weight_gradient(
                x, grad_shrunk, context.adapters, self.table_row
            )

    def _backward_weight(self, number: int, context: PassContext) -> torch.Tensor:
        """A layer's weight: from the cache, which lets go of it, or dequantised."""
        if context.weight_cache:
            cached = context.weight_cache.pop(self.names[number], None)
            if cached is not None:
                return cached
        return dense_weight(self.layers[number])


def linear_group(
    module: Any,
    module_name: str,
    projections: tuple[str, ...],
    table_rows: dict[str, int],
) -> LinearGroup:
    """Make a group of a module's linear layers.

    Args:
        module: Holds the layers.
        module_name: Its full name in the base.
        projections: The layers' names in the module.
        table_rows: Each linear layer's row in the slots' tables, by full name.
    """
    names = [f"{module_name}.{projection}" for projection in projections]
    rows = [table_rows[name] for name in names]
    # The kernels are given the first row only.
    consecutive = range(rows[0], rows[0] + len(rows))
    assert rows == list(consecutive)
    layers = [getattr(module, projection) for projection in projections]
    return LinearGroup(layers, names, rows[0])
