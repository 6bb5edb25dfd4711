"""PEFT's config of an adapter, from `lora`.

PEFT is imported only inside the function (see `adapter`).
"""

from typing import TYPE_CHECKING, Any

from finetune.config.sections.lora import LoraSettings
from finetune.errors import ConfigError, refusal

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(settings: LoraSettings) -> "LoraConfig":
    """Return PEFT's config of an adapter.

    Raises:
        ConfigError: `lora.extra` names an argument that has a key of its own, or that LoraConfig
            does not accept.
    """
    from peft import LoftQConfig, LoraConfig

    alpha = settings.alpha
    arguments: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": settings.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "target_modules": settings.target_modules,
        "bias": settings.bias,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "init_lora_weights": settings.init_lora_weights,
    }
    for name, value in settings.extra.items():
        if name in arguments:
            raise refusal(f"lora.extra.{name}", value, "has a key of its own")
    extra = dict(settings.extra)
    try:
        if "loftq_config" in extra:
            # PEFT fills in what is not given only here.
            extra["loftq_config"] = LoftQConfig(**extra["loftq_config"])
        return LoraConfig(**arguments | extra)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora.extra={settings.extra}: {error}") from None
