"""The optimizer of one slot: AdamW, learning rate schedule, gradient clipping, loss scaling."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from finetune.config.schema import RunConfig
from finetune.engine.packed.slot import Slot
from finetune.engine.schedule import warmup_steps
from finetune.files.atomic import name_file_in_errors

STATE = "slot.safetensors"
"""A checkpoint's weights and optimizer state, as flat vectors."""


class SlotOptimizer:
    """Updates a slot's weights, and saves and loads them with the optimizer's state."""

    def __init__(
        self,
        config: RunConfig,
        slot: Slot,
        total: int,
    ) -> None:
        """Set up AdamW and the schedule.

        Args:
            config: The run's config.
            slot: The slot whose weights are updated.
            total: Optimizer steps of the whole run.
        """
        settings = config.optimizer
        self._settings = settings
        self._slot = slot
        # The vector's own memory, so that AdamW updates the slot. One vector for all layers does as
        # well as a parameter for each, because AdamW computes each element by itself.
        self._weights = torch.nn.Parameter(slot.vector)
        self._adamw = torch.optim.AdamW(
            [self._weights],
            lr=settings.resolved_learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            # One kernel for the whole vector.
            fused=True,
        )
        scheduler = get_scheduler(
            settings.lr_scheduler_type,
            self._adamw,
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

    def learning_rate(self, number: int) -> float:
        """The learning rate of a step, counted from 1."""
        # The schedule counts the steps before this one.
        factor: float = self._schedule(number - 1)
        return self._settings.resolved_learning_rate * factor

    def update(
        self,
        gradient: torch.Tensor,
        norm: float,
        learning_rate: float,
    ) -> None:
        """Clip the gradient and take one step; skipped where float16 gradients overflowed.

        Args:
            gradient: With the loss scale [parameters]; overwritten.
            norm: The gradient's 2-norm without the loss scale.
            learning_rate: Of this step.
        """
        if self._loss_scale is not None:
            gradient.div_(self._loss_scale.value)
        limit = self._settings.max_grad_norm
        # As `torch.nn.utils.clip_grad_norm_` pads it.
        padded_norm = norm + 1e-6
        # Not `>`: the condition is to be true for NaN as well.
        if limit and not padded_norm <= limit:
            gradient.mul_(limit / padded_norm)
        if self._loss_scale is not None:
            is_finite = math.isfinite(norm)
            if not self._loss_scale.update(is_finite):
                return
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._weights.grad = gradient
        self._adamw.step()
        # Lets go of an accumulated gradient's memory.
        self._weights.grad = None

    def save(self, checkpoint: Path) -> None:
        """Write the weights and the state into a checkpoint folder."""
        checkpoint.mkdir(parents=True, exist_ok=True)
        adamw_state = self._adamw.state[self._weights]
        tensors = {"weights": self._slot.vector, **adamw_state}
        if self._loss_scale is not None:
            state = [self._loss_scale.value, self._loss_scale.good_steps]
            tensors["loss_scale"] = torch.tensor(state)
        with name_file_in_errors(checkpoint / STATE):
            save_file(tensors, checkpoint / STATE)

    def load(self, checkpoint: Path) -> None:
        """Read the weights and the state from a checkpoint folder."""
        device = str(self._slot.bank.device)
        tensors = load_file(checkpoint / STATE, device=device)
        # In place, because AdamW and the adapters refer to this memory.
        self._slot.vector.copy_(tensors.pop("weights"))
        state = tensors.pop("loss_scale", None)
        if self._loss_scale is not None and state is not None:
            self._loss_scale.value = float(state[0])
            self._loss_scale.good_steps = int(state[1])
        # Empty if all steps before the checkpoint were skipped: AdamW has no state by then.
        if tensors:
            self._adamw.state[self._weights] = tensors


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
