"""The learning rate that suits a base: its model's YAML, a rule of hidden size, and the search
spaces around it."""

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from optuna.distributions import FloatDistribution
from support.commands import Station
from support.configs import compose, study_overrides, tiny_overrides
from support.models import wide_base
from support.runs import final

from finetune.app import compose_run
from finetune.config.paths import CONF
from finetune.config.schema import RunConfig
from finetune.errors import ConfigError, Diverged
from finetune.run.context import RunContext
from finetune.run.learning_rate import (
    HIGHEST_RATE,
    rate_of_width,
    resolve_learning_rate,
)
from finetune.run.load import read_run_config
from finetune.run.resources import SharedResources
from finetune.run.run import run
from sweeps.study.draft import draft_session
from sweeps.study.terms import study_terms

if TYPE_CHECKING:
    from sweeps.space.space import Point
    from sweeps.study.session import Session

MODELS = sorted(file.stem for file in (CONF / "model").glob("*.yaml"))
SEARCHES = sorted(file.stem for file in (CONF / "search").glob("*.yaml"))
RATE = "optimizer.learning_rate"

PUBLISHED = {
    2048: [3e-4, 3e-4, 3e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3],
    2560: [3e-4, 1e-3],
    2688: [4e-4],
    2880: [1e-4, 3e-4],
    3072: [1e-3],
    4096: [3e-4, 3e-4, 3e-4, 3e-4, 3e-4, 3e-4, 3e-4, 1e-3, 1e-3, 1e-3],
    5120: [3e-4, 3e-4, 3e-4],
    7168: [3e-4, 3e-4, 3e-4, 3e-4, 4e-4],
    8192: [3e-4, 3e-4, 3e-4],
}
"""By hidden size, the best rates of 35 models in tinker-cookbook's
recipes/chat_sl/results/sft_sweep.md."""


def base_of(folder: Path, config: dict[str, Any]) -> Path:
    """A folder that looks like a base with this config, and has no weights to speak of."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def resolved(*overrides: str) -> float | None:
    return resolve_learning_rate(
        compose(*overrides), SharedResources()
    ).optimizer.learning_rate


# The rule


def test_the_rule_is_the_least_squares_fit_of_the_published_rates() -> None:
    from statistics import linear_regression

    pairs = [
        (math.log(width / 4096), math.log(rate))
        for width, rates in PUBLISHED.items()
        for rate in rates
    ]
    assert len(pairs) == 35
    slope, intercept = linear_regression(*zip(*pairs, strict=True))
    assert slope == pytest.approx(-0.5, abs=0.005)
    assert math.exp(intercept) == pytest.approx(rate_of_width(4096), rel=0.01)


def test_the_rule_is_near_most_published_rates_and_above_none_of_the_highest() -> None:
    factors = [
        math.exp(abs(math.log(rate_of_width(width) / rate)))
        for width, rates in PUBLISHED.items()
        for rate in rates
    ]
    assert sum(factor <= 1.8 for factor in factors) == 26
    assert sum(factor <= 2.5 for factor in factors) == 34
    assert max(map(rate_of_width, range(1, 20000, 7))) == HIGHEST_RATE == 1e-3


@pytest.mark.parametrize(
    ("width", "rate"),
    [
        (64, 1e-3),
        (576, 1e-3),
        (1024, 8e-4),
        (2048, 5.7e-4),
        (4096, 4e-4),
        (8192, 2.8e-4),
    ],
)
def test_wider_bases_take_lower_rates(width: int, rate: float) -> None:
    assert rate_of_width(width) == rate


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        ({"hidden_size": 4096}, 4e-4),
        ({"model_type": "gpt2", "n_embd": 1024}, 8e-4),
        ({"model_type": "mpt", "d_model": 4096}, 4e-4),
        (
            {"hidden_size": 1024, "text_config": {"hidden_size": 4096}},
            4e-4,
        ),  # the text's width, of a base with images
    ],
)
def test_the_width_is_the_text_parts(
    tmp_path: Path, config: dict[str, Any], rate: float
) -> None:
    assert resolved(f"model.name_or_path={base_of(tmp_path / 'base', config)}") == rate


def test_a_base_without_a_width_needs_a_rate(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", {"model_type": "new"})
    with pytest.raises(ConfigError) as refused:
        resolved(f"model.name_or_path={base}")
    assert (
        str(refused.value)
        == f"{RATE}=null: the config.json of {base} has no hidden_size; give a number"
    )
    assert resolved(f"model.name_or_path={base}", f"{RATE}=2e-4") == 2e-4


# Whose rate it is


@pytest.mark.parametrize("model", MODELS)
def test_each_models_yaml_says_where_model_and_rate_are_from(model: str) -> None:
    text = (CONF / "model" / f"{model}.yaml").read_text()
    settings = yaml.safe_load(text)
    name = settings["name_or_path"]
    # Packaged models have no page.
    if "/" in name:
        assert f"# https://huggingface.co/{name}\n" in text
    (rate,) = map(float, settings["learning_rate"].values())
    width = re.search(r"[Bb]y its hidden size, (\d+)", text)
    if width is None:
        assert re.search("sft_sweep.md|arXiv|measured|notebooks", text)
    else:
        assert rate == pytest.approx(rate_of_width(int(width[1])), rel=0.15)


@pytest.mark.parametrize("model", MODELS)
def test_each_models_yaml_has_a_rate_near_the_rule(model: str) -> None:
    rates = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())[
        "learning_rate"
    ]
    config = compose(f"model={model}")
    assert list(rates) == [config.model.name_or_path]
    assert 2e-4 <= float(rates[config.model.name_or_path]) <= HIGHEST_RATE
    assert (
        resolve_learning_rate(config, SharedResources()).optimizer.learning_rate
        == config.model.learning_rate
    )


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        ([], 1e-3),
        (["model=llama2_7b"], 2e-4),
        (["model=llama3_1_8b"], 3e-4),
        (["model=smollm2_135m", "optimizer=lion"], 2e-4),
        (["model=llama2_7b", "optimizer=lion"], 2e-4),
        (["experiment=llama2_guanaco"], 2e-4),
        ([f"{RATE}=5e-3", "model=llama3_1_8b"], 5e-3),
        (["model.learning_rate=5e-4"], 5e-4),
        (["model.learning_rate=5e-4", "model.name_or_path=./anywhere"], 5e-4),
    ],
)
def test_the_nearest_rate_wins_and_a_users_is_absolute(
    overrides: list[str], rate: float
) -> None:
    assert resolved(*overrides) == rate


@pytest.mark.parametrize("model", MODELS)
def test_a_yamls_rate_is_of_its_own_base_alone(model: str, tmp_path: Path) -> None:
    wide = base_of(tmp_path / "my-7b", {"hidden_size": 4096})
    config = compose(f"model={model}", f"model.name_or_path={wide}")
    assert config.model.learning_rate is None
    assert (
        resolve_learning_rate(config, SharedResources()).optimizer.learning_rate == 4e-4
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (f"{RATE}=0", f"{RATE}=0.0: must be above 0"),
        ("model.learning_rate=0", "model.learning_rate=0.0: must be above 0, or null"),
        (
            "model.learning_rate=fast",
            "model.learning_rate=fast: must be a number or null",
        ),
        (
            "model.learning_rate={smollm2_135m: fast}",
            "model.learning_rate=fast: must be a number or null",
        ),
    ],
)
def test_a_rate_that_is_none_is_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(override)
    assert str(refused.value) == says


# A run


@pytest.fixture
def by_width(tiny_base: Path) -> RunConfig:
    """A run of seconds that leaves its rate to its base."""
    return compose_run(
        [
            *tiny_overrides(tiny_base),
            "quantization=none",
            "trainer.max_steps=4",
            "sample_prompts=[]",
        ]
    )


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name.endswith("loss")}


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_a_run_trains_with_the_rate_that_it_says(
    engine: str, by_width: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import dataclasses

    config = dataclasses.replace(
        by_width, trainer=dataclasses.replace(by_width.trainer, engine=engine)
    )
    assert config.optimizer.learning_rate is None
    with caplog.at_level(logging.INFO):
        run(config, tmp_path / "run")

    assert caplog.messages.count(f"{RATE}=0.001 (by hidden size 64)") == 1
    assert final(tmp_path / "run")["learning_rate"] == 1e-3
    written = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert written["optimizer"]["learning_rate"] == 1e-3
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-3)
    run(dataclasses.replace(config, optimizer=optimizer), tmp_path / "written")
    assert plain(final(tmp_path / "run")["metrics"]) == plain(
        final(tmp_path / "written")["metrics"]
    )


def test_a_run_goes_on_whether_it_began_with_the_number_or_with_null(
    by_width: RunConfig, tmp_path: Path
) -> None:
    import dataclasses

    from finetune.config.sections.optimizer import OptimizerSettings

    def with_rate(rate: float | None) -> RunConfig:
        optimizer: OptimizerSettings = dataclasses.replace(
            by_width.optimizer, learning_rate=rate
        )
        return dataclasses.replace(by_width, optimizer=optimizer)

    run(with_rate(1e-3), tmp_path)
    identity = json.loads((tmp_path / "run.json").read_text())
    del identity["config"]["model"]["learning_rate"]  # as before there was the key
    (tmp_path / "run.json").write_text(json.dumps(identity))

    value = run(by_width, tmp_path)
    assert (
        value
        == run(with_rate(1e-3), tmp_path)
        == run(read_run_config(tmp_path), tmp_path)
    )
    with pytest.raises(
        ConfigError,
        match=r"optimizer\.learning_rate=0\.002: the run that began in .* has 0\.001",
    ):
        run(with_rate(2e-3), tmp_path)

    identity["config"]["optimizer"]["learning_rate"] = 2e-3
    (tmp_path / "run.json").write_text(json.dumps(identity))
    with pytest.raises(
        ConfigError,
        match=r"optimizer\.learning_rate=0\.001: the run that began in .* has 0\.002",
    ):
        run(by_width, tmp_path)


def test_divergence_names_the_number(tiny_base: Path, tmp_path: Path) -> None:
    overrides = [
        *tiny_overrides(tiny_base),
        "quantization=none",
        "trainer.max_steps=20",
        "sample_prompts=[]",
    ]
    config = compose(*overrides, "model.learning_rate=1e20")
    with pytest.raises(Diverged, match=r"optimizer\.learning_rate=1e\+20"):
        run(config, tmp_path, RunContext(interactive=False))


def test_a_plan_says_the_rate(
    tiny_base: Path, tmp_path: Path, station: Station
) -> None:
    wide = wide_base(tiny_base, tmp_path)
    shown = station.run(
        *tiny_overrides(wide),
        "trainer.max_steps=2",
        cwd=tmp_path,
        module="finetune.plan",
    )
    assert "optimizer.learning_rate" not in shown.stdout
    assert "learning rate                     0.0004" in shown.stdout


# A search


Draft = Callable[..., "tuple[Session, list[tuple[str, Point]]]"]


@pytest.fixture
def draft() -> Draft:
    """What a study begins with: its worker and its first points."""

    def make(*overrides: str) -> "tuple[Session, list[tuple[str, Point]]]":
        from hydra import compose as hydra_compose
        from hydra import initialize_config_dir
        from hydra._internal.callbacks import Callbacks
        from hydra.types import HydraContext

        tasks = [word for word in overrides if not word.startswith("hydra.")]
        given = [
            word
            for word in overrides
            if word not in tasks or ("interval" not in word and "choice" not in word)
        ]
        with initialize_config_dir(str(CONF)):
            config = hydra_compose(
                "config", ["hydra/sweeper=optuna", *given], return_hydra_config=True
            )
            values = {
                str(key): value
                for key, value in config.hydra.sweeper.items()
                if key != "_target_"
            }
            context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
            drafted = draft_session(
                config, context, values | {"study_name": "s"}, tasks
            )
            return drafted.session, drafted.points

    return make


def rates(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high, log=True)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_spaces_are_a_decade_each_way_around_the_bases_rate(
    search: str, draft: Draft, tmp_path: Path
) -> None:
    wide = base_of(tmp_path / "my-7b", {"hidden_size": 4096})
    cases: list[tuple[list[str], float, FloatDistribution]] = [
        ([], 1e-3, rates(1e-4, 1e-2)),
        (["model=llama3_1_8b"], 3e-4, rates(3e-5, 3e-3)),
        ([f"model.name_or_path={wide}"], 4e-4, rates(4e-5, 4e-3)),
        (["optimizer=lion"], 2e-4, rates(2e-5, 2e-3)),
        (
            ["experiment=llama2_guanaco", "dataset.eval_fraction=0.1"],
            2e-4,
            rates(2e-5, 2e-3),
        ),
    ]
    for overrides, rate, distribution in cases:
        session, points = draft(f"search={search}", *overrides)
        assert session.space.distributions[RATE] == distribution, overrides
        assert session.common.optimizer.learning_rate == rate
        ((role, baseline), *others) = points
        assert (role, baseline[RATE], others) == ("baseline", rate, [])


@pytest.mark.parametrize(
    ("overrides", "distribution"),
    [
        ([f"{RATE}=tag(log,interval(1e-5,1e-3))"], rates(1e-5, 1e-3)),
        ([f"{RATE}=tag(log,interval(0.1,10))"], rates(0.1, 10)),
        (
            [
                "hydra.sweeper.params={optimizer.learning_rate: 'tag(log, interval(1e-5, 1e-3))'}"
            ],
            rates(1e-5, 1e-3),
        ),
        ([f"{RATE}=tag(relative,interval(0.5,2))"], FloatDistribution(2e-4, 8e-4)),
        (["lora.alpha=tag(log,relative,interval(1,4))"], rates(16, 64)),
    ],
)
def test_a_users_space_is_absolute_unless_it_is_tagged(
    overrides: list[str], distribution: FloatDistribution, draft: Draft, tmp_path: Path
) -> None:
    wide = base_of(tmp_path / "my-7b", {"hidden_size": 4096})
    session, points = draft(f"model.name_or_path={wide}", *overrides)
    name = "lora.alpha" if "lora.alpha" in overrides[0] else RATE
    assert session.space.distributions[name] == distribution
    assert points[0][0] == "baseline"


@pytest.mark.parametrize(
    ("searched", "says"),
    [
        (
            f"{RATE}=tag(relative,choice(1,2))",
            "the tag relative is for an interval, as interval(0.1, 10)",
        ),
        (
            "lora.dropout=tag(relative,interval(0.1,10))",
            "lora.dropout=0.0: a relative interval is in multiples of the config's own value",
        ),
        (
            "trainer.early_stopping_patience=tag(relative,interval(0.1,10))",
            "trainer.early_stopping_patience=null: a relative interval is in multiples of the config's own value",
        ),
    ],
)
def test_a_relative_interval_needs_something_to_be_relative_to(
    searched: str, says: str, draft: Draft
) -> None:
    with pytest.raises(ConfigError) as refused:
        draft(searched)
    assert says in str(refused.value)


@pytest.mark.parametrize("overrides", [[], ["lora.r=choice(4,8)", "~search"]])
def test_what_a_study_on_the_packaged_base_holds_fast_is_as_before(
    overrides: list[str], draft: Draft
) -> None:
    """So that one that began with 0.001 written in the config, and its space of 1e-4 to 1e-2, goes
    on."""
    session, _ = draft(*overrides)
    fingerprint = SharedResources().rows(session.common.dataset).fingerprint
    terms = study_terms(session.common, session.space, session.settings, fingerprint)
    assert "model.learning_rate" not in terms
    if overrides:
        assert terms[RATE] == 1e-3
    else:
        assert terms[f"space.{RATE}"]["attributes"] == {
            "step": None,
            "low": 1e-4,
            "high": 1e-2,
            "log": True,
        }


def test_a_study_on_a_users_base_has_its_baseline_and_its_answer_the_number(
    tiny_base: Path, station: Station, tmp_path: Path
) -> None:
    more = ("hydra.sweeper.n_trials=2", "lora.r=choice(4,8)", "~search")
    ended = station.run(*study_overrides(tiny_base, "s"), *more, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "outputs" / "sweeps" / "s"
    assert f"{RATE}=0.001 (by hidden size 64)" in ended.stderr
    assert [
        final(folder / "trials" / str(number))["learning_rate"] for number in (0, 1)
    ] == [
        1e-3,
        1e-3,
    ]
    assert (
        OmegaConf.load(folder / "experiment" / "best.yaml").optimizer.learning_rate
        == 1e-3
    )
    assert "learning_rate: 0.001" in (folder / "report.html").read_text()
    again = station.run(
        "--config-dir",
        str(folder),
        "experiment=best",
        "hydra.run.dir=again",
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    assert final(tmp_path / "again")["learning_rate"] == 1e-3
