"""The script that people write around TRL to be swept by hydra-optuna-sweeper: the stock side of
study.py.

    python stock_trial.py -m hydra/sweeper=optuna lora.r=choice(8,16) ...

It loads the base, trains an adapter, evaluates on the way and returns the last evaluation's loss.
Nothing slows it down: no checkpoints, no tracker, no gradient checkpointing, batches of 8 for
evaluation. Twice it departs from plain TRL, each time to its own good: on CPUs whose bitsandbytes
kernels for inference have no gradient those are switched off, so that it learns at all; and the
adapter, which TRL rounds to bfloat16, is put back to float32, since bfloat16 is very slow on CPUs
without it.

When a trial has ended, its model is measured as this project measures its own, on the same tokens.
That takes no part in the study; its seconds are written down and subtracted. gpu_study.py leaves
it out, and gives further arguments of SFTConfig.
"""

import json
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from datasets import Dataset, load_dataset
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

DEFAULTS = {
    "base": "base",  # model folder
    "rows": {
        "train": "train.jsonl",
        "eval": "eval.jsonl",
        "tokens": "eval_tokens.jsonl",
    },
    "records": "records.jsonl",  # gets a line for each trial
    "steps": 12,
    "seed": 0,
    "lora": {"r": 16, "alpha": 16, "dropout": 0.0, "targets": "all-linear"},
    "optimizer": {"learning_rate": 1e-3},
    "arguments": {},  # of SFTConfig
    "within_bounds": False,  # PyTorch's attention within boundaries, for batches without padding
}
ConfigStore.instance().store("config", DEFAULTS)


@hydra.main(config_name="config")
def main(config: DictConfig) -> float:
    """One trial."""
    whole = time.perf_counter()
    trainer = train(config)
    seconds = time.perf_counter() - whole
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    began = time.perf_counter()
    loss = (
        common_measure(trainer.model, Path(config.rows.tokens))
        if config.rows.tokens
        else None
    )
    record = {
        "trial": HydraConfig.get().job.num,
        "eval/loss": loss,
        "trl_eval_loss": last["eval_loss"],
        "train_tokens": last["eval_num_tokens"],
        "measuring_seconds": time.perf_counter() - began,
        "seconds": seconds,
    }
    with open(config.records, "a", encoding="utf-8") as records:
        records.write(json.dumps(record) + "\n")
    return float(last["eval_loss"])


def train(config: DictConfig) -> SFTTrainer:
    """What TRL needs to train one adapter."""
    set_seed(config.seed)
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    attention = None
    if config.within_bounds:
        from random_base import attention_within_bounds

        attention = attention_within_bounds()
    model = AutoModelForCausalLM.from_pretrained(
        config.base,
        quantization_config=quantization,
        dtype=dtype,
        attn_implementation=attention,
        device_map={"": 0} if gpu else None,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    arguments: dict[str, Any] = {
        "output_dir": HydraConfig.get().runtime.output_dir,
        "seed": config.seed,
        "max_steps": config.steps,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": config.optimizer.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # below 1: a share of all steps
        "optim": "adamw_torch",
        "completion_only_loss": True,
        "eval_strategy": "steps",
        "eval_steps": config.steps // 4,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "use_cpu": not gpu,
        "bf16": gpu,
    }
    rows = load_dataset(
        "json", data_files={"train": config.rows.train, "eval": config.rows.eval}
    )
    targets = (
        config.lora.targets
        if isinstance(config.lora.targets, str)
        else list(config.lora.targets)
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments | dict(config.arguments)),
        train_dataset=rows["train"],
        eval_dataset=rows["eval"],
        processing_class=AutoTokenizer.from_pretrained(config.base),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=targets,
        ),
    )
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    trainer.train()
    return trainer


def common_measure(model: torch.nn.Module, tokens: Path) -> float:
    """The held-out loss as this project has it: the mean over all answers' tokens."""
    from finetune.config.sections.model import QuantizationSettings
    from finetune.engine.evaluation import evaluate

    rows = Dataset.from_list(
        [json.loads(line) for line in tokens.read_text(encoding="utf-8").splitlines()]
    )
    quantization = QuantizationSettings(
        load_in_4bit=True,
        load_in_8bit=False,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="auto",
        bnb_4bit_use_double_quant=False,
    )
    return evaluate(model, rows, 8, quantization).loss


if __name__ == "__main__":
    main()
