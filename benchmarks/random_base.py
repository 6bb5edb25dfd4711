"""A base of a published model's shapes with random weights, and what its measurements share."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

SEED = 0
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder, in the order in which they are mostly told."""

    architecture: str
    """Before `Config`, as in transformers."""
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool = False
    """Whether the head is the embedding."""
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


SIZES = {
    "tiny": Sizes("Llama", 128, 344, 2, 2, 2, 64, 32000),
    "tiny_experts": Sizes("Qwen3Moe", 128, 344, 2, 2, 2, 64, 32000, False, {
        "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
    }),
    "llama2_7b": Sizes("Llama", 4096, 11008, 32, 32, 32, 128, 32000),
    "smollm2_135m": Sizes("Llama", 576, 1536, 30, 9, 3, 64, 49152, True),
    "llama3_3_70b": Sizes("Llama", 8192, 28672, 80, 64, 8, 128, 128256),
    "llama3_2_1b": Sizes("Llama", 2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama3_2_3b": Sizes("Llama", 3072, 8192, 28, 24, 8, 128, 128256, True),
    "qwen3_0_6b": Sizes("Qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "gemma3_270m": Sizes("Gemma3Text", 640, 2048, 18, 4, 1, 256, 262144, True, {"sliding_window": 512}),
    "gemma3_4b": Sizes("Gemma3Text", 2560, 10240, 34, 8, 4, 256, 262208, True, {"sliding_window": 1024}),
    "phi4_mini": Sizes("Phi3", 3072, 8192, 32, 24, 8, 128, 200064, True, {"partial_rotary_factor": 0.75}),
    "ministral3_3b": Sizes("Ministral3", 3072, 9216, 26, 32, 8, 128, 131072, True, {"sliding_window": None}),
    "qwen3_5_4b": Sizes("Qwen3_5Text", 2560, 9216, 32, 16, 4, 256, 248320, True, {
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    }),
    "qwen3_30b_a3b": Sizes("Qwen3Moe", 2048, 6144, 48, 32, 4, 128, 151936, False, {
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }),
    "gpt_oss_20b": Sizes("GptOss", 2880, 2880, 24, 64, 8, 64, 201088, False, {
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
    }),
}  # fmt: skip
"""By the name of the choice in `conf/model`; windows and angles are transformers' defaults, where
nothing is said. After the models' own config files."""


def shapes(name: str) -> Any:
    """Return the config of a base of these sizes."""
    import transformers

    sizes = SIZES[name]
    make_config = getattr(transformers, f"{sizes.architecture}Config")
    return make_config(
        hidden_size=sizes.hidden, intermediate_size=sizes.inner, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head_dim, vocab_size=sizes.vocabulary, tie_word_embeddings=sizes.is_tied,
        max_position_embeddings=4096, pad_token_id=0, use_cache=False, dtype=DTYPE, **sizes.more,
    )  # fmt: skip


def make_base(name: str, double: bool, gpus: int = 1) -> Any:
    """Make a base with random weights in NF4, its scales quantised too where it is `double`.

    Its weights in 16 bits are never in memory, but for one tensor's. Over several GPUs it is spread
    as `load_base` does it (`gpu_of`), but nothing moves its inputs yet.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from finetune.model.expert_quantizer import prepare_experts
    from finetune.model.routed_experts import use_routed_experts

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=DTYPE, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
    )  # fmt: skip
    torch.manual_seed(SEED)
    # Weights without memory; buffers, as the frequencies of the rotary embedding, are real.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(shapes(name), dtype=DTYPE)
    head = model.get_output_embeddings()
    places = _device_map(model, gpus)
    for module_name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and child is not head:
                device = _device(f"{module_name}.{child_name}", places)
                setattr(parent, child_name, _random_layer(child, double, device))
    prepare_experts(model, settings)
    for module_name, parent in list(model.named_modules()):
        device = _device(module_name, places)
        for parameter_name, parameter in list(parent.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(parent, parameter_name, _random_weight(parameter, device))
    model.tie_weights()
    model.gpu_of = places
    for buffer in model.buffers():
        buffer.data = buffer.data.to(DEVICE)
    model.is_loaded_in_4bit = True
    model.quantization_method = "bitsandbytes"
    model.config.quantization_config = settings
    use_routed_experts(model)
    return model


def _device_map(model: Any, gpus: int) -> dict[str, int]:
    """The GPU of each module of a base over several; empty: all are on one."""
    from finetune.model.layer_devices import WeightBytes, spread_blocks

    if gpus == 1:
        return {}
    return spread_blocks(model, gpus, WeightBytes(0.5, 2)).device_map(model)


def _device(module: str, places: dict[str, int]) -> torch.device:
    """Where a module's own weights are."""
    for name, gpu in places.items():
        if f"{module}.".startswith(f"{name}."):
            return torch.device("cuda", gpu)
    return DEVICE


def _random_layer(child: torch.nn.Linear, double: bool, device: torch.device) -> Any:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        child.in_features, child.out_features, bias=child.bias is not None,
        compute_dtype=DTYPE, quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = torch.randn(child.weight.shape, device=device, dtype=DTYPE) * 0.02
    data, state = quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    layer.weight = Params4bit(
        data, requires_grad=False, quant_state=state, quant_type="nf4", blocksize=64,
        bnb_quantized=True,
    )  # fmt: skip
    layer.quant_state = state
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False
    return layer


def _random_weight(
    parameter: torch.nn.Parameter, device: torch.device
) -> torch.nn.Parameter:
    from bitsandbytes.nn import Params4bit

    weight = torch.ones(parameter.shape, device=device, dtype=DTYPE)
    if parameter.ndim > 1:
        weight.normal_(0, 0.02)
    # Of experts; it quantises what it is moved with.
    if isinstance(parameter, Params4bit):
        quantized: torch.nn.Parameter = Params4bit(weight, **vars(parameter)).to(device)
        return quantized
    return torch.nn.Parameter(weight, requires_grad=False)


def write_checkpoint(folder: Path, name: str) -> None:
    """Write a base with random weights in the GPU's dtype, and a tokenizer of 32,000 words."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(shapes(name), dtype=DTYPE)
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer().save_pretrained(folder)


def tokenizer() -> Any:
    """One token a word: w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{f"w{number}": number for number in range(3, 32000)},
    }
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


def attention_within_bounds() -> str:
    """Put PyTorch's attention within boundaries into transformers, for batches without padding;
    returns its name."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface

    latest: dict[str, Any] = {}

    def attend(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scaling: Any = None,
        position_ids: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if latest.get("of") is not position_ids:
            starts = (position_ids[0] == 0).nonzero()[:, 0]
            bounds = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).to(
                torch.int32
            )
            latest.update(
                of=position_ids, bounds=bounds, longest=int(bounds.diff().max())
            )
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        bounds, longest = latest["bounds"], latest["longest"]
        found = varlen_attn(
            q,
            k,
            v,
            bounds,
            bounds,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),
        )
        assert isinstance(found, torch.Tensor)
        return found[None], None

    AttentionInterface.register("within_bounds", attend)
    return "within_bounds"
