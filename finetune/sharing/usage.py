"""How an adapter on the hub is loaded and served, as a model card shows it."""

import shlex
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open

from finetune.config.schema import RunConfig
from finetune.files.atomic import read_json
from finetune.files.run_folder import RunFolder
from finetune.model.adapter_files import ADAPTER_CONFIG, WEIGHTS
from finetune.model.base_quantization import BITSANDBYTES, quantization_in_files
from finetune.model.origin import GENERATION_CONFIG
from finetune.sharing.base_license import CardBase
from finetune.sharing.public_values import HIDDEN, public_value
from finetune.sharing.vllm import template_flag, vllm_rank, vllm_refusal

TEXT_MODEL = "language_model"
"""Part of the names of layers in the published models that have other modalities as well."""


@dataclass(frozen=True)
class Usage:
    """What the code and the commands of a card differ in."""

    auto_class: str
    """The class of transformers under whose names the adapter's weights are saved."""
    compute_dtype: str
    """Of products with weights in 4 bits, a name of torch's."""
    trusts_remote_code: bool
    chat_arguments: dict[str, Any]
    """The variables of the chat template that may be published."""
    hidden_arguments: list[str]
    """Names of the others."""
    has_generation_config: bool
    """Whether the adapter has one, with the ends of answers that were learnt."""
    vllm: str | None
    """The command that serves it unmerged."""
    vllm_refusal: str | None
    """Why there is none."""


def card_usage(
    run: RunFolder, config: RunConfig, base: CardBase, repository: str
) -> Usage:
    """Return how a run's adapter is used.

    Args:
        run: The run folder.
        config: Its config.
        base: Its base, as the card names it.
        repository: Where the adapter is published, as `owner/name`.
    """
    shown: dict[str, Any] = {}
    hidden = []
    for name, value in config.model.template_kwargs.items():
        is_text = value is not None and public_value(value) == HIDDEN
        if is_text or not name.isidentifier():
            hidden.append(name)
        else:
            shown[name] = value
    dtype = config.quantization.bnb_4bit_compute_dtype
    refusal = _vllm_refusal(run, config)
    command = None
    has_generation_config = (run.adapter / GENERATION_CONFIG).is_file()
    if base.is_on_hub and refusal is None:
        command = _vllm_command(config, base, repository, shown, has_generation_config)
    return Usage(
        auto_class=_auto_class(run),
        compute_dtype="bfloat16" if dtype == "auto" else dtype,
        trusts_remote_code=config.model.trust_remote_code,
        chat_arguments=shown,
        hidden_arguments=hidden,
        has_generation_config=has_generation_config,
        vllm=command,
        vllm_refusal=refusal,
    )


def _auto_class(run: RunFolder) -> str:
    with safe_open(run.adapter / WEIGHTS, framework="np") as weights:
        is_part = any(TEXT_MODEL in name.split(".") for name in weights.keys())  # noqa: SIM118
    return "AutoModelForImageTextToText" if is_part else "AutoModelForCausalLM"


def _vllm_refusal(run: RunFolder, config: RunConfig) -> str | None:
    """Return what vLLM does not serve of a run; None: it serves it."""
    method = quantization_in_files(config.model)
    # vLLM has no kernels for bitsandbytes any more.
    if method in BITSANDBYTES:
        return f"a base that is quantised to {method} in its files"
    adapter = read_json(run.adapter / ADAPTER_CONFIG)
    assert adapter is not None, f"{run.adapter} has no {ADAPTER_CONFIG}"
    return vllm_refusal(adapter)


def _vllm_command(
    config: RunConfig,
    base: CardBase,
    repository: str,
    variables: dict[str, Any],
    has_generation_config: bool,
) -> str:
    words = ["vllm", "serve", base.name]
    if base.revision is not None:
        words += ["--revision", base.revision]
    if config.model.trust_remote_code:
        words.append("--trust-remote-code")
    name = repository.rpartition("/")[2]
    words += ["--enable-lora", "--lora-modules", f"{name}={repository}"]
    words += ["--max-lora-rank", str(vllm_rank(config.lora.r))]
    if has_generation_config:
        # The ends of answers that were learnt; the base's own file may have others.
        words += ["--generation-config", repository]
    if config.model.chat_template is not None:
        words += ["--chat-template", "chat_template.jinja"]
    return shlex.join(words) + template_flag(variables)
