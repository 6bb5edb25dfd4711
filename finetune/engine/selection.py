"""Which engine trains a run: `packed` where it supports the config, else `trl`, and why."""

import copy
import logging
import re
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.config.sections.lora import CHOOSES_MATRICES, LoraSettings
from finetune.config.sections.trainer import KEEPS_BASE
from finetune.engine.packed_support import packed_support
from finetune.errors import refusal
from finetune.model.architectures import (
    active_dropouts,
    scaled_positions,
    set_dropouts_to_zero,
    text_config_of,
)
from finetune.model.base_config import disabled_dropouts, read_base_config
from finetune.model.device import on_gpu, spread_gpus
from finetune.model.layer_devices import reason_not_spread
from finetune.model.loading import skeleton_of
from finetune.model.quantization import compute_dtype
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


log = logging.getLogger(__name__)


SUPPORTED_MODEL_ARGUMENTS = {"device_map"}
"""Keys of `model.extra` that the packed engine supports, beside dropouts that are 0."""


def choose_engine(config: RunConfig, source: BaseSource) -> str:
    """Return the engine of a run, `packed` or `trl`; log why if `auto` becomes `trl`.

    Raises:
        ConfigError: The config asks for `packed`, which does not support something else in it; or
            neither engine does; or the base can't be spread over `trainer.gpus`.
    """
    setting = config.trainer.engine
    if setting == "trl":
        _require_trl_support(config)
        _require_one_gpu(config, "the trl engine computes on one GPU")
        return "trl"
    base = read_base_config(source, config.model)
    reason = reason_unsupported(config, base)
    if reason is None:
        _require_spreading(config, base)
        return "packed"
    if setting == "packed":
        raise refusal(
            "trainer.engine", setting, f"does not do {reason}; allowed: auto, trl"
        )
    _require_trl_support(config)
    _require_one_gpu(
        config, f"the trl engine computes on one GPU, and packed does not do {reason}"
    )
    log.info("engine: trl, as packed does not do %s", reason)
    return "trl"


def _require_spreading(config: RunConfig, base: "PreTrainedConfig") -> None:
    """Refuse what the packed engine does on one GPU only, where the base is to be on several.

    Raises:
        ConfigError: So many GPUs are not visible, the base's blocks share something, or the
            config trains more than A and B or says itself where the base is.
    """
    gpus = spread_gpus(config.trainer.gpus)
    if gpus == 1:
        return
    if config.lora.use_dora:
        _require_one_gpu(config, "lora.use_dora=true needs one GPU")
    if config.lora.bias != "none":
        _require_one_gpu(config, f"lora.bias={config.lora.bias} needs one GPU")
    if "device_map" in config.model.extra:
        _require_one_gpu(config, "model.extra.device_map says where the base is")
    reason = reason_not_spread(skeleton_of(base, config.model), gpus)
    if reason is not None:
        _require_one_gpu(config, reason)


def _require_one_gpu(config: RunConfig, reason: str) -> None:
    """Raise ConfigError with the reason where the base is to be spread over several GPUs."""
    gpus = config.trainer.gpus
    if gpus not in ("auto", 1):
        raise refusal("trainer.gpus", gpus, f"{reason}; allowed: 1")


def _require_trl_support(config: RunConfig) -> None:
    """Refuse what neither engine does.

    Raises:
        ConfigError: Without a GPU, DoRA on a base in 8 bits, whose scales bitsandbytes loses, or
            LoftQ.
    """
    if on_gpu():
        return
    if config.lora.use_dora and config.quantization.load_in_8bit:
        reason = "does not work with quantization.load_in_8bit=true on a CPU"
        raise refusal("lora.use_dora", "true", reason)
    if config.lora.init_lora_weights == "loftq":
        raise refusal("lora.init_lora_weights", "loftq", "needs a GPU")


def reason_unsupported(config: RunConfig, base: "PreTrainedConfig") -> str | None:
    """Return the first setting that the packed engine does not support, or None.

    Args:
        config: The run's config.
        base: The base's own config.

    Returns:
        The setting as `key=value`, with a note where the value alone does not say why.
    """
    return (
        _unsupported_model_setting(config)
        or _unsupported_lora_setting(config.lora)
        or _unsupported_by_kernels(config, base)
        or _unsupported_training_setting(config)
        or _unsupported_base(config, base)
    )


def _unsupported_base(config: RunConfig, base: "PreTrainedConfig") -> str | None:
    dropouts = active_dropouts(base)
    base_without_dropout = copy.deepcopy(base)
    set_dropouts_to_zero(base_without_dropout, dropouts)
    reason = _unsupported_without_dropout(config, base_without_dropout)
    if reason is None and dropouts:
        # Its values would be drawn for all slots together.
        values = ", ".join(f"{name}={value}" for name, value in dropouts.items())
        overrides = " ".join(f"+model.extra.{name}=0" for name in dropouts)
        reason = f"with {values}; {overrides} trains packed without dropout"
    if reason is None:
        return None
    kind = f"of type {base.model_type}: {reason}"
    return f"model.name_or_path={config.model.name_or_path} ({kind})"


def _unsupported_without_dropout(
    config: RunConfig, base: "PreTrainedConfig"
) -> str | None:
    reason = _refused_by_name(config, base)
    if reason is None and text_config_of(base) is not base:
        reason = "with other modalities"
    if reason is None:
        # Last: a base of a kind that was never met is tried out.
        reason = packed_support(base).refusal
    return reason


def answers_together(config: RunConfig, base: "PreTrainedConfig") -> bool:
    """Return whether prompts of different lengths can be answered together, in slots too.

    True where it is not known before the base is loaded; then a line of the log says it.

    Args:
        config: The run's config.
        base: The base's own config.
    """
    if (
        _refused_by_name(config, base) is not None
        or text_config_of(base) is not base
        or active_dropouts(base)
    ):
        return True
    return packed_support(base).answers_together


def _refused_by_name(config: RunConfig, base: "PreTrainedConfig") -> str | None:
    """What the packed engine does not do with a base, as its config says."""
    has_own_code = "AutoModelForCausalLM" in (getattr(base, "auto_map", None) or {})
    is_transformers_config = type(base).__module__.startswith("transformers.")
    if not is_transformers_config or (config.model.trust_remote_code and has_own_code):
        return "remote code"
    limit = scaled_positions(base)
    longest = config.dataset.max_length
    if limit is not None and (longest is None or longest > limit):
        return f"beyond {limit} tokens a row changes the positions of those beside it"
    return None


def _unsupported_model_setting(config: RunConfig) -> str | None:
    model = config.model
    dtype = compute_dtype(config.quantization)
    product_dtype = str(dtype).removeprefix("torch.")
    if model.dtype not in ("auto", product_dtype):
        return f"model.dtype={model.dtype} (only {product_dtype}, as its products)"
    if model.attn_implementation not in (None, "sdpa"):
        setting = f"model.attn_implementation={model.attn_implementation}"
        return f"{setting} (it has its own attention)"
    others = model.extra.keys() - SUPPORTED_MODEL_ARGUMENTS
    if others - {*disabled_dropouts(model)}:
        supported = f"{_only(SUPPORTED_MODEL_ARGUMENTS)}, and 0 for a dropout"
        return f"model.extra={model.extra} ({supported})"
    return None


def _unsupported_lora_setting(lora: LoraSettings) -> str | None:
    # Norms and other layers without an adapter are shared by all slots.
    if lora.bias == "all":
        return (
            f"lora.bias={lora.bias} (only those of layers with an adapter: lora_only)"
        )
    # Most other initialisations compute with the base's weights or activations. The bank
    # initialises adapters on a copy of the base that has no weights.
    if lora.init_lora_weights not in (True, False, "gaussian"):
        setting = f"lora.init_lora_weights={lora.init_lora_weights}"
        return f"{setting} (computed from the base's weights, most change them)"
    if lora.extra.keys() - CHOOSES_MATRICES:
        return f"lora.extra={lora.extra} ({_only(CHOOSES_MATRICES)})"
    # The bank computes logits from the head's weight directly, in chunks: an adapter on the head
    # would not be trained.
    if _targets_head(lora.target_modules):
        return f"lora.target_modules={lora.target_modules} (with the head)"
    return None


def _unsupported_by_kernels(config: RunConfig, base: "PreTrainedConfig") -> str | None:
    """DoRA needs a layer's dense weight; neither it nor trained biases have kernels on a GPU."""
    lora = config.lora
    if lora.use_dora and config.quantization.load_in_8bit:
        return "lora.use_dora=true (with quantization.load_in_8bit=true)"
    if not on_gpu() or not (lora.use_dora or lora.bias != "none"):
        return None
    # Late: it imports the engine.
    from finetune.engine.packed.backend import supports_gpu_decoder

    if not supports_gpu_decoder(base, config.quantization):
        return None
    setting = "lora.use_dora=true" if lora.use_dora else f"lora.bias={lora.bias}"
    return f"{setting} (not with this base's kernels on a GPU)"


def _targets_head(target_modules: str | list[str]) -> bool:
    """Whether the output layer is among the target modules."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, "lm_head") is not None
    return "lm_head" in target_modules


def _unsupported_training_setting(config: RunConfig) -> str | None:
    if config.trainer.extra.keys() - KEEPS_BASE:
        return f"trainer.extra={config.trainer.extra} ({_only(KEEPS_BASE)})"
    dtype = config.quantization.bnb_4bit_compute_dtype
    if dtype == "float16" and not on_gpu():
        return f"quantization.bnb_4bit_compute_dtype={dtype} (not on a CPU)"
    return None


def _only(arguments: set[str]) -> str:
    """Return which arguments of an `extra` the packed engine has, for a reason."""
    return f"only {', '.join(sorted(arguments))}"
