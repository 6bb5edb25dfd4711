"""Overrides as distributions, with the cases of hydra-optuna-sweeper 1.4.0rc3's own tests."""

from typing import Any

import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from finetune.config.paths import CONF
from finetune.errors import ConfigError
from sweeps.space.distributions import grid_values
from sweeps.space.points import grid_points
from sweeps.space.space import Space


def distribution_of(expression: str) -> BaseDistribution:
    return Space.parse({}, [f"key={expression}"]).distributions["key"]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("choice(1,2)", CategoricalDistribution([1, 2])),
        ("1,2", CategoricalDistribution([1, 2])),
        ("choice(true, false)", CategoricalDistribution([True, False])),
        ("choice('hello', 'world')", CategoricalDistribution(["hello", "world"])),
        ("choice([a,b],[c])", CategoricalDistribution(["[a,b]", "[c]"])),
        ("shuffle(range(1,3))", CategoricalDistribution((1, 2))),
        ("range(1,3)", IntDistribution(1, 2)),
        ("interval(1, 5)", FloatDistribution(1, 5)),
        ("int(interval(1, 5))", IntDistribution(1, 5)),
        ("tag(log, interval(1, 5))", FloatDistribution(1, 5, log=True)),
        ("tag(log, int(interval(1, 5)))", IntDistribution(1, 5, log=True)),
        ("range(0.5, 5.5, step=1)", FloatDistribution(0.5, 4.5, step=1)),
        ("range(0,1000000000000)", IntDistribution(0, 999999999999)),
        (
            "range(-1000000000000000.0,1e-15,1.0)",
            FloatDistribution(-1000000000000000.0, 0.0, step=1.0),
        ),
        (
            "range(1000000000000000.0,-1e-15,-1.0)",
            FloatDistribution(0.0, 1000000000000000.0, step=1.0),
        ),
        (
            "range(-1000000000000000.0,-999999999999999.5,0.3)",
            CategoricalDistribution((-1000000000000000.0, -999999999999999.8)),
        ),
    ],
)
def test_an_override_gives_the_stock_sweepers_distribution(
    expression: str, expected: BaseDistribution
) -> None:
    assert distribution_of(expression) == expected


@pytest.mark.parametrize(
    ("expression", "values", "kind"),
    [
        ("range(1,3)", [1, 2], IntDistribution),
        ("range(0,8,3)", [0, 3, 6], IntDistribution),
        ("range(3,0,-1)", [1, 2, 3], IntDistribution),
        ("range(0,1,0.5)", [0.0, 0.5], FloatDistribution),
        ("range(0,1,0.3)", [0.0, 0.3, 0.6, 0.9], FloatDistribution),
        ("range(1,0,-0.3)", [0.1, 0.4, 0.7, 1.0], FloatDistribution),
        ("range(0,1,0.1)", [i / 10 for i in range(10)], FloatDistribution),
        ("sort(range(1,0,-0.25))", [0.25, 0.5, 0.75, 1.0], FloatDistribution),
        (
            "sort(range(0,1,0.25),reverse=true)",
            [0.0, 0.25, 0.5, 0.75],
            FloatDistribution,
        ),
        ("range(2,3,4)", [2], IntDistribution),
        ("range(0.5,1,2)", [0.5], FloatDistribution),
        ("int(range(0,5,1.5))", [0, 1, 3, 4], CategoricalDistribution),
        ("int(range(0,1,0.25))", [0, 0, 0, 0], CategoricalDistribution),
        ("float(range(1,3))", [1.0, 2.0], CategoricalDistribution),
        ("float(int(range(0,1,0.25)))", [0.0, 0.0, 0.0, 0.0], CategoricalDistribution),
        ("shuffle(range(1,3))", [1, 2], CategoricalDistribution),
        ("sort(shuffle(range(1,3)))", [1, 2], IntDistribution),
    ],
)
def test_a_range_has_the_values_that_it_has_in_hydra(
    expression: str, values: list[float], kind: type[BaseDistribution]
) -> None:
    distribution = distribution_of(expression)
    assert isinstance(distribution, kind)
    choices = grid_values(distribution)
    assert choices is not None
    assert sorted(choices) == values
    assert [type(value) for value in sorted(choices)] == [
        type(value) for value in values
    ]
    # A grid has values that are alike once.
    points = grid_points(Space.parse({}, [f"key={expression}"]), 0)
    assert sorted(point["key"] for point in points) == sorted(set(values))


@pytest.mark.parametrize(
    "expression",
    [
        "range(0,1,0)",
        "range(0,1,0.0)",
        "int(range(0,1,0.0))",
        "shuffle(range(0,1,0))",
        "range(0,0)",
        "range(3,1)",
        "range(0,1,-0.5)",
        "interval(3,1)",
        "tag(log, interval(0,1))",
    ],
)
def test_a_sweep_of_no_value_is_refused_by_its_text(expression: str) -> None:
    with pytest.raises(ConfigError) as refused:
        distribution_of(expression)
    assert str(refused.value).startswith(f"key={expression}: ")


def test_shuffled_choices_keep_their_order_so_that_a_study_can_go_on() -> None:
    spaces = [
        Space.parse({}, ["a=shuffle(choice(1,2,3,4,5,6,7,8))", "b=shuffle(range(0,9))"])
        for _ in range(5)
    ]
    assert all(space == spaces[0] for space in spaces)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["key=choice(1,2)"], ({"key": CategoricalDistribution([1, 2])}, {}, [])),
        (["key=5"], ({}, {"key": "5"}, [])),
        (
            ["key1=choice(1,2)", "key2=5"],
            ({"key1": CategoricalDistribution([1, 2])}, {"key2": "5"}, []),
        ),
        (
            ["key1=choice(1,2)", "key2=5", "key3=range(1,3)"],
            (
                {
                    "key1": CategoricalDistribution([1, 2]),
                    "key3": IntDistribution(1, 2),
                },
                {"key2": "5"},
                [],
            ),
        ),
        (["~z"], ({}, {}, ["~z"])),
        (["~z=10"], ({}, {}, ["~z=10"])),
    ],
)
def test_overrides_are_searched_fixed_or_deletions(
    overrides: list[str], expected: tuple[dict[str, Any], dict[str, Any], list[str]]
) -> None:
    assert Space.parse({}, overrides) == Space(*expected)


@pytest.mark.parametrize(
    ("params", "argument", "expected"),
    [
        ("choice(4,8)", "lora.r=16", None),
        ("8", "lora.r=choice(4,8)", CategoricalDistribution([4, 8])),
        ("choice(4,8)", "lora.r=range(1,3)", IntDistribution(1, 2)),
        ("choice(4,8)", "++lora.r=16", None),
    ],
)
def test_the_command_line_wins_over_params(
    params: str, argument: str, expected: BaseDistribution | None
) -> None:
    space = Space.parse({"lora.r": params}, [argument])
    assert list(space.distributions.values()) == (
        [] if expected is None else [expected]
    )
    assert space.overrides({}) == ([argument] if expected is None else [])


def test_a_trials_command_line_is_what_is_fixed_deleted_and_suggested() -> None:
    space = Space.parse(
        {"lora.r": "choice(4,8)", "lora.extra": {"a": [1]}},
        ["seed=3", "~tracker.tags", "+x=1"],
    )
    assert space.overrides({"lora.r": 8}) == [
        "lora.extra={a:[1]}",
        "seed=3",
        "+x=1",
        "~tracker.tags",
        "lora.r=8",
    ]


def test_a_glob_searches_the_choices_of_a_group() -> None:
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF)):
        assert Space.parse({}, ["lora/target=glob(*)"]).distributions == {
            "lora/target": CategoricalDistribution(["all_linear", "attention", "q_v"])
        }
        assert Space.parse({}, ["lora=glob(r*, exclude=r1*)"]).distributions == {
            "lora": CategoricalDistribution(["r32", "r4", "r64", "r8"])
        }
        with pytest.raises(ConfigError, match=r"^lora=glob\(z\*\): "):
            Space.parse({}, ["lora=glob(z*)"])
