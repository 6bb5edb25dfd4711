"""Compile the GPU decoder's kernels for cards that need not be there; prints what each one needs.

    python compile_kernels.py KERNELS HEAD_DIM CAPABILITY …

KERNELS is in the names of those that are compiled ("kernel": all).

A forward and a backward pass of a small base say which kernels are launched, with what arguments.
Nothing is computed. One line of JSON for each kernel and card: its name, the card's compute
capability, and its shared memory in bytes.
"""

import dataclasses
import importlib
import json
import sys
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    Qwen3_5TextConfig,
)

from finetune.app import compose_run
from finetune.config.schema import RunConfig
from finetune.engine.packed import backend_probe
from finetune.engine.packed.bank import Bank
from finetune.engine.packed.gpu import adapter_tables
from finetune.engine.packed.gpu.adapter_tables import MANY_TOKENS
from finetune.engine.packed.gpu.decoder import Decoder
from finetune.engine.packed.requests import Evaluate, ForwardBackward

MODULES = (
    "adapted_gate",
    "attention",
    "cross_entropy",
    "delta_rule",
    "gated_norm",
    "gated_product",
    "lowrank",
    "rms_norm",
    "rotary",
    "rotated_norm",
    "short_convolution",
)
"""Modules of the decoder that launch kernels."""

DTYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}

DIVISIBLE = [["tt.divisibility", 16]]


def main() -> None:
    """Print the lines."""
    part_of_name = sys.argv[1]
    head_dim, *capabilities = map(int, sys.argv[2:])
    launches: dict[str, tuple[Any, ...]] = {}

    def record(
        kernel: Any,
        grid: Any,
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        warps: int = 4,
        stages: int = 3,
    ) -> None:
        if part_of_name not in kernel.fn.__name__:
            return
        values = (*map(_kind, arguments), *constants)
        key = repr((kernel.fn.__name__, values, warps, stages))
        launches[key] = (kernel, arguments, constants, warps, stages)

    for name in MODULES:
        module = importlib.import_module(f"finetune.engine.packed.gpu.{name}")
        module.launch = record  # type: ignore[attr-defined]
    # Nothing is computed, so nothing is compared.
    backend_probe.failure = lambda *_, **__: None
    for architecture in ("llama", "gemma3", "gemma4", "qwen3_5"):
        _run(architecture, head_dim)
    for launch in launches.values():
        for capability in capabilities:
            shared = _shared_memory(launch, capability)
            line = {
                "kernel": launch[0].fn.__name__,
                "capability": capability,
                "shared": shared,
            }
            print(json.dumps(line), flush=True)


def _run(architecture: str, head_dim: int) -> None:
    """Let a base's decoder launch its kernels."""
    sizes = {
        "vocab_size": 512,
        "hidden_size": 4 * head_dim,
        "intermediate_size": 4 * head_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "pad_token_id": 0,
    }
    shapes: Any = LlamaConfig(**sizes)
    if architecture == "gemma3":
        layer_types = ["sliding_attention", "full_attention"]
        shapes = Gemma3TextConfig(**sizes, layer_types=layer_types)
    elif architecture == "gemma4":
        layer_types = ["sliding_attention", "full_attention"]
        shapes = Gemma4TextConfig(
            **sizes,
            layer_types=layer_types,
            global_head_dim=head_dim,
            vocab_size_per_layer_input=512,
        )
    elif architecture == "qwen3_5":
        # Its delta nets have heads of 128 columns.
        layer_types = ["linear_attention", "full_attention"]
        shapes = Qwen3_5TextConfig(**sizes, layer_types=layer_types)
    base = AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16)
    config: RunConfig = compose_run(
        ["quantization=none", "lora.r=8", "lora.dropout=0.1", "lora/target=all_linear"]
    )
    bank = Bank(base, config, Decoder(base, gradient_checkpointing=True))
    rows = [{"input_ids": list(range(40)), "labels": list(range(40))}]
    # Tokens from which tiles are large, and rank. The adapters' kernels are the same in all
    # architectures; those of ranks between these need less memory.
    passes = [(MANY_TOKENS, 8)]
    if architecture == "llama":
        passes += [(MANY_TOKENS, 128), (0, 8), (0, 32), (0, 128)]
    for many, rank in passes:
        adapter_tables.MANY_TOKENS = many
        lora = dataclasses.replace(config.lora, r=rank)
        slot = bank.slots.create(lora, 0)
        bank.forward_backward([ForwardBackward(slot, rows, 0.1, 1)])
    bank.evaluate([Evaluate(slot, rows)])


def _kind(argument: Any) -> Any:
    """What Triton compiles for, of an argument."""
    if isinstance(argument, torch.Tensor):
        return str(argument.dtype)
    if isinstance(argument, float):
        return "float"
    return argument % 16 == 0, argument == 1


def _shared_memory(launch: tuple[Any, ...], capability: int) -> int:
    """Compile a launch's kernel for a card, and return its shared memory in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments, constants, warps, stages = launch
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for number, name in enumerate(kernel.arg_names):
        place = (number,)
        if number >= len(arguments):
            signature[name] = "constexpr"
            values[place] = constants[number - len(arguments)]
            continue
        argument = arguments[number]
        if isinstance(argument, torch.Tensor):
            signature[name] = DTYPES[argument.dtype]
            attributes[place] = DIVISIBLE
        elif isinstance(argument, float):
            signature[name] = "fp32"
        elif argument == 1:
            signature[name] = "constexpr"
            values[place] = 1
        else:
            signature[name] = "i32"
            if argument % 16 == 0:
                attributes[place] = DIVISIBLE
    compiled = triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    shared: int = compiled.metadata.shared
    return shared


if __name__ == "__main__":
    main()
