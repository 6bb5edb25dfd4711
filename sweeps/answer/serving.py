"""Shell commands that serve a study's adapters: with vLLM, and with Ollama.

What vLLM accepts was read in its version 0.33.0 (`vllm/config/lora.py`, `vllm/lora/peft_helper.py`)
and is recorded here; `tests/sweeps/answer/test_serving.py` checks it against an installed vLLM.
"""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.model.adapter_files import ADAPTER_CONFIG
from finetune.model.base_quantization import (
    BITSANDBYTES,
    DEQUANTIZED,
    base_quantization,
)
from finetune.model.gguf.modelfile import ollama_name
from finetune.model.packaged import PACKAGED_MODELS
from finetune.run.load import read_run_config
from sweeps.answer.winner import find_winner
from sweeps.study.study import Study

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank` from which all its versions take one that is large enough."""

SERVED_ADAPTERS = 3
"""The most adapters of one study that a command serves beside each other."""

PLAIN_INITIALIZATIONS = ("gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` after which the adapter is one of the unchanged base."""


def serving_commands(study: Study) -> list[tuple[str, str]]:
    """List commands that serve the winner, merged into its base, and the best adapters unmerged.

    Args:
        study: the study.

    Returns:
        Pairs of a short purpose and a command, for the current working directory.
    """
    best = RunFolder(study.folder / "best")
    config = read_run_config(best.path) if best.identity.exists() else None
    pairs = []
    quantization = None if config is None else _base_quantization(config)
    # `finetune.merge` takes no base that is quantised by another method.
    if quantization is None or quantization in BITSANDBYTES | DEQUANTIZED:
        pairs += _merged_commands(study, config)
    # vLLM has no kernels for bitsandbytes any more.
    if config is not None and quantization not in BITSANDBYTES:
        command = _adapters_command(study, best, config)
        if command is not None:
            pairs.append(("adapters", command))
    return pairs


def _merged_commands(study: Study, config: RunConfig | None) -> list[tuple[str, str]]:
    """Commands on the winner's adapter merged into its base."""
    folder = shlex.quote(os.path.relpath(study.folder))
    merged = shlex.quote(os.path.relpath(study.folder / "merged"))
    exported = os.path.relpath(study.folder / "exported")
    modelfile = shlex.quote(os.path.join(exported, "Modelfile"))
    name = ollama_name(study.name)
    return [
        ("merge", f"python -m finetune.merge {folder}/best --to {merged}"),
        ("serve", f"vllm serve {merged}{_template_flag(config)}"),
        (
            "export",
            f"python -m finetune.export {folder}/best --to {shlex.quote(exported)}",
        ),
        ("Ollama", f"ollama create {name} -f {modelfile} && ollama run {name}"),
    ]


def _template_flag(config: RunConfig | None) -> str:
    """Return vLLM's flag for the variables that the winner's chat template was rendered with.

    Empty where there are none, and for several objectives, which have no one winner.
    """
    if config is None or not config.model.template_kwargs:
        return ""
    argument = shlex.quote(json.dumps(dict(config.model.template_kwargs)))
    return f" --default-chat-template-kwargs {argument}"


def _base_quantization(config: RunConfig) -> str | None:
    """Return how a base is quantised in its files, as far as they are here; None: it is not."""
    name = config.model.name_or_path
    file = Path(name).expanduser() / "config.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache

        if name.count("/") != 1:
            return None
        cached = try_to_load_from_cache(
            name, "config.json", revision=config.model.revision
        )
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    quantization = base_quantization(read_json(file) or {})
    return None if quantization is None else quantization.method


def _adapters_command(study: Study, best: RunFolder, config: RunConfig) -> str | None:
    """Return the command that serves the base with the study's best adapters beside it.

    None where vLLM would refuse the winner's adapter: merged, it serves it.
    """
    served = _served_adapters(study, best)
    if not served:
        return None
    ranks = [rank for _, _, rank in served]
    words = ["vllm", "serve", *_base_words(best, config), "--enable-lora"]
    words += ["--max-lora-rank", str(vllm_rank(max(ranks)))]
    words += ["--max-loras", str(len(served)), "--lora-modules"]
    words += [_lora_module(name, os.path.relpath(path)) for name, path, _ in served]
    adapter = os.path.relpath(best.adapter)
    # The ends of answers that were learnt; the base's own file may have others.
    words += ["--generation-config", adapter]
    if config.model.chat_template is not None:
        words += ["--chat-template", f"{adapter}/chat_template.jinja"]
    return shlex.join(words) + _template_flag(config)


def _lora_module(name: str, path: str) -> str:
    """Return a value of `--lora-modules`; vLLM reads one with more signs as JSON only."""
    if "=" in path or "," in path:
        return json.dumps({"name": name, "path": path}, ensure_ascii=False)
    return f"{name}={path}"


def _served_adapters(study: Study, best: RunFolder) -> list[tuple[str, Path, int]]:
    """Return the adapters that one vLLM serves: name, folder, rank; the winner's first.

    Empty if vLLM does not take the winner's. Trials on another base are left out.
    """
    winner = _adapter(best.adapter)
    if winner is None:
        return []
    model = _identity(best)
    served = [("best", best.adapter, winner)]
    first = find_winner(study)
    for trial in study.ranked():
        run = study.folder_of(trial.number)
        rank = None if trial == first else _adapter(run.adapter)
        if rank is None or _identity(run) != model:
            continue
        served.append((f"trial{trial.number}", run.adapter, rank))
        if len(served) == SERVED_ADAPTERS:
            break
    return served


def _identity(run: RunFolder) -> tuple[Any, Any]:
    """What two adapters must share, to be served beside each other: base, and how it is asked."""
    values = read_json(run.identity) or {}
    return values.get("base_model"), (values.get("config") or {}).get("model")


def _adapter(folder: Path) -> int | None:
    """Return an adapter's rank; None: there is none, or vLLM does not take it."""
    config = read_json(folder / ADAPTER_CONFIG)
    if config is None or vllm_refusal(config) is not None:
        return None
    rank: int = config["r"]
    return rank


def vllm_rank(rank: int) -> int:
    """Return the value of `--max-lora-rank` for adapters up to a rank."""
    return min(value for value in VLLM_RANKS if value >= rank)


def vllm_refusal(config: Mapping[str, Any]) -> str | None:
    """Return what vLLM does not serve of an adapter; None: it serves it.

    Ranks and scalings of single layers are among it, because only the newest versions read them.

    Args:
        config: the adapter's `adapter_config.json`.
    """
    initialization = config.get("init_lora_weights", True)
    is_plain = not isinstance(initialization, str)
    targets = config.get("target_modules") or []
    reasons = {
        "DoRA": config.get("use_dora"),
        "biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        f"init_lora_weights={initialization}": not is_plain
        and initialization.lower() not in PLAIN_INITIALIZATIONS,
        "ranks of single layers": config.get("rank_pattern"),
        "alphas of single layers": config.get("alpha_pattern"),
        "modules_to_save": config.get("modules_to_save"),
        "trained tokens": config.get("trainable_token_indices"),
        "adapters on experts": config.get("target_parameters"),
        "repeated layers": config.get("layer_replication"),
        "adapters on embeddings": not isinstance(targets, str)
        and any(name.endswith(("embed_tokens", "lm_head")) for name in targets),
        f"a rank above {VLLM_RANKS[-1]}": config["r"] > VLLM_RANKS[-1],
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _base_words(best: RunFolder, config: RunConfig) -> list[str]:
    """Return how vLLM is given the base: a folder, or a hub id with its commit."""
    name = config.model.name_or_path
    packaged = PACKAGED_MODELS.get(name)
    folder = Path(name).expanduser()
    if packaged is not None and not folder.exists():
        return [str(packaged.folder)]
    words = [str(folder) if folder.is_dir() else name]
    base_model = (read_json(best.identity) or {}).get("base_model") or {}
    if base_model.get("revision"):
        words += ["--revision", base_model["revision"]]
    if config.model.trust_remote_code:
        words.append("--trust-remote-code")
    return words
