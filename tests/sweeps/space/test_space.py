"""What a study searches: the config's own point, values outside the space, points and keys that are
refused.

The search spaces, samplers and pruners that come with the project are looked at one by one.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution
from support.studies import PRUNERS, composed

from finetune.config.paths import CONF
from finetune.config.schema import RunConfig
from finetune.errors import ConfigError
from sweeps.space.config_point import config_point, scaled_space
from sweeps.space.distributions import describe
from sweeps.space.encoding import encode
from sweeps.space.points import extreme_points
from sweeps.space.settings import StudySettings
from sweeps.space.space import Space

SEARCHES = sorted(file.stem for file in (CONF / "search").glob("*.yaml"))


def own_values(searched: str, *overrides: str) -> dict[str, Any] | None:
    """The point of a config in a space of one parameter."""
    return config_point(Space.parse({}, [searched]), composed(*overrides))


@pytest.mark.parametrize(
    "value",
    [
        *(
            "abc",
            "a b",
            " a ",
            "it's",
            'say "x"',
            'it\'s "x"',
            "",
            "é",
            "日本",
            "a\tb",
            "a\nb",
        ),
        *(
            "a\\b",
            "a\\",
            "\\",
            "\\'",
            "a\\\\",
            "$x",
            "${x}",
            "\\${x}",
            "a,b",
            "[1]",
            "{a:1}",
            "(x)",
            "choice(1,2)",
        ),
        *(
            "true",
            "null",
            "NULL",
            "5",
            "-5",
            "1e-3",
            ".5",
            "1_000",
            "nan",
            "inf",
            "a=b",
            "#c",
            "~",
            "+k",
            "-x",
            "?",
        ),
        *("a:b", "/x/y z", "..", "q_proj", "%", "a;b", "*"),
        *(5, -5, 0.1, 1e-5, 1e22, float("inf"), True, False, None),
        *(
            [],
            [1, 2],
            ["a", "b c"],
            ["it's", [1]],
            ["null", "5", None, True, 5],
            ["a\\"],
            ["a,b", "[", "${x}"],
        ),
        *({}, {"a": 1}, {"a": [1, "x y"], "b": {"c": None}}),
    ],
    ids=repr,
)
def test_hydra_reads_an_encoded_value_back(value: object) -> None:
    read = OverridesParser.create().parse_override(f"key={encode(value)}").value()
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "value", ["a b", "it's", "true", "5", "a\\", "", ["a b", "5"], [1, None], "x,y"]
)
def test_a_choice_and_the_configs_own_value_are_written_alike(value: object) -> None:
    space = Space.parse({}, [f"key=choice({encode(value)},other)"])
    point = {"key": encode(value)}
    assert space.outside(point) == {}
    (override,) = space.overrides(point)
    read = OverridesParser.create().parse_override(override).value()
    assert read == value


@pytest.mark.parametrize(
    ("searched", "overrides", "expected"),
    [
        ("lora.r=choice(4,8)", [], 16),
        ("lora.r=choice(4,8)", ["lora=r64"], 64),
        ("optimizer.learning_rate=interval(0,1)", ["optimizer.learning_rate=0.5"], 0.5),
        ("lora.use_dora=choice(true,false)", [], False),
        ("lora=choice(r8,r16)", ["lora=r8"], "r8"),
        ("lora/target=choice(q_v,attention)", [], "all_linear"),
        ("lora/target=choice(q_v,attention)", ["lora/target=q_v"], "q_v"),
        ("lora.target_modules=choice([q_proj],all-linear)", [], "all-linear"),
        (
            "lora.target_modules=choice([q_proj],all-linear)",
            ["lora/target=q_v"],
            "[q_proj,v_proj]",
        ),
        (
            "lora.target_modules=choice([q_proj],[k_proj])",
            ["lora.target_modules=[ q_proj ]"],
            "[q_proj]",
        ),
        (
            "model.name_or_path=choice(a,b)",
            ["model.name_or_path='/my models/a'"],
            "'/my models/a'",
        ),
        ("dataset.limit=null,100", ["dataset.limit=null"], "null"),
        ("dataset.limit=choice(50,100)", ["dataset.limit=50"], 50),
        ("++lora.r=choice(4,8)", [], 16),
        ("lora.extra=choice({a:1},{a:2})", ["+lora.extra.a=1"], "{a:1}"),
    ],
)
def test_the_configs_own_value_of_what_is_searched(
    searched: str, overrides: list[str], expected: object
) -> None:
    assert own_values(searched, *overrides) == {searched.partition("=")[0]: expected}


@pytest.mark.parametrize(
    "searched",
    [
        "trainer.early_stopping_patience=choice(2,3)",
        "+lora.extra.layers=choice(1,2)",
        "experiment=choice(a,b)",
        "lora.nope=choice(1,2)",
    ],
)
def test_there_is_no_own_point_without_a_value_for_each_parameter(
    searched: str,
) -> None:
    assert own_values(searched) is None
    space = Space.parse({}, ["lora.r=choice(1,2)", searched])
    assert config_point(space, composed()) is None


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("choice(4,8)", 16),
        ("choice(4,8)", "8"),
        ("choice(a,b)", "c"),
        ("choice(0,1)", False),
        ("int(interval(4,8))", 16),
        ("int(interval(4,8))", 2),
        ("range(1,5)", 2.5),
        ("range(8,65,8)", 80),
        ("range(8,65,8)", 12),
        ("tag(log,int(interval(4,64)))", 128),
        ("interval(0,0.1)", 0.2),
        ("interval(0,1)", "abc"),
        ("interval(0,1)", True),
        ("tag(log,interval(1e-4,1e-2))", 1e-5),
        ("tag(log,interval(0.1,1))", 0),
        ("range(0.1,0.5,0.1)", 0.7),
        ("range(0.0,0.5,0.1)", 0.25),
    ],
)
def test_a_value_outside_is_told_and_refused_as_a_start_point(
    expression: str, value: Any
) -> None:
    space = Space.parse({}, [f"key={expression}", "other=1,2"])
    point = {"other": 1, "key": value}
    assert space.outside(point) == {"key": value}
    described = describe(space.distributions["key"])
    with pytest.raises(ConfigError) as refused:
        space.require("start", point)
    assert str(refused.value) == f"start: key={value} lies outside {described}"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("choice(4,8)", 8),
        ("choice(4,8)", 8.0),
        ("choice(true,false)", True),
        ("int(interval(4,8))", 8),
        ("interval(0,1)", 1),
        ("range(0,1,0.1)", 0.3),
        ("tag(log,interval(1e-4,1e-2))", 1e-4),
        ("choice([a,b],[c])", "[a,b]"),
    ],
)
def test_a_value_inside_is_told_and_taken_as_a_start_point(
    expression: str, value: Any
) -> None:
    space = Space.parse({}, [f"key={expression}"])
    assert space.outside({"key": value}) == {}
    space.require("start", {"key": value})


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("choice(4,8)", "choice(4, 8)"),
        ("choice('a b',c)", "choice('a b', c)"),
        ("interval(0,1)", "interval(0.0, 1.0)"),
        ("int(interval(0,1))", "int(interval(0, 1))"),
        ("tag(log,interval(1e-4,1))", "tag(log, interval(0.0001, 1.0))"),
        ("range(0,9,2)", "range(0, …, 8, step=2)"),
        ("range(0,1,0.25)", "range(0.0, …, 0.75, step=0.25)"),
    ],
)
def test_a_distribution_is_said_as_users_write_it(expression: str, said: str) -> None:
    assert describe(Space.parse({}, [f"key={expression}"]).distributions["key"]) == said


@pytest.mark.parametrize(
    ("point", "says"),
    [
        (
            {"lora.nope": 8},
            "start: lora.nope is not searched; allowed: lora.r, lora.dropout",
        ),
        ({"lora.r": 5}, "start: lora.r=5 lies outside choice(4, 8)"),
        ({"lora.r": "8"}, "start: lora.r=8 lies outside choice(4, 8)"),
        (
            {"lora.r": 8, "lora.dropout": 0.5},
            "start: lora.dropout=0.5 lies outside interval(0.0, 0.1)",
        ),
        (
            {"lora.dropout": "much"},
            "start: lora.dropout=much lies outside interval(0.0, 0.1)",
        ),
    ],
)
def test_a_start_point_outside_of_the_space_is_refused(
    point: Mapping[str, Any], says: str
) -> None:
    space = Space.parse(
        {"lora.r": "choice(4,8)", "lora.dropout": "interval(0,0.1)"}, []
    )
    with pytest.raises(ConfigError) as refused:
        space.require("start", point)
    assert str(refused.value) == says


def test_start_points_are_nested_or_dotted_one_or_many() -> None:
    params = {"lora.r": "choice(4,8)", "lora/target": "choice(q_v,attention)"}
    space = Space.parse(params, ["lora.target_modules=choice([a,'b c'],[d])"])
    wanted = {"lora.r": 8, "lora/target": "q_v", "lora.target_modules": "[a,'b c']"}
    for start in (
        {"lora": {"r": 8, "target_modules": ["a", "b c"]}, "lora/target": "q_v"},
        [{"lora.r": 8, "lora/target": "q_v", "lora.target_modules": ["a", "b c"]}],
    ):
        (point,) = settings(start=start).start
        assert point == wanted
        space.require("start", point)


def settings(**values: Any) -> StudySettings:
    given = OmegaConf.to_container(composed().hydra.sweeper, resolve=True)
    assert isinstance(given, dict)
    plain = {str(key): value for key, value in given.items() if key != "_target_"}
    return StudySettings.from_sweeper(
        {**plain, "study_name": "s", "params": {}, **values}
    )


@pytest.mark.parametrize(
    "name",
    [
        *(
            "dataset",
            "dataset.max_length",
            "dataset.path",
            "dataset.split_seed",
            "dataset.packing",
            "+dataset.new",
        ),
        *(
            "objective",
            "objective_at",
            "name",
            "resume",
            "trainer.engine",
            "tracker",
            "tracker.tags",
            "hub.push",
        ),
        *("search", "hydra.sweeper.n_trials", "++name"),
    ],
)
def test_what_trials_are_compared_by_cant_be_searched(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Space.parse({name: "choice(a,b)"}, [])
    assert str(refused.value).startswith(f"{name}: can't be searched: ")
    assert Space.parse({name: "a"}, []).distributions == {}


@pytest.mark.parametrize(
    "name",
    [
        "dataset.limit",
        "trainer.extra.data_seed",
        "model",
        "quantization",
        "trainer.max_steps",
        "lora",
    ],
)
def test_all_else_can_be_searched(name: str) -> None:
    assert list(Space.parse({name: "choice(a,b)"}, []).distributions) == [name]


def test_a_space_is_kept_as_plain_values() -> None:
    space = Space.parse({"a": "choice(x,[y,z])", "b": "tag(log,interval(1,2))"}, [])
    assert space.to_dict() == {
        "a": {
            "name": "CategoricalDistribution",
            "attributes": {"choices": ["x", "[y,z]"]},
        },
        "b": {
            "name": "FloatDistribution",
            "attributes": {"step": None, "low": 1.0, "high": 2.0, "log": True},
        },
    }


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_space_holds_the_default_config_and_only_valid_values(
    search: str,
) -> None:
    config = composed(f"search={search}", "optimizer.learning_rate=1e-3")
    params = OmegaConf.to_container(config.search.params)
    assert isinstance(params, dict)
    texts = {str(name): text for name, text in params.items()}
    space = scaled_space(Space.parse(texts, []), config)

    own = config_point(space, config)
    assert own is not None
    assert space.outside(own) == {}
    ends = [
        what.choices
        if isinstance(what, CategoricalDistribution)
        else (what.low, what.high)  # type: ignore[attr-defined]
        for what in space.distributions.values()
    ]
    for values in zip(
        *(itertools.islice(itertools.cycle(end), max(map(len, ends))) for end in ends),
        strict=True,
    ):
        trial = composed(
            *space.overrides(dict(zip(space.distributions, values, strict=True)))
        )
        RunConfig.from_hydra(
            OmegaConf.masked_copy(trial, [str(key) for key in trial if key != "hydra"])
        )


@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [
        *(
            (sampler, "none")
            for sampler in (
                "tpe",
                "random",
                "cmaes",
                "grid",
                "qmc",
                "gp",
                "nsgaii",
                "nsgaiii",
            )
        ),
        *(("tpe", pruner) for pruner in PRUNERS if pruner != "none"),
    ],
)
def test_every_sampler_and_every_pruner_composes(sampler: str, pruner: str) -> None:
    sweeper = composed(
        f"hydra/sweeper/sampler={sampler}", f"hydra/sweeper/pruner={pruner}"
    ).hydra.sweeper
    checked = settings(
        sampler=OmegaConf.to_container(sweeper.sampler),
        pruner=OmegaConf.to_container(sweeper.pruner),
    )
    assert checked.is_grid == (sampler == "grid")
    assert "seed" in checked.sampler
    assert checked.pruner["_target_"].startswith(
        ("optuna.pruners.", "sweeps.space.pruners.")
    )


@pytest.mark.parametrize("name", ["seed", "+seed", "++seed"])
def test_a_searched_seed_is_refused_with_confirm_named(name: str) -> None:
    for sweep in ("choice(0,1,2)", "range(0,5)", "0,1"):
        with pytest.raises(ConfigError, match="sweeps confirm"):
            Space.parse({name: sweep}, [])
        with pytest.raises(ConfigError, match="sweeps confirm"):
            Space.parse({}, [f"{name}={sweep}"])
    assert Space.parse({name: 3}, []).fixed == {name: "3"}


@pytest.mark.parametrize(
    ("searched", "expected"),
    [
        ("lora.r=int(interval(2,7))", [2, 7]),
        ("lora.r=range(2,8)", [2, 7]),
        ("lora.r=range(8,65,8)", [8, 64]),
        ("lora.r=tag(log,int(interval(2,64)))", [2, 64]),
        ("lora.dropout=interval(0,0.1)", [0.0, 0.1]),
        ("lora.dropout=range(0,0.3,0.1)", [0.0, 0.2]),
        ("optimizer.learning_rate=tag(log,interval(1e-5,1e-3))", [1e-5, 1e-3]),
        ("lora.use_dora=choice(true,false)", [True, False]),
        ("dataset.limit=null,100", [None, 100]),
        (
            "lora.target_modules=choice([q_proj],[q_proj,v_proj])",
            [["q_proj"], ["q_proj", "v_proj"]],
        ),
        ("lora.target_modules=[q_proj],all-linear", [["q_proj"], "all-linear"]),
        ("++lora.extra=choice({a:1},{a:2})", [{"a": 1}, {"a": 2}]),
    ],
)
def test_both_ends_of_what_is_searched_reach_the_config(
    searched: str, expected: list[object]
) -> None:
    space = Space.parse({}, [searched])
    values = []
    for point in extreme_points(space):
        value = OmegaConf.select(
            composed(*space.overrides(point)), searched.partition("=")[0].strip("+")
        )
        is_config = OmegaConf.is_config(value)
        values.append(OmegaConf.to_container(value) if is_config else value)
    assert values == expected


@pytest.mark.parametrize(
    ("searched", "key", "expected"),
    [
        ("lora=choice(r8,r64)", "lora.r", [8, 64]),
        ("lora=r8,r64", "lora.r", [8, 64]),
        ("lora/target=choice(q_v,all_linear)", "lora.target_modules", [["q_proj", "v_proj"], "all-linear"]),
        ("lora=glob(r?)", "lora.r", [4, 8]),
    ],
)  # fmt: skip
def test_whole_groups_reach_the_config(
    searched: str, key: str, expected: list[object]
) -> None:
    # A glob lists a group's options by Hydra's loader.
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF)):
        space = Space.parse({}, [searched])
    values = []
    for point in extreme_points(space):
        value = OmegaConf.select(composed(*space.overrides(point)), key)
        is_config = OmegaConf.is_config(value)
        values.append(OmegaConf.to_container(value) if is_config else value)
    assert values == expected
