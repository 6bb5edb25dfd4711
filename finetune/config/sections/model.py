"""The base model and its quantization."""

from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.config.sections.section import DtypeName, Section


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """The base model."""

    section = "model"

    name_or_path: str
    """A hub id, a folder, or a packaged model: `smollm2_135m`, `gemma3_270m`."""

    revision: str | None
    """Branch, tag or commit on the hub; null: the default branch."""

    trust_remote_code: bool
    """Whether code that comes with the model may run."""

    attn_implementation: str | None
    """Name of transformers' attention implementation (sdpa, eager, flash_attention_2, …);
    null: transformers chooses."""

    dtype: DtypeName
    """Dtype of the weights that are not quantised; auto: the compute dtype."""

    chat_template: str | None
    """Chat template: Jinja text, or the name of one of the tokenizer's own; null: its default."""

    extra: dict[str, Any]
    """Further arguments of `from_pretrained`."""

    learning_rate: float | None = None
    """LoRA learning rate that suits this base: a number, or a mapping from `name_or_path` to
    numbers; null: a rule of the base's hidden size. `optimizer.learning_rate` wins over it."""
    # The defaults are for run folders that were written before these keys existed.

    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, for example `{enable_thinking: false}`."""

    def __post_init__(self) -> None:
        rate = self.learning_rate
        self.require(
            "learning_rate", rate is None or rate > 0, "must be above 0, or null"
        )
        allowed = "must be a hub id, a folder, or smollm2_135m"
        self.require("name_or_path", bool(self.name_or_path), allowed)


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings(Section):
    """Quantization of the base by bitsandbytes."""

    section = "quantization"

    load_in_4bit: bool
    """Whether the base's linear layers and experts are quantised to 4 bits (QLoRA)."""

    load_in_8bit: bool
    """Whether the base's linear layers are quantised to 8 bits (LLM.int8()); experts are not."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    """The 4-bit data type."""

    bnb_4bit_compute_dtype: DtypeName
    """Dtype of matrix products; auto: bfloat16, float16 on GPUs without bfloat16, float32 on a
    CPU."""

    bnb_4bit_use_double_quant: bool
    """Whether the scales of 4-bit weights are quantised as well, which saves about 0.4 bits per
    weight."""

    @property
    def is_quantized(self) -> bool:
        """Whether the base has 4-bit or 8-bit weights."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def method(self) -> str:
        """nf4, fp4, int8 or none."""
        if self.load_in_4bit:
            return self.bnb_4bit_quant_type
        return "int8" if self.load_in_8bit else "none"

    def __post_init__(self) -> None:
        both_widths = self.load_in_4bit and self.load_in_8bit
        reason = "load_in_4bit is true as well; a base is either 4-bit or 8-bit"
        self.require("load_in_8bit", not both_widths, reason)
