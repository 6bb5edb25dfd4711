"""The frozen base and its tokenizer, quantised by bitsandbytes, and the LoRA adapter on it."""

import contextlib
import ctypes
import gc
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune.config import ConfigError, LoraSettings, ModelSettings, QuantizationSettings, RunConfig, refusal
from finetune.hub import BaseSource
from finetune.records import named

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    # Every step has another number of tokens: memory that can grow is not cut up by them, given back and taken anew.
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

DEQUANTIZED_SHARE = 0.25
"""A dequantised base may take so much of the memory there is."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or the GPU's memory was too small."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and says_out_of_memory(str(error))
    )


def says_out_of_memory(text: str) -> bool:
    """Whether an error's message is of memory."""
    return any(
        words in text for words in ("out of memory", "not enough memory", "can't allocate memory", "MemoryError")
    )


def collect_garbage() -> None:
    """Collect what nothing refers to, and hand the host's memory back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # GNU's C library keeps freed memory otherwise
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_memory() -> None:
    """Collect what nothing refers to, frozen or not, and hand the host's and the GPU's memory back."""
    gc.unfreeze()
    collect_garbage()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def on_gpu() -> bool:
    """Whether there is a GPU to train on."""
    return torch.cuda.is_available()


def newer_gpu(device: torch.device) -> bool:
    """Whether it is a GPU for which today's kernels are written: Ampere or later."""
    if device.type != "cuda" or not on_gpu() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def take_device(number: int) -> None:
    """Leave one GPU visible to this process, before any is used: Trainer would spread a run over all of them."""
    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % len(names)]


def compute_dtype(settings: QuantizationSettings) -> torch.dtype:
    """The dtype of matrix products: on a CPU float32, unless bfloat16 is asked for by name."""
    name = settings.bnb_4bit_compute_dtype
    if not on_gpu():
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def autocast(settings: QuantizationSettings) -> torch.autocast:
    """Mixed precision as training has it, for evaluation and generation; nothing on a CPU."""
    dtype = compute_dtype(settings)
    return torch.autocast("cuda", dtype=dtype, enabled=on_gpu() and dtype != torch.float32)


def quantization_config(settings: QuantizationSettings) -> BitsAndBytesConfig | None:
    """The arguments of bitsandbytes, None for a base that is not quantised."""
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not settings.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_compute_dtype=compute_dtype(settings),
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
    )


def lora_config(settings: LoraSettings) -> "LoraConfig":
    """The arguments of PEFT."""
    from peft import LoraConfig

    arguments: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": settings.r,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": settings.target_modules,
        "bias": settings.bias,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "init_lora_weights": settings.init_lora_weights,
    }
    for name in settings.extra:
        if name in arguments:
            raise refusal(f"lora.extra.{name}", settings.extra[name], "has a key of its own")
    try:
        return LoraConfig(**arguments | settings.extra)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora.extra={settings.extra}: {error}") from None


def load_tokenizer(source: BaseSource, settings: ModelSettings) -> "PreTrainedTokenizerBase":
    """The base's tokenizer, padding on the right with the end token: labels and masks tell padding from an end."""
    with _readable(settings):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=settings.trust_remote_code
        )
    if tokenizer.eos_token is None:
        raise refusal("model.name_or_path", settings.name_or_path, "its tokenizer has no end token")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    return tokenizer


def read_base_config(source: BaseSource, model: ModelSettings) -> "PreTrainedConfig":
    """The base's own config: its architecture and shapes."""
    with _readable(model):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=model.trust_remote_code
        )
    return config


def skeleton_of(config: "PreTrainedConfig", model: ModelSettings) -> "PreTrainedModel":
    """A base's shapes without its weights.

    Always in float32: while transformers builds a model, PyTorch has its dtype for a default, in all threads, and
    one of them may be drawing an adapter.
    """
    with _readable(model), torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=model.trust_remote_code, dtype=torch.float32
        )
    return skeleton


def check_targets(source: BaseSource, model: ModelSettings, lora: LoraSettings) -> None:
    """Refuse target modules that the base does not have, before its weights are loaded."""
    if lora.target_modules == "all-linear":
        return
    skeleton = skeleton_of(read_base_config(source, model), model)
    linear = {name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    for target in targets:
        # PEFT takes a text as a pattern for whole names, a list's items as their ends.
        pattern = target if isinstance(lora.target_modules, str) else rf"(.*\.)?{re.escape(target)}"
        if not any(re.fullmatch(pattern, name) for name in linear):
            there = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise refusal("lora.target_modules", target, f"matches no linear layer; allowed: {', '.join(there)}")


def load_base(source: BaseSource, config: RunConfig) -> "PreTrainedModel":
    """The base with its weights, quantised and frozen, on the GPU if there is one.

    Raises ConfigError where bitsandbytes or the model's files can't give what is asked.
    """
    require_bitsandbytes(config.quantization)
    quantized = quantization_config(config.quantization)
    extra = dict(config.model.extra)
    if not on_gpu():
        extra.pop("device_map", None)
        paged = ", the paged optimizer in plain memory" if config.optimizer.name.startswith("paged") else ""
        dtype = str(compute_dtype(config.quantization)).removeprefix("torch.")
        log.info("no GPU: training on the CPU, in %s%s", dtype, paged)
    elif "device_map" not in extra:
        extra["device_map"] = {"": torch.cuda.current_device()}
    named = config.model.dtype
    with _readable(config.model), _known_extra(config.model):
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            revision=source.revision,
            trust_remote_code=config.model.trust_remote_code,
            attn_implementation=config.model.attn_implementation,
            dtype=compute_dtype(config.quantization) if named == "auto" else getattr(torch, named),
            quantization_config=quantized,
            use_safetensors=True,
            **extra,
        )
    for module in model.modules():
        # On a CPU with AVX512_BF16 the first evaluation would repack 4-bit weights for inference, and from then
        # on training would go through a product that has no gradient: silently nothing is learnt.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def available_memory() -> int:
    """Bytes of memory to compute in: the GPU's, or what this process may take of it, else the machine's."""
    if on_gpu():
        total = torch.cuda.get_device_properties(0).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keeps_dequantized(weights: int, config: RunConfig) -> bool:
    """Whether so many 4-bit weights are dequantised once: where memory allows.

    On a GPU not with gradient checkpointing, which is for where memory is short.
    """
    if not config.quantization.load_in_4bit or (on_gpu() and config.trainer.gradient_checkpointing is True):
        return False
    return compute_dtype(config.quantization).itemsize * weights <= available_memory() * DEQUANTIZED_SHARE


def keep_dequantized(model: "PreTrainedModel", config: RunConfig) -> None:
    """Dequantise a 4-bit base's weights once, not in each forward and backward, where memory allows.

    The numbers are the same, bit for bit: bitsandbytes too multiplies by the dequantised weights.
    """
    if not config.quantization.load_in_4bit:
        return
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear4bit)
    ]
    if not keeps_dequantized(sum(layer.in_features * layer.out_features for _, _, layer in layers), config):
        return
    for parent, name, layer in layers:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        if weight.dtype != compute_dtype(config.quantization):
            return  # forward and backward would round differently
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        setattr(parent, name, plain)


_ONE_GENERATOR = threading.Lock()
"""PyTorch's own is the same for all threads."""


def add_adapter(model: "PreTrainedModel", lora: LoraSettings, seed: int) -> "PeftModel":
    """A fresh LoRA adapter in float32 on a base, drawn from the run's own seed."""
    from peft import get_peft_model

    with _ONE_GENERATOR:
        torch.manual_seed(seed)
        return get_peft_model(model, lora_config(lora))


def told(device: torch.device) -> "torch.cuda.Event | None":
    """A mark behind all that a GPU has been told to do until now; two of them say how long it takes. None on a CPU."""
    if device.type != "cuda":
        return None
    mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    mark.record()
    return mark


@contextlib.contextmanager
def waiting_only_for(mark: "torch.cuda.Event | None") -> Iterator[None]:
    """What is copied from the GPU here waits for what it was told before the mark, not for what came after."""
    if mark is None:
        yield
        return
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_event(mark)
    with torch.cuda.stream(aside):
        yield


def save_adapter(model: "PeftModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """The adapter as plain PEFT reads it, the tokenizer beside it; whole or not at all."""
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    with named(draft):
        model.save_pretrained(draft, save_embedding_layers=False)
    tokenizer.save_pretrained(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def load_adapter(model: "PeftModel", folder: Path) -> None:
    """Put saved adapter weights into a model that has the same adapter."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def require_bitsandbytes(settings: QuantizationSettings) -> None:
    """Refuse to quantise where bitsandbytes does not work; even PEFT imports it."""
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return
    key = "quantization.load_in_4bit" if settings.load_in_4bit else "quantization.load_in_8bit"
    try:
        import bitsandbytes.cextension as native
    except ImportError as error:
        raise refusal(key, True, f"bitsandbytes can't be imported ({error}); allowed here: quantization=none") from None
    if "Mock" in type(native.lib).__name__:
        raise refusal(key, True, "bitsandbytes has no library for this machine; allowed here: quantization=none")


@contextlib.contextmanager
def _known_extra(settings: ModelSettings) -> Iterator[None]:
    """Name the key of an argument that from_pretrained does not take."""
    try:
        yield
    except TypeError as error:
        if not settings.extra:
            raise
        raise ConfigError(f"model.extra={settings.extra}: {error}") from error


@contextlib.contextmanager
def _readable(settings: ModelSettings) -> Iterator[None]:
    """Say in one line what transformers says of a model folder that it can't read."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise refusal("model.name_or_path", settings.name_or_path, f"can't be loaded: {reason}") from error
