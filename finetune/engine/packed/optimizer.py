"""The optimizer of one slot: update, learning rate schedule, gradient clipping, loss scaling."""

import math
from pathlib import Path

import torch
from transformers import get_scheduler

from finetune.compat import views_like
from finetune.config.schema import RunConfig
from finetune.engine.optimizers import create_optimizer, is_plain_adamw
from finetune.engine.packed.gradient_norms import GradientNorm
from finetune.engine.packed.optimizer_state import load_state, save_state
from finetune.engine.packed.slot import Slot
from finetune.engine.packed.vector_adamw import VectorAdamW
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
        self._optimizer: torch.optim.Optimizer
        if is_plain_adamw(config):
            self._optimizer = VectorAdamW(slot.vector, settings)
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
        norm: GradientNorm,
        learning_rate: float,
    ) -> None:
        """Clip the gradient and take one step; skipped where float16 gradients overflowed.

        On a GPU this does not wait for the gradient, except for float16.

        Args:
            gradient: With the loss scale [parameters]; overwritten.
            norm: Of the gradient.
            learning_rate: Of this step.
        """
        loss_scale = self.loss_scale
        if self._loss_scale is not None:
            gradient.div_(loss_scale)
        limit = self._settings.max_grad_norm
        if limit:
            gradient.mul_(norm.clip_factor(limit, loss_scale))
        if self._loss_scale is not None:
            is_finite = math.isfinite(norm.value.item())
            if not self._loss_scale.update(is_finite):
                return
        if isinstance(self._optimizer, VectorAdamW):
            self._optimizer.update(gradient, learning_rate)
        else:
            self._step(gradient, learning_rate)

    def _step(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """Let PyTorch's optimizer update the slot's matrices by the gradient [parameters]."""
        for group, ratio in zip(
            self._optimizer.param_groups, self._rate_ratios, strict=True
        ):
            group["lr"] = learning_rate * ratio
        parameters = self._slot.parameters
        gradients = views_like(gradient, parameters)
        for parameter, values in zip(parameters, gradients, strict=True):
            parameter.grad = values
        self._optimizer.step()
        # Lets go of an accumulated gradient's memory.
        for parameter in parameters:
            parameter.grad = None

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
