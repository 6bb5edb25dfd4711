"""Spaces as YAML files have them: nested, as lists, in the old form, with interpolations; and what
refusals say to write."""

from typing import Any

import pytest
from omegaconf import open_dict
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from support.studies import sweeper_config

from finetune.errors import ConfigError
from sweeps.space.params import plain_params
from sweeps.space.space import Space


def params_of(params: dict[str, Any]) -> dict[str, Any]:
    config = sweeper_config()
    with open_dict(config):
        config.search = {"params": params}
    return plain_params(config.search.params, config)


@pytest.mark.parametrize(
    ("written", "syntax"),
    [
        ({"lora": {"r": "choice(4,8)"}}, {"lora.r": "choice(4,8)"}),
        (
            {"lora": {"r": [4, 8], "alpha": 16}},
            {"lora.r": "choice(4,8)", "lora.alpha": 16},
        ),
        ({"lora.r": [4, 8]}, {"lora.r": "choice(4,8)"}),
        ({"lora": ["r4", "r8"]}, {"lora": "choice(r4,r8)"}),
        (
            {"lora/target": ["q_v", "attention"]},
            {"lora/target": "choice(q_v,attention)"},
        ),
        ({"lora.use_dora": [True, False]}, {"lora.use_dora": "choice(True,False)"}),
        (
            {"lora.r": {"type": "categorical", "choices": [4, 8]}},
            {"lora.r": "choice(4,8)"},
        ),
        (
            {"lora": {"alpha": {"type": "int", "low": 8, "high": 32, "step": 8}}},
            {"lora.alpha": "range(8,40,8)"},
        ),
        (
            {"lora.dropout": {"type": "float", "low": 0, "high": 0.1}},
            {"lora.dropout": "interval(0.0,0.1)"},
        ),
        (
            {"lora.r": {"type": "int", "low": 1, "high": 64, "log": True}},
            {"lora.r": "tag(log,int(interval(1,64)))"},
        ),
        ({"sample_prompts": ["a", "b"]}, {"sample_prompts": ["a", "b"]}),
        (
            {"model.template_kwargs": {"enable_thinking": False}},
            {"model.template_kwargs": {"enable_thinking": False}},
        ),
        ({"lora.alpha": "${lora.r}"}, {"lora.alpha": "${lora.r}"}),
        ({"lora.r": "choice(${lora.r},64)"}, {"lora.r": "choice(16,64)"}),
    ],
)
def test_every_form_of_a_space_is_read(
    written: dict[str, Any], syntax: dict[str, Any]
) -> None:
    assert params_of(written) == syntax


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        (
            {"optimizer.lr_scheduler_type": ["linear", "cosine"]},
            "choice(linear,cosine)",
        ),
        ({"lora.r": {"type": "normal", "low": 1}}, "choice(8, 16)"),
        ({"lora.r": {"type": "int", "low": 1}}, "choice(8, 16)"),
    ],
)
def test_a_form_that_is_not_clear_is_refused_with_the_right_one(
    written: dict[str, Any], advice: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        params_of(written)
    assert str(refused.value).startswith(f"{next(iter(written))}=")
    assert f"write {advice}" in str(refused.value)


def test_an_interpolation_stays_for_each_trial() -> None:
    space = Space.parse({"lora.r": "choice(4,8)", "lora.alpha": "${lora.r}"}, [])
    assert space.overrides({"lora.r": 4}) == ["lora.alpha=${lora.r}", "lora.r=4"]


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("lora.target_modules=choice('[q_proj]','[v_proj]')", "write [q_proj] without"),
        ("lora.target_modules='[q_proj]'", "write [q_proj] without"),
        ("dataset.template=a=b", "write dataset.template='a=b'"),
        ("model.x=choice(a=b,c)", "write model.x=choice('a=b',c)"),
        ("lora.r=choice(null, 1)", "write lora.r=null, 1"),
    ],
)
def test_a_value_that_hydra_reads_otherwise_says_what_to_write(
    override: str, advice: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        Space.parse({}, [override])
    assert advice in str(refused.value)
    written = str(refused.value).split("write ")[1].removesuffix(" without them")
    fixed = written if "=" in written else override.replace("'", "")
    Space.parse({}, [fixed])


def test_text_in_brackets_is_no_list() -> None:
    prompt = "dataset.template='[INST] {{question}} [/INST]'"
    assert Space.parse({}, [prompt]).fixed


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            {"type": "categorical", "choices": [1, 2, 3]},
            CategoricalDistribution([1, 2, 3]),
        ),
        ({"type": "int", "low": 0, "high": 10}, IntDistribution(0, 10)),
        (
            {"type": "int", "low": 0, "high": 10, "step": 2},
            IntDistribution(0, 10, step=2),
        ),
        (
            {"type": "int", "low": 1, "high": 100, "log": True},
            IntDistribution(1, 100, log=True),
        ),
        ({"type": "float", "low": 0, "high": 1}, FloatDistribution(0, 1)),
        (
            {"type": "float", "low": 0, "high": 10, "step": 2},
            FloatDistribution(0, 10, step=2),
        ),
        (
            {"type": "float", "low": 1, "high": 100, "log": True},
            FloatDistribution(1, 100, log=True),
        ),
    ],
)
def test_the_old_form_is_the_distribution_that_it_is_in_the_stock_sweeper(
    written: dict[str, Any], expected: BaseDistribution
) -> None:
    space = Space.parse(params_of({"lora.dropout": written}), [])
    assert space.distributions["lora.dropout"] == expected
