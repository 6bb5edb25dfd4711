"""Shell commands that serve a study's adapters: with vLLM, and with Ollama."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.model.adapter_files import ADAPTER_CONFIG
from finetune.model.base_quantization import (
    BITSANDBYTES,
    DEQUANTIZED,
    quantization_in_files,
)
from finetune.model.gguf.modelfile import ollama_name
from finetune.model.packaged import PACKAGED_MODELS
from finetune.run.load import read_run_config
from finetune.sharing.vllm import template_flag, vllm_rank, vllm_refusal
from sweeps.answer.winner import find_winner
from sweeps.study.study import Study

SERVED_ADAPTERS = 3
"""The most adapters of one study that a command serves beside each other."""


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
    quantization = None if config is None else quantization_in_files(config.model)
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
    # Several objectives have no one winner.
    flag = "" if config is None else template_flag(config.model.template_kwargs)
    return [
        ("merge", f"python -m finetune.merge {folder}/best --to {merged}"),
        ("serve", f"vllm serve {merged}{flag}"),
        (
            "export",
            f"python -m finetune.export {folder}/best --to {shlex.quote(exported)}",
        ),
        ("Ollama", f"ollama create {name} -f {modelfile} && ollama run {name}"),
    ]


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
    return shlex.join(words) + template_flag(config.model.template_kwargs)


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
