"""A Llama of Llama-2-7B's shapes with random weights, and what its measurements share; small where
it is `tiny`."""

from pathlib import Path
from typing import Any

import torch

SEED = 0
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32


def shapes(tiny: bool) -> Any:
    """Llama-2-7B's, or small ones."""
    from transformers import LlamaConfig

    hidden, layers = (128, 2) if tiny else (4096, 32)
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 11008 // 4096, num_hidden_layers=layers,
        num_attention_heads=hidden // 64 if tiny else 32, num_key_value_heads=hidden // 64 if tiny else 32,
        vocab_size=32000, max_position_embeddings=4096, use_cache=False, dtype=DTYPE,
    )  # fmt: skip


def make_base(tiny: bool, double: bool) -> Any:
    """A Llama with random weights in NF4, its scales quantised too where it is `double`."""
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = shapes(tiny)
    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(DTYPE)
    head = model.lm_head
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and child is not head:
                layer = Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=DTYPE, quant_type="nf4",
                    device="meta",
                )  # fmt: skip
                weight = (
                    torch.randn(child.weight.shape, device=DEVICE, dtype=DTYPE) * 0.02
                )
                data, state = quantize_4bit(
                    weight, blocksize=64, quant_type="nf4", compress_statistics=double
                )
                layer.weight = Params4bit(
                    data,
                    requires_grad=False,
                    quant_state=state,
                    quant_type="nf4",
                    blocksize=64,
                    bnb_quantized=True,
                )
                layer.quant_state = state
                setattr(parent, name, layer)
    for parent in list(model.modules()):
        for name, parameter in list(parent.named_parameters(recurse=False)):
            if parameter.is_meta:
                fresh = torch.randn(parameter.shape, device=DEVICE, dtype=DTYPE) * 0.02
                made = fresh if parameter.ndim > 1 else torch.ones_like(fresh)
                setattr(parent, name, torch.nn.Parameter(made, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(DEVICE)
    model.is_loaded_in_4bit = True
    model.quantization_method = "bitsandbytes"
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=DTYPE
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def write_checkpoint(folder: Path, tiny: bool) -> None:
    """A Llama with random weights in the GPU's dtype, and a tokenizer of 32,000 words."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        model = LlamaForCausalLM(shapes(tiny))
    torch.set_default_dtype(before)
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
