"""The optimizer of one slot: update, learning rate schedule, gradient clipping, loss scaling."""

import math
from pathlib import Path

import torch
from transformers import get_scheduler

from finetune.config.schema import RunConfig
from finetune.config.sections.optimizer import OptimizerSettings
from finetune.engine.optimizers import create_optimizer, is_plain_adamw
from finetune.engine.packed.optimizer_state import load_state, save_state
from finetune.engine.packed.slot import Slot
from finetune.engine.schedule import warmup_steps

STATE = "slot.safetensors"
"""A checkpoint's weights, as one vector, and the optimizer's state."""


class SlotOptimizer:
    """Updates a slot's weights, and saves and loads them with the optimizer's state."""

    def __init__(
        self,
        config: RunConfig,
        slot: Slot,
        total: int,
    ) -> None:
        """Set up the optimizer and the schedule.

        Args:
            config: The run's config.
            slot: The slot whose weights are updated.
            total: Optimizer steps of the whole run.
        """
        settings = config.optimizer
        self._settings = settings
        self._slot = slot
        self._parameters = slot.parameters
        """What the optimizer updates: the slot's matrices, or all of them as one vector."""
        if is_plain_adamw(config):
            # The vector's memory, so that AdamW updates the slot. One vector for all layers does
            # as well as a parameter for each, because AdamW computes each element by itself.
            self._parameters = [torch.nn.Parameter(slot.vector)]
            self._optimizer: torch.optim.Optimizer = _vector_adamw(
                self._parameters, settings
            )
        else:
            self._optimizer = create_optimizer(slot.model, config)
        rate = settings.resolved_learning_rate
        groups = self._optimizer.param_groups
        self._rate_ratios = [group["lr"] / rate for group in groups]
        """The learning rate of each group of parameters, by that of the run."""
        scheduler = get_scheduler(
            settings.lr_scheduler_type,
            self._optimizer,
            num_warmup_steps=warmup_steps(settings, total),
            num_training_steps=total,
            scheduler_specific_kwargs=config.trainer.extra.get("lr_scheduler_kwargs"),
        )
        # Only its function of the step: the rate is set by hand in `update`, so that a resumed run
        # has no state of a scheduler to restore.
        self._schedule = scheduler.lr_lambdas[0]
        self._loss_scale = LossScale() if slot.bank.dtype == torch.float16 else None

    @property
    def loss_scale(self) -> float:
        """The factor of the loss, and so of gradients, in the next step."""
        return self._loss_scale.value if self._loss_scale else 1.0

    def learning_rate(self, position: float) -> float:
        """The learning rate of a step.

        Args:
            position: How far the run is before it, in steps: see `Budget.position`.
        """
        factor: float = self._schedule(position)
        return self._settings.resolved_learning_rate * factor

    def update(
        self,
        gradient: torch.Tensor,
        norm: torch.Tensor,
        learning_rate: float,
    ) -> None:
        """Clip the gradient and take one step; skipped where float16 gradients overflowed.

        On a GPU this does not wait for the gradient, except for float16.

        Args:
            gradient: With the loss scale [parameters]; overwritten.
            norm: The gradient's 2-norm without the loss scale, float64 [].
            learning_rate: Of this step.
        """
        if self._loss_scale is not None:
            gradient.div_(self._loss_scale.value)
        limit = self._settings.max_grad_norm
        if limit:
            # As `torch.nn.utils.clip_grad_norm_` pads it. NaN and infinity go through.
            gradient.mul_((limit / (norm + 1e-6)).clamp(max=1))
        if self._loss_scale is not None:
            is_finite = math.isfinite(norm.item())
            if not self._loss_scale.update(is_finite):
                return
        for group, ratio in zip(
            self._optimizer.param_groups, self._rate_ratios, strict=True
        ):
            group["lr"] = learning_rate * ratio
        self._bind_gradient(gradient)
        self._optimizer.step()
        # Lets go of an accumulated gradient's memory.
        for parameter in self._parameters:
            parameter.grad = None

    def _bind_gradient(self, gradient: torch.Tensor) -> None:
        """Give each parameter its piece of the gradient [parameters]."""
        if len(self._parameters) == 1:
            self._parameters[
                0
            ].grad = gradient  # views would take longer than small updates
            return
        offset = 0
        for parameter in self._parameters:
            stop = offset + parameter.numel()
            parameter.grad = gradient[offset:stop].view(parameter.shape)
            offset = stop

    def save(self, checkpoint: Path, event: "torch.cuda.Event | None") -> None:
        """Write the weights and the state into a checkpoint folder.

        Args:
            checkpoint: The folder.
            event: Recorded after the last update; None on a CPU.
        """
        checkpoint.mkdir(parents=True, exist_ok=True)
        tensors = {"weights": self._slot.vector}
        if self._loss_scale is not None:
            state = [self._loss_scale.value, self._loss_scale.good_steps]
            tensors["loss_scale"] = torch.tensor(state)
        save_state(self._optimizer, tensors, checkpoint / STATE, event)

    def load(self, checkpoint: Path) -> None:
        """Read the weights and the state from a checkpoint folder."""
        names = {"weights", "loss_scale"}
        tensors = load_state(self._optimizer, names, checkpoint / STATE)
        # In place, because the optimizer and the adapters refer to this memory.
        self._slot.vector.copy_(tensors["weights"])
        state = tensors.get("loss_scale")
        if self._loss_scale is not None and state is not None:
            self._loss_scale.value = float(state[0])
            self._loss_scale.good_steps = int(state[1])


def _vector_adamw(
    parameters: list[torch.nn.Parameter], settings: OptimizerSettings
) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=settings.resolved_learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        # One kernel for the whole vector.
        fused=True,
    )


class LossScale:
    """float16 loss scaling for one run, with the defaults of `torch.amp.GradScaler`."""

    GROWTH_INTERVAL = 2000
    """Steps without overflow after which the scale is doubled."""

    def __init__(self) -> None:
        self.value = 65536.0
        self.good_steps = 0
        """Steps without overflow since the scale last changed."""

    def update(self, finite: bool) -> bool:
        """Adapt the scale for the next step.

        Args:
            finite: Whether this step's gradients are finite.

        Returns:
            Whether this step is to be taken.
        """
        if not finite:
            self.value /= 2
            self.good_steps = 0
            return False
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.value *= 2
            self.good_steps = 0
        return True
