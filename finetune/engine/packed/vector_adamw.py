"""AdamW of all weights of a slot as one vector."""

import torch

from finetune.compat import fused_adamw
from finetune.config.sections.optimizer import OptimizerSettings


class VectorAdamW(torch.optim.AdamW):
    """PyTorch's AdamW of one vector, with an update that costs the host less than `step`.

    One vector for all layers does as well as a parameter for each, because AdamW computes each
    element by itself.
    """

    def __init__(self, vector: torch.Tensor, settings: OptimizerSettings) -> None:
        """There is no state before the first update.

        Args:
            vector: The weights, float32 [parameters]; updated in place.
            settings: The optimizer's.
        """
        self._vector = vector
        self._parameter = torch.nn.Parameter(vector)
        """The same memory. The state is that of this parameter."""
        super().__init__(
            [self._parameter],
            lr=settings.resolved_learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            # One kernel for the whole vector.
            fused=True,
        )

    def update(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """Take one step, the very one that `step` would take.

        Args:
            gradient: [parameters].
            learning_rate: Of this step.
        """
        (group,) = self.param_groups
        state = self.state[self._parameter]
        if not state:
            state["step"] = torch.zeros((), device=gradient.device)
            state["exp_avg"] = torch.zeros_like(self._vector)
            state["exp_avg_sq"] = torch.zeros_like(self._vector)
        fused_adamw(self._vector, gradient, state, group, learning_rate)
