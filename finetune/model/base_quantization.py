"""The quantization that a base already has, as its `config.json` says. Loads no torch."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.config.sections.model import ModelSettings, QuantizationSettings
from finetune.errors import refusal
from finetune.files.atomic import read_json
from finetune.model.source import BaseSource

BITSANDBYTES = {"nf4", "fp4", "int8"}
"""Methods that `quantization` can name: bitsandbytes' own."""

DEQUANTIZED = {"mxfp4"}
"""Methods whose weights are dequantised when a base is loaded, as they can't be trained: in 4 bits
they are quantised again, each tensor as soon as it is loaded."""

BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.25, "awq": 4.0, "gptq": 4.0}
"""Bits of a weight by method, where the base's config does not say."""


@dataclass(frozen=True)
class BaseQuantization:
    """How the weights in a base's files are quantised."""

    method: str
    """nf4, fp4, int8, or transformers' name of another method (gptq, awq, fp8, …)."""
    bits: float
    """Bits of a quantised weight, without its scales."""
    double: bool = False
    """Whether the scales are quantised as well (bitsandbytes)."""
    section: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """`quantization_config` of the base's config."""

    def applied_to(self, settings: QuantizationSettings) -> QuantizationSettings:
        """Return the settings that say how the base is quantised; bitsandbytes' methods only."""
        is_4bit = self.method in ("nf4", "fp4")
        changes: dict[str, Any] = {"load_in_4bit": is_4bit, "load_in_8bit": not is_4bit}
        if is_4bit:
            changes["bnb_4bit_quant_type"] = self.method
            changes["bnb_4bit_use_double_quant"] = self.double
        return dataclasses.replace(settings, **changes)


def read_config_json(source: BaseSource) -> dict[str, Any]:
    """Return the content of a base's `config.json`.

    Raises:
        ConfigError: It can't be read.
    """
    folder = Path(source.location)
    try:
        file = folder / "config.json" if folder.is_dir() else _fetch_config(source)
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        allowed = f"its config.json can't be read: {reason}"
        raise refusal("model.name_or_path", source.name, allowed) from error
    if not isinstance(values, dict):
        raise refusal(
            "model.name_or_path", source.name, "its config.json holds no mapping"
        )
    return values


def _fetch_config(source: BaseSource) -> Path:
    """Return the `config.json` of a base on the hub, from its cache if it has been fetched."""
    from huggingface_hub import hf_hub_download

    file = hf_hub_download(source.location, "config.json", revision=source.revision)
    return Path(file)


def base_quantization(values: Mapping[str, Any]) -> BaseQuantization | None:
    """Return the quantization of a base's files; None if they are not quantised.

    Args:
        values: The content of the base's `config.json`.
    """
    section = _quantization_section(values)
    if section is None:
        return None
    # Its method is called `bitsandbytes` in either case; these two say which one it is.
    if section.get("load_in_4bit"):
        # bitsandbytes' default, for files that do not say which.
        method = str(section.get("bnb_4bit_quant_type", "fp4"))
        double = bool(section.get("bnb_4bit_use_double_quant"))
        return BaseQuantization(
            method=method,
            bits=4,
            double=double,
            section=section,
        )
    if section.get("load_in_8bit"):
        return BaseQuantization("int8", 8, section=section)
    method = str(section.get("quant_method", "of an unknown method"))
    # AWQ's own files name it `w_bit`.
    bits = section.get("bits", section.get("w_bit"))
    if not bits:
        bits = BITS.get(method, 16)
    return BaseQuantization(method, float(bits), section=section)


def _quantization_section(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return `quantization_config`; a model of several modalities may have it further inside."""
    for section in (values, values.get("text_config"), values.get("llm_config")):
        if not isinstance(section, Mapping):
            continue
        quantization = section.get("quantization_config")
        if isinstance(quantization, Mapping):
            return quantization
    return None


def settings_of_base(
    base: BaseQuantization | None, settings: QuantizationSettings, model: ModelSettings
) -> QuantizationSettings:
    """Return the quantization that a run has: what its config asks for, or what the base has.

    Args:
        base: The quantization of the base's files.
        settings: `quantization`.
        model: `model`, for messages.

    Raises:
        ConfigError: The config asks for another quantization than the base has.
    """
    if base is None:
        return settings
    if is_quantized_again(base, settings):
        return settings
    if settings.is_quantized and settings.method != base.method:
        allowed = ["quantization=none, which uses it as it is"]
        # The config can name these methods only.
        if base.method in BITSANDBYTES:
            allowed.insert(0, f"quantization={base.method}")
        if base.method in DEQUANTIZED:
            allowed = ["quantization=nf4", "quantization=none, which dequantises it"]
        reason = f"model.name_or_path={model.name_or_path} is quantised already ({base.method})"
        key, value = _key_of_method(settings)
        raise refusal(key, value, f"{reason}; allowed: {', or '.join(allowed)}")
    if base.method in BITSANDBYTES:
        return base.applied_to(settings)
    return settings


def is_quantized_again(
    base: BaseQuantization | None, settings: QuantizationSettings
) -> bool:
    """Whether the weights of files in MXFP4 are quantised in 4 bits when they are loaded."""
    return base is not None and base.method in DEQUANTIZED and settings.load_in_4bit


def _key_of_method(settings: QuantizationSettings) -> tuple[str, object]:
    """Return the key that asks for a quantization, and its value."""
    if settings.load_in_8bit:
        return "quantization.load_in_8bit", True
    return "quantization.bnb_4bit_quant_type", settings.bnb_4bit_quant_type


def quantization_in_files(model: ModelSettings) -> str | None:
    """Return how a base is quantised in its files, as far as they are here; None: it is not."""
    name = model.name_or_path
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache

        if name.count("/") != 1:
            return None
        cached = try_to_load_from_cache(name, "config.json", revision=model.revision)
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    quantization = base_quantization(read_json(file) or {})
    return None if quantization is None else quantization.method
