"""The gradient norms of a pass on their device, and the factors that clip the gradients."""

from dataclasses import dataclass

import torch


class GradientNorms:
    """The norms of several slots' gradients. What depends on them is computed for all at once.

    Operations on single numbers take a GPU's host longer than the GPU: done for each slot, they
    were a tenth of the host's work in a step of 16 slots.
    """

    def __init__(self, values: torch.Tensor) -> None:
        """No factor is computed yet.

        Args:
            values: 2-norm of each slot's gradient, with the loss scale, float64 [slots].
        """
        self.values = values
        """As given."""
        self._factors: dict[tuple[float, float], tuple[torch.Tensor, ...]] = {}

    def of_slot(self, index: int) -> "GradientNorm":
        """Return the norm of a slot's gradient."""
        return GradientNorm(self, index)

    def clip_factors(self, limit: float, loss_scale: float) -> tuple[torch.Tensor, ...]:
        """Return the factor [] that clips the gradient of each slot.

        Args:
            limit: The largest norm without the loss scale.
            loss_scale: The factor of the gradients.
        """
        key = limit, loss_scale
        if key not in self._factors:
            norms = self.values / loss_scale
            # As `torch.nn.utils.clip_grad_norm_` pads it. NaN and infinity go through.
            factors = (limit / (norms + 1e-6)).clamp(max=1)
            self._factors[key] = factors.unbind()
        return self._factors[key]


@dataclass(frozen=True)
class GradientNorm:
    """The norm of one slot's gradient."""

    norms: GradientNorms
    """Of all slots of the pass."""
    index: int
    """Of the slot among them."""

    @classmethod
    def of(cls, gradient: torch.Tensor) -> "GradientNorm":
        """Compute the norm of a gradient [parameters] by itself."""
        return cls(GradientNorms(gradient.norm().double()[None]), 0)

    @property
    def value(self) -> torch.Tensor:
        """2-norm with the loss scale, float64 []."""
        return self.norms.values[self.index]

    def clip_factor(self, limit: float, loss_scale: float) -> torch.Tensor:
        """Return the slot's factor of `GradientNorms.clip_factors`."""
        return self.norms.clip_factors(limit, loss_scale)[self.index]
