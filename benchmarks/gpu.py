"""Tokens a second and memory of QLoRA on a GPU: this project's slots against TRL, on a base of Llama-2-7B's shapes.

    python benchmarks/gpu.py [--slots 1,2,4,8,16] [--length short|long] [--checkpointing off|on]
                             [--lora q_v|all_linear] [--sides ours,trl,liger] [--steps 6] [--layers 32]

The base has random weights in NF4 (double quantised: no), bfloat16. Rows have random tokens, all of which the loss
counts: short ones 128 to 512 tokens (mean about 350), long ones 2,048. Batch 4, AdamW in 32 bits. Tokens are
counted without padding, the first two steps are not. `q_v` is r 64 with dropout 0.1, `all_linear` r 16 without.
`trl` is SFTTrainer as it is, `liger` the same with Liger's kernels. The share of the roofline is of a bfloat16
matrix product's rate on this GPU, at 4 operations a weight and token (6 with checkpointing).
"""

import argparse
import gc
import random
import tempfile
import time
from typing import Any

import torch

SEED = 0


def main() -> None:
    """Measure each side in turn and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="1,2,4,8,16")
    parser.add_argument("--length", choices=["short", "long"], default="short")
    parser.add_argument("--checkpointing", choices=["off", "on"], default="off")
    parser.add_argument("--lora", choices=["q_v", "all_linear"], default="q_v")
    parser.add_argument("--sides", default="ours,trl")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=32, help="fewer make a dry run")
    parser.add_argument("--hidden", type=int, default=4096)
    arguments = parser.parse_args()
    base, rows = make_base(arguments.layers, arguments.hidden), make_rows(arguments.length)
    peak = matmul_rate()
    weights = sum(
        module.in_features * module.out_features for module in base.modules() if hasattr(module, "in_features")
    )
    print(f"bfloat16 matmul {peak / 1e12:.0f} TFLOP/s, {weights / 1e9:.2f} billion weights", flush=True)
    print("| side | slots | tokens/s | peak memory, GiB | of the roofline |\n|---|---|---|---|---|", flush=True)
    operations = (6 if arguments.checkpointing == "on" else 4) * weights
    for side in arguments.sides.split(","):
        for slots in [int(number) for number in arguments.slots.split(",")] if side == "ours" else [1]:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                rate = ours(base, rows, slots, arguments) if side == "ours" else trl(base, rows, side, arguments)
            except torch.OutOfMemoryError:
                print(f"| {side} | {slots} | out of memory | | |", flush=True)
                continue
            memory = torch.cuda.max_memory_allocated() / 2**30
            share = rate * operations / peak
            print(f"| {side} | {slots} | {rate:.0f} | {memory:.1f} | {share:.0%} |", flush=True)


def make_base(layers: int, hidden: int) -> Any:
    """A Llama of Llama-2-7B's shapes with random weights in NF4, on the GPU."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11008 // 4096,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=32000,
        max_position_embeddings=4096,
        use_cache=False,
    )
    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    head = model.lm_head
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and child is not head:
                layer = Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                    quant_type="nf4", device="meta",
                )  # fmt: skip
                weight = torch.randn(child.weight.shape, device="cuda", dtype=torch.bfloat16) * 0.02
                layer.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to("cuda")
                layer.quant_state = layer.weight.quant_state
                setattr(parent, name, layer)
    for parent in list(model.modules()):
        for name, parameter in list(parent.named_parameters(recurse=False)):
            if parameter.is_meta:
                fresh = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16) * 0.02
                made = fresh if parameter.ndim > 1 else torch.ones_like(fresh)
                setattr(parent, name, torch.nn.Parameter(made, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to("cuda")
    model.is_loaded_in_4bit = True
    model.quantization_method = "bitsandbytes"
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return model


def make_rows(length: str) -> list[dict[str, list[int]]]:
    """256 rows of random tokens."""
    draw = random.Random(SEED)
    rows = []
    for _ in range(256):
        tokens = 2048 if length == "long" else min(512, max(128, round(draw.gauss(350, 110))))
        ids = [draw.randrange(3, 32000) for _ in range(tokens)]
        rows.append({"input_ids": ids, "labels": list(ids)})
    return rows


def matmul_rate() -> float:
    """Operations a second of a bfloat16 matrix product of the base's shape."""
    left, right = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((8192, 4096), (4096, 11008)))
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            left @ right
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * 8192 * 4096 * 11008 / (time.perf_counter() - began))
    return best


def run_config(arguments: argparse.Namespace, seed: int) -> Any:
    """The run's config, as a command line has it."""
    from finetune.cli import compose_run

    lora = {"q_v": ["lora=r64", "lora/target=q_v", "lora.dropout=0.1"], "all_linear": ["lora=r16"]}[arguments.lora]
    checkpointing = f"trainer.gradient_checkpointing={arguments.checkpointing == 'on'}"
    return compose_run([*lora, checkpointing, f"seed={seed}", "trainer.max_steps=50", "optimizer.learning_rate=1e-4"])


def ours(base: Any, rows: list[dict[str, list[int]]], slots: int, arguments: argparse.Namespace) -> float:
    """Tokens a second of so many runs in slots of one bank, optimizer included."""
    from contextlib import nullcontext

    from datasets import Dataset

    from finetune.bank import Bank
    from finetune.packed_engine import PackedTraining
    from finetune.progress import Progress

    bank = getattr(base, "bank", None) or Bank(base, run_config(arguments, 0))
    base.bank = bank
    data, tokens = Dataset.from_list(rows), 0

    class Counter:
        state = Progress()

        def live(self) -> Any:
            return nullcontext()

        def begin(self) -> Any:
            yield from ()

        def step(self, number: int, loss: float, norm: float, rate: float, trained: int, seconds: float) -> Any:
            nonlocal tokens
            tokens += trained
            yield from ()

    works = []
    for seed in range(slots):
        config = run_config(arguments, seed)
        training = PackedTraining(config, bank.slot(config.lora, seed), data, 50)
        works.append(training.train(Counter(), None, None))  # type: ignore[arg-type]
    wishes: list[Any] = [next(work) for work in works]
    for step in range(arguments.steps + 2):
        if step == 2:
            torch.cuda.synchronize()
            began, tokens = time.perf_counter(), 0
        granted = bank.grant(wishes)
        for answer in granted:
            if isinstance(answer, Exception):
                raise answer
        wishes = [work.send(answer) for work, answer in zip(works, granted, strict=True)]
    torch.cuda.synchronize()
    return tokens / (time.perf_counter() - began)


def trl(base: Any, rows: list[dict[str, list[int]]], side: str, arguments: argparse.Namespace) -> float:
    """Tokens a second of one run by SFTTrainer as it is."""
    from datasets import Dataset
    from peft import get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from finetune.base import lora_config

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"</s>": 0}, unk_token="</s>")), eos_token="</s>", pad_token="</s>"
    )
    seen: list[tuple[float, float]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "num_tokens" in logs:
                torch.cuda.synchronize()
                seen.append((time.perf_counter(), logs["num_tokens"]))

    model = get_peft_model(base, lora_config(run_config(arguments, 0).lora))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, max_steps=arguments.steps + 2, per_device_train_batch_size=4, bf16=True,
            gradient_checkpointing=arguments.checkpointing == "on", optim="paged_adamw_32bit", learning_rate=1e-4,
            logging_steps=1, report_to="none", save_strategy="no", max_length=None, use_liger_kernel=side == "liger",
            dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Watch()],
        )  # fmt: skip
        trainer.train()
    model.unload()
    (first, before), (last, after) = seen[1], seen[-1]
    return (after - before) / (last - first)


if __name__ == "__main__":
    main()
