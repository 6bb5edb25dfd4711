"""Which engine trains a run: `packed` where it supports the config, else `trl`, and why."""

import logging
import re
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.errors import refusal
from finetune.model.architectures import LLAMA_LIKE, text_config_of
from finetune.model.device import on_gpu
from finetune.model.loading import read_base_config
from finetune.model.quantization import compute_dtype
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


log = logging.getLogger(__name__)


ADAMW = {"adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"}
"""Spellings of the same mathematics."""


def choose_engine(config: RunConfig, source: BaseSource) -> str:
    """The engine of a run: `packed` wherever it does what the config asks for, else `trl`.

    Raises ConfigError where `trainer.engine=packed` is asked for in vain.
    """
    wanted = config.trainer.engine
    if wanted == "trl":
        return wanted
    reason = reason_unsupported(config, read_base_config(source, config.model))
    if reason is None:
        return "packed"
    if wanted == "packed":
        raise refusal("trainer.engine", wanted, f"does not do {reason}; allowed: auto, trl")
    log.info("engine: trl, as packed does not do %s", reason)
    return "trl"


def reason_unsupported(config: RunConfig, base: "PreTrainedConfig") -> str | None:
    """Why a run is not for this engine, as `key=value`; None: it is."""
    lora, optimizer, trainer, quantization = config.lora, config.optimizer, config.trainer, config.quantization
    targets = lora.target_modules
    pattern = targets if isinstance(targets, str) else "|".join(map(re.escape, targets))
    computed = str(compute_dtype(quantization)).removeprefix("torch.")
    half = config.quantization.bnb_4bit_compute_dtype == "float16"
    attention_dropout = getattr(text_config_of(base), "attention_dropout", 0)
    reasons = {
        f"model.name_or_path={config.model.name_or_path} (of type {base.model_type})": base.model_type
        not in LLAMA_LIKE,
        f"model.dtype={config.model.dtype}": config.model.dtype not in ("auto", computed),
        f"model.attn_implementation={config.model.attn_implementation}": config.model.attn_implementation
        not in (None, "sdpa"),
        f"model.extra={config.model.extra}": bool(config.model.extra.keys() - {"device_map"}),
        f"the model's attention_dropout={attention_dropout}": bool(attention_dropout),
        "lora.use_dora=true": lora.use_dora,
        f"lora.bias={lora.bias}": lora.bias != "none",
        f"lora.init_lora_weights={lora.init_lora_weights}": lora.init_lora_weights not in (True, False, "gaussian"),
        f"lora.extra={lora.extra}": bool(lora.extra),
        f"lora.target_modules={lora.target_modules} (with the head)": bool(re.fullmatch(pattern, "lm_head")),
        f"optimizer.name={optimizer.name}": optimizer.name not in ADAMW,
        f"trainer.extra={trainer.extra}": bool(trainer.extra.keys() - {"lr_scheduler_kwargs", "save_total_limit"}),
        "dataset.packing=true": config.dataset.packing,
        f"quantization.bnb_4bit_compute_dtype={quantization.bnb_4bit_compute_dtype}": half and not on_gpu(),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
