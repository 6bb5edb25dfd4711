"""Every choice in conf/ composes and is valid, and the published Llama 2 recipe holds, value for
value."""

import dataclasses
import json
import shutil
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from support.configs import compose, compose_whole

from finetune.config.paths import CONF
from finetune.config.schema import RunConfig
from finetune.config.sections.optimizer import OptimizerName, ScheduleName
from finetune.errors import ConfigError

YAMLS = [
    file.relative_to(CONF).with_suffix("") for file in sorted(CONF.rglob("*.yaml"))
]
CHOICES = [choice for choice in YAMLS if len(choice.parts) > 1]


def holds(whole: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether a config has every value of a choice."""
    return all(
        holds(whole[key], value)
        if isinstance(value, dict) and value
        else whole[key] == value
        for key, value in part.items()
    )


def test_the_default_run_is_valid() -> None:
    assert compose().model.name_or_path == "smollm2_135m"


def test_a_search_space_is_no_part_of_a_runs_config() -> None:
    plain = compose().to_dict()
    composed = OmegaConf.create(
        {**plain, "search": {"given": "???", "resolved": "${nowhere}"}}
    )
    assert RunConfig.from_hydra(composed) == RunConfig.from_dict(plain) == compose()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_choice_composes_and_its_values_arrive(choice: Path) -> None:
    file = CONF / f"{choice}.yaml"
    loaded = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(loaded, dict)
    values = {str(key): value for key, value in loaded.items() if key != "defaults"}
    if isinstance(values.get("learning_rate"), dict):  # by the base's name
        values["learning_rate"] = values["learning_rate"][values["name_or_path"]]
    group = str(choice.parent)
    package = next(
        (
            line.split()[-1]
            for line in file.read_text().splitlines()
            if line.startswith("# @package")
        ),
        group,
    )
    missing = {key: "given.jsonl" for key, value in values.items() if value == "???"}

    sweeper = (
        ["hydra/sweeper=optuna"] if group.startswith("hydra/sweeper/") else []
    )  # only beside it are they groups
    given = (f"{package}.{key}={value}" for key, value in missing.items())

    config = compose(*sweeper, f"{group}={choice.name}", *given)

    if not package.startswith(
        ("hydra", "search")
    ):  # those are the sweeper's; a run's config has no place for them
        whole = config.to_dict()
        assert holds(
            whole if package == "_global_" else whole[package], values | missing
        )


def test_optimizers_and_schedules_are_transformers_names() -> None:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    assert not set(typing.get_args(OptimizerName)) - {
        name.value for name in OptimizerNames
    }
    assert not set(typing.get_args(ScheduleName)) - {
        name.value for name in SchedulerType
    }


# dataset.limit: python_docs alone has one of its own


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [
        ([], 240),
        (["dataset=python_docs"], 240),
        (["dataset.path=python_docs"], 240),
        (["dataset=local", "dataset.path=python_docs"], 240),
        (["experiment=unlimited_docs"], 240),
        (["dataset=docs"], 240),
        (["dataset.path=./mine.jsonl"], None),
        (["dataset=python_docs", "dataset.path=./mine.jsonl"], None),
        (["dataset=local", "dataset.path=./mine.jsonl"], None),
        (["dataset=guanaco_llama2_1k"], None),
        (["dataset=docs", "dataset.path=owner/rows"], None),
        (["dataset=python_docs", "dataset.limit=null"], None),
        (["dataset.limit=30"], 30),
        (["dataset.path=./mine.jsonl", "dataset.limit=30"], 30),
        (["dataset.path=./mine.jsonl", "dataset.limit=240"], 240),
        (["experiment=limited"], 30),
        (["experiment=limited", "dataset.path=./mine.jsonl"], 30),
        (["experiment=limited", "dataset.limit=auto"], 240),
        (["dataset=limited_docs"], 30),
        (["dataset=limited_docs", "dataset.path=./mine.jsonl"], 30),
        (["dataset=all_docs"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_only_python_docs_has_a_limit_that_nobody_gave(
    overrides: list[str], limit: int | None, tmp_path: Path
) -> None:
    yamls = {
        "experiment/unlimited_docs": "# @package _global_\nlora: {r: 8}\n",
        "experiment/limited": "# @package _global_\ndataset: {limit: 30}\n",
        "dataset/docs": "path: python_docs\n",
        "dataset/limited_docs": "path: python_docs\nlimit: 30\n",
        "dataset/all_docs": "path: python_docs\nlimit: null\n",
    }
    for name, text in yamls.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)

    config = compose(f"hydra.searchpath=[file://{tmp_path}]", *overrides)

    assert config.dataset.limit == limit
    assert config.to_dict()["dataset"]["limit"] == limit
    assert RunConfig.from_dict(config.to_dict()) == config


def test_the_default_run_trains_on_240_rows_in_60_steps() -> None:
    from finetune.data.rows import load_rows
    from finetune.engine.schedule import total_steps

    config = compose()
    explicit = dataclasses.replace(config.dataset, limit=240)
    rows = load_rows(config.dataset)
    assert config.dataset == explicit
    assert len(rows.train) == 240
    assert total_steps(config, [1] * len(rows.train)) == 60


@pytest.mark.parametrize("limit", [240, None])
def test_the_limit_in_an_earlier_runs_config_keeps_its_meaning(
    limit: int | None,
) -> None:
    for path in ("python_docs", "mine.jsonl"):
        written = compose(f"dataset.path={path}").to_dict()
        written["dataset"]["limit"] = limit
        assert RunConfig.from_dict(written).dataset.limit == limit


# The published recipe: Llama 2 7B Chat on guanaco-llama2-1k with QLoRA


@pytest.fixture(scope="module")
def guanaco() -> RunConfig:
    return compose("experiment=llama2_guanaco")


GUANACO: dict[str, Any] = {
    "name": "llama-2-7b-chat-guanaco",
    "sample_prompts": ["Who is Leonardo Da Vinci?", "What is Datacamp Career track?"],
    "sample_max_new_tokens": None,
    "sample_max_length": 200,
    "model": {
        "name_or_path": "NousResearch/Llama-2-7b-chat-hf",
        "extra": {"device_map": {"": 0}, "pretraining_tp": 1},
    },
    "quantization": {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_use_double_quant": False,
    },
    "lora": {
        "r": 64,
        "alpha": 16,
        "dropout": 0.1,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "extra": {},
    },
    "optimizer": {
        "name": "paged_adamw_32bit",
        "learning_rate": 2e-4,
        "weight_decay": 0.001,
        "max_grad_norm": 0.3,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.03,
    },
    "dataset": {
        "path": "mlabonne/guanaco-llama2-1k",
        "name": None,
        "split": "train",
        "format": "text",
        "text_field": "text",
        "max_length": None,
        "packing": False,
        "limit": None,
        "eval_fraction": 0,
        "eval_path": None,
        "test_fraction": 0,
        "test_path": None,
    },
    "trainer": {
        "num_train_epochs": 1,
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "group_by_length": True,
        "save_steps": 25,
        "logging_steps": 25,
        "extra": {"fp16": False, "bf16": False},
    },
}
LEAVES = [
    (section, key)
    for section, values in GUANACO.items()
    if isinstance(values, dict)
    for key in values
]


def test_a_run_that_began_before_new_tokens_were_counted_means_what_it_meant() -> None:
    values = compose("sample_max_length=128").to_dict()
    del values["sample_max_new_tokens"]
    config = RunConfig.from_dict(values)
    assert (config.sample_max_new_tokens, config.sample_max_length) == (None, 128)


@pytest.mark.parametrize(
    ("section", "key"), LEAVES, ids=[".".join(leaf) for leaf in LEAVES]
)
def test_guanaco_has_the_published_value(
    guanaco: RunConfig, section: str, key: str
) -> None:
    assert getattr(getattr(guanaco, section), key) == GUANACO[section][key]


@pytest.mark.parametrize(
    "key", [key for key, value in GUANACO.items() if not isinstance(value, dict)]
)
def test_guanaco_has_the_published_top_level_value(
    guanaco: RunConfig, key: str
) -> None:
    assert getattr(guanaco, key) == GUANACO[key]


def test_guanaco_holds_no_rows_out_and_so_has_no_objective(guanaco: RunConfig) -> None:
    assert not guanaco.dataset.holds_out
    assert guanaco.objectives == []


def test_guanaco_trains_by_the_published_arguments(
    guanaco: RunConfig, tmp_path: Path
) -> None:
    from finetune.engine.trl.arguments import training_arguments

    arguments = training_arguments(guanaco, tmp_path, steps=250)

    published = {
        "num_train_epochs": 1,
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "max_grad_norm": 0.3,
        "learning_rate": 2e-4,
        "weight_decay": 0.001,
        "optim": "paged_adamw_32bit",
        "lr_scheduler_type": "constant",
        "warmup_steps": 0.03,  # below 1 a ratio; transformers 5 has no warmup_ratio
        "fp16": False,
        "bf16": False,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "steps",
        "save_steps": 25,
        "packing": False,
        "max_length": None,
        "dataset_text_field": "text",
    }
    assert {name: getattr(arguments, name) for name in published} == published


def test_guanaco_quantizes_as_published(guanaco: RunConfig) -> None:
    from finetune.model.quantization import compute_dtype, quantization_config

    arguments = quantization_config(guanaco.quantization)

    assert arguments is not None
    assert arguments.load_in_4bit
    assert not arguments.load_in_8bit
    assert arguments.bnb_4bit_quant_type == "nf4"
    assert not arguments.bnb_4bit_use_double_quant
    # float16 on a GPU (the next test); on a CPU it is replaced by float32, which has the products
    # it lacks
    assert arguments.bnb_4bit_compute_dtype == compute_dtype(guanaco.quantization)


@pytest.mark.gpu
def test_guanaco_computes_in_float16_on_a_gpu(guanaco: RunConfig) -> None:
    import torch

    from finetune.model.quantization import quantization_config

    arguments = quantization_config(guanaco.quantization)

    assert arguments is not None
    assert arguments.bnb_4bit_compute_dtype == torch.float16


def test_guanaco_adapts_as_published(guanaco: RunConfig) -> None:
    from finetune.model.lora_config import lora_config

    arguments = lora_config(guanaco.lora)

    assert (
        arguments.r,
        arguments.lora_alpha,
        arguments.lora_dropout,
        arguments.bias,
    ) == (
        64,
        16,
        0.1,
        "none",
    )
    assert arguments.target_modules == {"q_proj", "v_proj"}
    assert arguments.task_type == "CAUSAL_LM"
    assert not arguments.use_rslora
    assert not arguments.use_dora


def test_guanaco_pads_on_the_right_with_the_end_token(
    guanaco: RunConfig, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from finetune.model.source import BaseSource
    from finetune.model.tokenizer import load_tokenizer

    base = shutil.copytree(tiny_base, tmp_path / "base")
    settings = base / "tokenizer_config.json"
    other = {"pad_token": "<|im_start|>", "padding_side": "left"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | other))
    changed = AutoTokenizer.from_pretrained(base)
    assert (changed.pad_token, changed.padding_side) == ("<|im_start|>", "left")

    tokenizer = load_tokenizer(BaseSource(str(base), "tiny"), guanaco.model)

    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.padding_side == "right"


def test_guanaco_asks_in_llama_2s_prompt_format(
    guanaco: RunConfig, tiny_base: Path
) -> None:
    from finetune.model.source import BaseSource
    from finetune.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(BaseSource(str(tiny_base), "tiny"), guanaco.model)
    tokenizer.bos_token = "<s>"
    assert guanaco.sample_prompts is not None

    for prompt in guanaco.sample_prompts:
        chat = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
        assert asked == f"<s>[INST] {prompt} [/INST]"


def test_guanaco_can_be_changed_on_the_command_line() -> None:
    config = compose("experiment=llama2_guanaco", "lora.r=8", "trainer.save_steps=50")
    plain = compose("experiment=llama2_guanaco")

    assert dataclasses.replace(plain.lora, r=8) == config.lora
    assert config.trainer.save_steps == 50


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "lora.r=4",
            "lora=r8",
            "experiment=llama2_guanaco",
            "optimizer.learning_rate=1e-3",
        ),
        ("~search", "+trainer.extra.a=1", "++lora.extra.x=[1]", "lora/target=q_v"),
        (
            "sample_prompts=[Hm?,'a b']",
            "dataset.limit=null",
            "model=llama3_1_8b",
            "lora.r=3",
        ),
    ],
    ids=str,
)
def test_the_tests_compose_as_hydra_does(overrides: tuple[str, ...]) -> None:
    """`support.configs.compose` reads the files once."""
    assert compose(*overrides) == RunConfig.from_hydra(compose_whole(*overrides))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("evaluation.metrics=[exact_mach]", "evaluation.metrics=exact_mach: did you mean exact_match"),
        ("evaluation.metrics=[a.score,b.score]", "evaluation.metrics=['a.score', 'b.score']: eval/score would have two meanings"),
        ("evaluation.metrics=[a.loss]", "evaluation.metrics=['a.loss']: eval/loss would have two meanings"),
        ("evaluation.metrics=exact_match", "evaluation.metrics=exact_match: must be a list"),
        ("evaluation.max_new_tokens=0", "evaluation.max_new_tokens=0: must be a whole number of at least 1"),
        ("evaluation.limit=0", "evaluation.limit=0: must be a whole number of at least 1, or null"),
        ("evaluation.every=-1", "evaluation.every=-1: must be at least 0"),
        ("evaluation.turns=first", "evaluation.turns=first: "),
        ("evaluation.concurrency=0", "evaluation.concurrency=0: "),
        ("evaluation.temperature=-1", "evaluation.temperature=-1.0: must be a number of at least 0"),
        ("evaluation.temperature=inf", "evaluation.temperature=inf: must be a number"),
        ("evaluation.top_p=0", "evaluation.top_p=0.0: must be above 0 and at most 1"),
        ("evaluation.top_p=1.5", "evaluation.top_p=1.5: must be above 0"),
        ("evaluation.retries=-1", "evaluation.retries=-1: "),
        ("objective=eval/exact_match", "objective=eval/exact_match: "),
        ("evaluation=exact_match objective=eval/exact", "objective=eval/exact: did you mean eval/exact_match"),
        ("evaluation=exact_match objective=eval/a/exact_match", "objective=eval/a/exact_match: did you mean eval/exact_match"),
    ],
)  # fmt: skip
def test_an_evaluation_that_no_run_can_make_is_refused(
    overrides: str, says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        compose(*overrides.split())

    assert str(error.value).startswith(says)


def test_each_source_is_an_objective_by_its_files_name() -> None:
    config = compose(
        "dataset.path=[x/a.jsonl.gz,y/a.csv,owner/name]",
        "evaluation=exact_match",
        "objective=[eval/a/loss,eval/a-2/exact_match,eval/name/accuracy]",
    )

    assert list(config.dataset.source_names.values()) == ["a", "a-2", "name"]
