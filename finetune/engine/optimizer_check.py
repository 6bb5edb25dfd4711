"""Checks a run's optimizer, its schedule and their further arguments before the base is loaded.

transformers reads the entries of `trainer.extra.optim_args` that it has for an optimizer, and
ignores all others without a word.
"""

import inspect

import torch

from finetune.config.schema import RunConfig
from finetune.config.sections.optimizer import OptimizerSettings
from finetune.engine.optimizers import is_plain_adamw, optimizer_class_of, state_bytes
from finetune.engine.schedule import warmup_steps
from finetune.errors import refusal

NOT_IN_SIGNATURES = {"beta1", "beta2", "beta3"}
"""Names of which transformers makes one argument, `betas`."""

SET_BY_GROUPS = {"lr", "weight_decay"}
"""Arguments that each group of parameters has from the config's keys, so that an entry is lost."""

KEYS = {
    "lr": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "beta1": "optimizer.adam_beta1",
    "beta2": "optimizer.adam_beta2",
    "eps": "optimizer.adam_epsilon",
}
"""Keys of the config for some of the names."""

WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")
"""Schedules whose further arguments transformers ignores."""

SWITCH_VALUES = ("true", "1", "yes", "false", "0", "no")


def check_optimizer(config: RunConfig) -> None:
    """Check the further arguments, and take a step on a small matrix.

    Raises:
        ConfigError: The optimizer is missing, refuses its arguments, does not read one of them, or
            can't compute on this machine.
    """
    check_arguments(config)
    if not is_plain_adamw(config):
        state_bytes([(64, 64)], config)


def check_schedule(config: RunConfig, steps: int) -> None:
    """Refuse `trainer.extra.lr_scheduler_kwargs` that the schedule does not have or can't compute.

    Args:
        config: The run's config, its learning rate a number.
        steps: Optimizer steps of the whole run.

    Raises:
        ConfigError: They are not for this schedule.
    """
    key = "trainer.extra.lr_scheduler_kwargs"
    arguments = config.trainer.extra.get("lr_scheduler_kwargs")
    settings = config.optimizer
    if not arguments:
        return
    if settings.lr_scheduler_type in WITHOUT_ARGUMENTS:
        reason = f"optimizer.lr_scheduler_type={settings.lr_scheduler_type} has none"
        raise refusal(key, arguments, reason)
    # Late: the import takes a second, and most runs have no further arguments.
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        scheduler = get_scheduler(
            settings.lr_scheduler_type,
            torch.optim.SGD([parameter], lr=settings.resolved_learning_rate),
            num_warmup_steps=warmup_steps(settings, steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments,
        )
        for step in (steps // 2, steps - 1):
            scheduler.lr_lambdas[0](step)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise refusal(key, arguments, " ".join(str(error).split())) from None


def check_arguments(config: RunConfig) -> None:
    """Refuse `trainer.extra.optim_args` with an entry that changes nothing.

    Raises:
        ConfigError: As `check_optimizer`.
    """
    key = "trainer.extra.optim_args"
    text = config.trainer.extra.get("optim_args")
    if not text:
        return
    settings = config.optimizer
    _, arguments = optimizer_class_of(settings, text)
    entries = [entry.split("=") for entry in text.replace(" ", "").split(",")]
    names = [name for name, _ in entries]
    if not all(names):
        raise refusal(key, text, "can't be read; allowed: name=value,name=value")
    allowed = _names_with_effect(settings, names)
    for name, value in entries:
        if name not in allowed:
            listed = ", ".join(allowed) or "no entries"
            reason = f"{name} has no effect on {settings.name}; allowed: {listed}"
            if name in KEYS:
                reason += f"; see {KEYS[name]}"
            raise refusal(key, text, reason)
        if names.count(name) > 1:
            raise refusal(key, text, f"{name} is given more than once")
        is_switch = isinstance(arguments.get(name), bool)
        if is_switch and value.lower() not in SWITCH_VALUES:
            raise refusal(key, text, f"{name} must be true or false")


def _names_with_effect(settings: OptimizerSettings, names: list[str]) -> list[str]:
    """Return the entries that change an optimizer's arguments.

    Args:
        settings: The optimizer's settings.
        names: Names that are tried beside those that its class has.
    """
    optimizer_class, plain = optimizer_class_of(settings, None)
    signature = inspect.signature(optimizer_class).parameters
    candidates = {*signature, *NOT_IN_SIGNATURES, *names} - SET_BY_GROUPS
    with_effect = []
    for name in sorted(candidates):
        # 2 can be read as int, float and text, and is no argument's default.
        _, arguments = optimizer_class_of(settings, f"{name}=2")
        # For bitsandbytes' RMSprop it leaves a text, which the class can't read.
        is_text = isinstance(arguments.get(name), str)
        if arguments != plain and not is_text:
            with_effect.append(name)
    return with_effect
