"""The printed commands that serve adapters: words that vLLM takes, adapters that it takes.

vLLM itself is no dependency: VLLM_SOURCE names an unpacked wheel of it (0.33.0 was read), whose
own classes then judge the same adapters.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from optuna.trial import create_trial
from support.runs import Tiny
from support.studies import made_study

from finetune.files.atomic import write_json
from finetune.files.run_folder import RunFolder
from finetune.run.identity import run_identity
from finetune.sharing.vllm import VLLM_RANKS, vllm_rank, vllm_refusal
from sweeps.answer.commands import commands
from sweeps.study.study import Study

VLLM_SOURCE = os.environ.get("VLLM_SOURCE")

needs_vllm = pytest.mark.skipif(
    VLLM_SOURCE is None, reason="VLLM_SOURCE names no wheel"
)

FLAGS = {
    "--enable-lora",
    "--max-lora-rank",
    "--max-loras",
    "--lora-modules",
    "--generation-config",
    "--revision",
    "--trust-remote-code",
    "--chat-template",
    "--default-chat-template-kwargs",
}
"""Every flag that a command may have."""

LINEAR = ["q_proj", "v_proj"]

ADAPTERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "plain": ({}, None),
    "rslora": ({"use_rslora": True}, None),
    "gaussian": ({"init_lora_weights": "gaussian"}, None),
    "rank 320": ({"r": 320}, None),
    "dora": ({"use_dora": True}, "DoRA"),
    "bias": ({"bias": "lora_only"}, "biases"),
    "lora_bias": ({"lora_bias": True}, "biases"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
    "ranks": ({"rank_pattern": {"q_proj": 4}}, "ranks of single layers"),
    "alphas": ({"alpha_pattern": {"q_proj": 4}}, "alphas of single layers"),
    "saved": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trained tokens"),
    "experts": ({"target_parameters": ["mlp.experts.up"]}, "adapters on experts"),
    "layers": ({"layer_replication": [[0, 2], [1, 2]]}, "repeated layers"),
    "head": ({"target_modules": [*LINEAR, "lm_head"]}, "adapters on embeddings"),
    "rank 600": ({"r": 600}, "a rank above 512"),
}
"""Arguments of PEFT's LoraConfig, and what of the adapter vLLM refuses."""

READ_BY_NEWEST = ("ranks", "alphas")
"""Adapters that vLLM 0.33 takes, and older versions read wrongly."""

NOT_IN_ADAPTER_CONFIG = ("tokens", "experts", "head")
"""Adapters that vLLM refuses, or takes for some bases, when it reads their weights."""


def adapter_config(name: str, folder: Path) -> dict[str, Any]:
    """`adapter_config.json` as PEFT saves it."""
    from peft import LoraConfig

    arguments = {"r": 8, "target_modules": LINEAR} | ADAPTERS[name][0]
    LoraConfig(**arguments).save_pretrained(str(folder))
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_vllm_refuses_of_an_adapter_is_known(name: str, tmp_path: Path) -> None:
    assert vllm_refusal(adapter_config(name, tmp_path)) == ADAPTERS[name][1]


@pytest.mark.parametrize(
    ("rank", "value"), [(1, 8), (8, 8), (9, 16), (48, 64), (257, 320), (512, 512)]
)
def test_a_rank_is_rounded_up_to_one_that_vllm_has(rank: int, value: int) -> None:
    assert vllm_rank(rank) == value


def make_run(
    folder: Path, config: Any, rank: int, base: dict[str, Any], **adapter: Any
) -> None:
    run = RunFolder(folder)
    run.adapter.mkdir(parents=True)
    identity = run_identity(config, rows=None, base=None) | {"base_model": base}
    write_json(run.identity, identity)
    write_json(
        run.adapter / "adapter_config.json",
        {"r": rank, "target_modules": LINEAR, "bias": "none"} | adapter,
    )


BASE = {"name": "owner/base", "revision": "c0ffee", "sha256": None}


def make(place: Path, tiny: Tiny, *overrides: str, **adapter: Any) -> dict[str, str]:
    """The commands of a study of four trials, the second the best; the third is on another base."""
    trials = [create_trial(value=value) for value in (2.0, 1.0, 1.5, 3.0)]
    study = made_study(place / "a study", trials)
    config = tiny("model.name_or_path=owner/base", *overrides)
    other = dict(BASE, name="owner/other")
    for number, rank in enumerate((8, 48, 4, 16)):
        base = other if number == 2 else BASE
        folder = study.folder_of(number).path
        make_run(folder, config, rank, base, **adapter)
    make_run(study.folder / "best", config, 48, BASE, **adapter)
    return dict(commands(study))


def test_the_best_adapters_of_one_base_are_served_together(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = make(tmp_path, tiny)

    words = shlex.split(shown["adapters"])
    assert words == [
        "vllm", "serve", "owner/base", "--revision", "c0ffee", "--enable-lora",
        "--max-lora-rank", "64", "--max-loras", "3", "--lora-modules",
        "best=a study/best/adapter", "trial0=a study/trials/0/adapter",
        "trial3=a study/trials/3/adapter", "--generation-config", "a study/best/adapter",
    ]  # fmt: skip
    assert shown["serve"] == "vllm serve 'a study/merged'"
    assert (
        shown["export"]
        == "python -m finetune.export 'a study'/best --to 'a study/exported'"
    )
    assert (
        shown["Ollama"]
        == "ollama create a-study -f 'a study/exported/Modelfile' && ollama run a-study"
    )


def test_a_folder_with_signs_of_vllms_is_given_as_json(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "lr=1e-4,r=8"
    place.mkdir()
    monkeypatch.chdir(place)
    words = shlex.split(make(place, tiny)["adapters"])
    modules = words[
        words.index("--lora-modules") + 1 : words.index("--generation-config")
    ]
    assert modules[0] == "best=a study/best/adapter"

    monkeypatch.chdir(tmp_path)
    study = Study.load(place / "a study")
    words = shlex.split(dict(commands(study))["adapters"])
    first = words[words.index("--lora-modules") + 1]
    path = "lr=1e-4,r=8/a study/best/adapter"
    assert json.loads(first) == {"name": "best", "path": path}


def test_a_template_of_the_users_is_served_with_its_variables(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = (
        "model.chat_template='{{ messages }}'",
        "+model.template_kwargs={enable_thinking:false}",
    )
    shown = make(tmp_path, tiny, *overrides)

    variables = ["--default-chat-template-kwargs", '{"enable_thinking": false}']
    words = shlex.split(shown["adapters"])
    assert words[-4:] == [
        "--chat-template", "a study/best/adapter/chat_template.jinja", *variables,
    ]  # fmt: skip
    assert shlex.split(shown["serve"])[-2:] == variables


@pytest.mark.parametrize("adapter", [{"use_dora": True}, {"bias": "lora_only"}])
def test_an_adapter_that_vllm_refuses_is_served_merged_alone(
    adapter: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    shown = make(tmp_path, tiny, **adapter)
    assert "adapters" not in shown
    assert {"merge", "serve", "export", "Ollama"} <= shown.keys()


@pytest.mark.parametrize(
    ("quantization", "purposes"),
    [
        (None, {"serve", "adapters"}),
        ({"quant_method": "gptq", "bits": 4}, {"adapters"}),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"serve"}),
    ],
)
def test_a_quantised_base_is_served_as_it_can_be(
    quantization: dict[str, Any] | None,
    purposes: set[str],
    tiny: Tiny,
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    content = {} if quantization is None else {"quantization_config": quantization}
    (base / "config.json").write_text(json.dumps(content))
    shown = make(tmp_path, tiny, f"model.name_or_path={base}")
    assert shown.keys() & {"serve", "adapters"} == purposes
    assert ("export" in shown) == ("serve" in purposes)
    if "adapters" in shown:
        assert shlex.split(shown["adapters"])[2] == str(base)


def source(path: str) -> str:
    return (Path(str(VLLM_SOURCE)) / "vllm" / path).read_text()


@needs_vllm
def test_vllm_has_the_flags_and_ranks() -> None:
    ranks = re.search(
        r"^MaxLoRARanks = Literal(\[.*\])$", source("config/lora.py"), re.M
    )
    assert ranks is not None
    assert set(VLLM_RANKS) <= set(ast.literal_eval(ranks[1]))
    files = [
        source(each)
        for each in ("engine/arg_utils.py", "entrypoints/common/cli_args.py")
    ]
    text = "\n".join(files)
    for flag in FLAGS:
        # Given by name, or made of a field of the arguments' class.
        field = flag.removeprefix("--").replace("-", "_")
        assert f'"{flag}"' in text or re.search(rf"^    {field}: ", text, re.M), flag


@pytest.fixture
def peft_helper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's own class that reads an adapter's config; what it imports is not needed for that."""
    pytest.importorskip("regex")
    lora: Any = ModuleType("vllm.config.lora")
    lora.LoRAConfig = object
    logger: Any = ModuleType("vllm.logger")
    logger.init_logger = lambda _: SimpleNamespace(info_once=lambda _: None)
    for name, module in (
        ("vllm", ModuleType("vllm")),
        ("vllm.config", ModuleType("vllm.config")),
        ("vllm.config.lora", lora),
        ("vllm.logger", logger),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    path = Path(str(VLLM_SOURCE)) / "vllm" / "lora" / "peft_helper.py"
    spec = importlib.util.spec_from_file_location("vllm_peft_helper", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module.PEFTHelper


@needs_vllm
@pytest.mark.parametrize("name", ADAPTERS)
def test_vllm_takes_what_is_printed_and_refuses_the_rest(
    name: str, peft_helper: Any, tmp_path: Path
) -> None:
    config = adapter_config(name, tmp_path)
    refused = vllm_refusal(config) is not None
    assert dataclasses.is_dataclass(peft_helper)
    rank = 512 if refused else vllm_rank(config["r"])
    settings = SimpleNamespace(max_lora_rank=rank)
    try:
        helper = peft_helper.from_local_dir(str(tmp_path), None)
        helper.validate_legal(settings)
    except ValueError:
        taken = False
    else:
        taken = True
    if name not in READ_BY_NEWEST + NOT_IN_ADAPTER_CONFIG:
        assert taken != refused
    assert taken or refused
