"""The study as Oumi's own tuner does it: the third side of study.py. What it is told, and what its
adapters are worth.

    python oumi_study.py    in the folder of a study that `oumi tune` has ended: writes
    oumi_records.jsonl

Oumi needs an environment of its own, since its releases of torch, transformers and TRL are others
(0.9 was tried):

    python -m venv OUMI
    OUMI/bin/pip install "oumi[tune]"

and then `python benchmarks/study.py --oumi OUMI/bin/oumi`. `oumi tune` is one process that runs
Optuna over LoRA, one trial after the other, each with TRL's SFTTrainer on a base loaded anew; it
prunes nothing.

The same as on the other sides: the base, the rows, the space, TPE, LoRA on all linear layers,
AdamW, cosine schedule with a warm-up of 5 %, batch 4, the optimizer steps, batches of 8 for
evaluation. Chosen to its good:
- The rows come tokenised: it learns the very same tokens, and has no work with them.
- The base is plain float32, not NF4: nothing is dequantised. Its adapters are measured on that
base.
- Logits are computed only where a label is (TRL's `chunked_nll`), as the later TRL of the stock
side does by itself.
- No checkpoints on the way, no tracker, no usage reports, no gradient checkpointing. The adapters
are saved.

It searches by an evaluation after each trial's end, which it makes in any case. With four
evaluations a trial, three are therefore on the way: after a half, three quarters and all of the
steps. Its sampler takes no seed.
"""

import csv
import json
from pathlib import Path
from typing import Any

CONFIG, OUTPUT, RECORDS = "oumi.yaml", "oumi", "oumi_records.jsonl"


def write_config(folder: Path, trials: int, steps: int, quarters: int) -> None:
    """What `oumi tune` reads; JSON is YAML too. So many quarters of a trial end with an
    evaluation."""
    config = {
        "model": {"model_name": "base", "torch_dtype_str": "float32"},
        "data": {
            "train": {
                "datasets": [tokenised("train")],
                "collator_name": "text_with_padding",
            },
            "validation": {
                "datasets": [tokenised("eval")],
                "collator_name": "text_with_padding",
            },
        },
        "tuning": {
            "n_trials": trials,
            "output_dir": OUTPUT,
            "tunable_training_params": {
                "learning_rate": {"type": "loguniform", "low": 1e-4, "high": 1e-2}
            },
            "tunable_peft_params": {
                "lora_r": {"type": "categorical", "choices": [4, 8, 16, 32, 64]},
                "lora_alpha": {"type": "categorical", "choices": [8, 16, 32, 64]},
                "lora_dropout": {"type": "uniform", "low": 0.0, "high": 0.15},
            },
            "fixed_peft_params": {"lora_target_modules": ["all-linear"]},
            "fixed_training_params": training(steps, quarters),
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def tokenised(part: str) -> dict[str, Any]:
    """A data set of rows that have their tokens and labels."""
    return {
        "dataset_name": "json",
        "dataset_kwargs": {"data_files": f"{part}_tokens.jsonl"},
    }


def training(steps: int, quarters: int) -> dict[str, Any]:
    """What all trials share."""
    return {
        "seed": 0,
        "data_seed": 0,
        "use_peft": True,
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "optimizer": "adamw_torch",
        "eval_strategy": "steps",
        "eval_steps": steps // 4,
        "logging_steps": steps,
        "save_steps": 0,
        "enable_tensorboard": False,
        # After the last step it evaluates in any case.
        "trainer_kwargs": {
            "eval_delay": (6 - quarters) * steps // 4,
            "loss_type": "chunked_nll",
        },
    }


def main() -> None:
    """Measure the adapters of all complete trials as this project measures its own."""
    import torch
    from peft import PeftModel
    from stock_trial import common_measure
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    with open(
        Path(OUTPUT, "trials_results.csv"), encoding="utf-8", newline=""
    ) as table:
        trials = [row for row in csv.DictReader(table) if row["state"] == "COMPLETE"]
    with open(RECORDS, "w", encoding="utf-8") as records:
        for trial in trials:
            folder = Path(OUTPUT, f"trial_{trial['number']}")
            model = PeftModel.from_pretrained(base, folder)
            record = {
                "trial": int(trial["number"]),
                "eval/loss": common_measure(model, Path("eval_tokens.jsonl")),
                "oumi_eval_loss": float(trial["value"]),
                "train_tokens": trained_tokens(folder),
            }
            records.write(json.dumps(record) + "\n")
            base = model.unload()


def trained_tokens(folder: Path) -> float:
    """A trial's, as TRL counts them."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))[
        "log_history"
    ]
    return max(float(entry["num_tokens"]) for entry in history if "num_tokens" in entry)


if __name__ == "__main__":
    main()
