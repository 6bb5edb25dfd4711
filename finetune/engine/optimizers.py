"""Optimizers of transformers for the trained weights of an adapter, one tensor for each matrix.

The names, the classes behind them and their defaults are those of transformers' Trainer.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from finetune.config.schema import RunConfig
from finetune.config.sections.optimizer import OptimizerSettings
from finetune.errors import refusal
from finetune.model.device import on_gpu

if TYPE_CHECKING:
    from peft import PeftModel

ADAMW = {"adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"}
"""Optimizers that compute the same update as `torch.optim.AdamW`."""


def is_plain_adamw(config: RunConfig) -> bool:
    """Whether all weights have AdamW with states in 32 bits, and the same rate and decay."""
    settings = config.optimizer
    is_uniform = settings.lora_plus_ratio is None and config.lora.bias == "none"
    return settings.name in ADAMW and is_uniform


def create_optimizer(
    model: "PeftModel", config: RunConfig, is_paged: bool = False
) -> torch.optim.Optimizer:
    """Create the optimizer of an adapter, with the groups of parameters that the Trainer has.

    With `optimizer.lora_plus_ratio` the groups are those of PEFT's LoRA+, whose first group has
    `optimizer.learning_rate`.

    Args:
        model: The adapter; its trained parameters have their final shapes.
        config: The run's config.
        is_paged: Whether a paged optimizer may move its state to host memory. bitsandbytes never
            frees the memory that it has for that.
    """
    settings = config.optimizer
    optim_args = config.trainer.extra.get("optim_args")
    optimizer_class, arguments = optimizer_class_of(settings, optim_args)
    if not is_paged and "is_paged" in arguments:
        arguments["is_paged"] = False
    arguments["lr"] = settings.resolved_learning_rate
    ratio = settings.lora_plus_ratio
    if ratio is None:
        return optimizer_class(_parameter_groups(model, settings), **arguments)
    from peft.optimizers import create_loraplus_optimizer

    rate = arguments.pop("lr")
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model,
        optimizer_class,
        lr=rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=settings.weight_decay,
        **arguments,
    )
    return optimizer


def _parameter_groups(
    model: "PeftModel", settings: OptimizerSettings
) -> list[dict[str, Any]]:
    """Biases have no weight decay, as in transformers' Trainer."""
    decayed: list[torch.nn.Parameter] = []
    biases: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = biases if "bias" in name else decayed
            group.append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}]
    if biases:
        groups.append({"params": biases, "weight_decay": 0.0})
    return groups


def optimizer_class_of(
    settings: OptimizerSettings, optim_args: str | None
) -> "tuple[type[torch.optim.Optimizer], dict[str, Any]]":
    """Return the class of an optimizer and its arguments, as transformers' Trainer does.

    Their learning rate, `lr`, is not the run's.

    Args:
        settings: The optimizer's settings.
        optim_args: `trainer.extra.optim_args`: further arguments, as name=value,name=value.

    Raises:
        ConfigError: The class can't be imported, or `optim_args` can't be read.
    """
    # Late: the import takes a second, and most runs have AdamW in 32 bits.
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir="checkpoints",  # nothing is written
        optim=settings.name,
        optim_args=optim_args,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        use_cpu=not on_gpu(),
        report_to="none",
    )
    try:
        optimizer_class, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise refusal(
            "optimizer.name", settings.name, " ".join(str(error).split())
        ) from None
    except (ValueError, AttributeError) as error:
        reason = f"can't be read ({error}); allowed: name=value,name=value"
        raise refusal("trainer.extra.optim_args", optim_args, reason) from None
    return optimizer_class, keywords


def state_bytes(shapes: Sequence[tuple[int, ...]], config: RunConfig) -> int:
    """Return the bytes of an optimizer's state for parameters of these shapes.

    They are counted in the state after one step on a parameter of each shape.

    Raises:
        ConfigError: The optimizer is missing, refuses its arguments, or can't compute on this
            machine.
    """
    optim_args = config.trainer.extra.get("optim_args")
    optimizer_class, arguments = optimizer_class_of(config.optimizer, optim_args)
    if "is_paged" in arguments:
        arguments["is_paged"] = False  # the state has the same size
    sizes = functools.cache(
        lambda shape: _bytes_after_step(optimizer_class, arguments, shape, config)
    )
    return sum(sizes(shape) for shape in shapes)


def _bytes_after_step(
    optimizer_class: type[torch.optim.Optimizer],
    arguments: dict[str, Any],
    shape: tuple[int, ...],
    config: RunConfig,
) -> int:
    device = "cuda" if on_gpu() else "cpu"
    parameter = torch.nn.Parameter(torch.zeros(shape, device=device))
    parameter.grad = torch.zeros(shape, device=device)
    try:
        optimizer = optimizer_class([parameter], **arguments)
        optimizer.step()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        settings = config.optimizer
        reason = " ".join(str(error).split())
        raise refusal("optimizer.name", settings.name, reason) from error
    return sum(
        value.nbytes
        for value in optimizer.state[parameter].values()
        if isinstance(value, torch.Tensor)
    )
