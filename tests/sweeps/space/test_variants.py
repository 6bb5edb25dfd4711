"""Variants of several keys and conditions: their forms, their points, and what is refused."""

import random
from typing import Any

import pytest
from omegaconf import open_dict
from support.studies import composed, sweeper_config

from finetune.errors import ConfigError
from sweeps.space.config_point import config_point
from sweeps.space.params import plain_params
from sweeps.space.points import (
    extreme_points,
    grid_points,
    point_count,
    random_point,
)
from sweeps.space.space import Space

SMALL = {"lora.r": 8, "lora.alpha": 16}
LARGE = {"lora.r": 64, "lora.alpha": 128}
SIZE = "size=tag(variants,choice({small: {lora.r: 8, lora.alpha: 16}, large: {lora.r: 64, lora.alpha: 128}}))"
SCHEDULE = "optimizer.lr_scheduler_type=choice(cosine,linear,constant)"
WARMUP = (
    "optimizer.warmup_ratio=tag('optimizer.lr_scheduler_type=cosine',interval(0,0.1))"
)


def yaml_space(params: dict[str, Any]) -> Space:
    """A space as a file of the group `search` has it."""
    config = sweeper_config()
    with open_dict(config):
        config.search = {"params": params}
    return Space.parse(plain_params(config.search.params, config), [])


@pytest.mark.parametrize(
    "written",
    [
        {"size": {"variants": {"small": SMALL, "large": LARGE}}},
        {
            "size": {
                "variants": {
                    "small": ["lora.r=8", "lora.alpha=16"],
                    "large": ["lora.r=64", "lora.alpha=128"],
                }
            }
        },
        {
            "size": {
                "variants": {
                    "small": {"lora": {"r": 8, "alpha": 16}},
                    "large": ["lora.r=64", "lora.alpha=128"],
                }
            }
        },
    ],
    ids=["mappings", "overrides", "nested"],
)
def test_a_file_and_a_command_write_the_same_variants(written: dict[str, Any]) -> None:
    space = yaml_space(written)
    assert space == Space.parse({}, [SIZE])
    assert space.config_keys == ["lora.r", "lora.alpha"]
    assert space.overrides({"size": "large"}) == ["lora.r=64", "lora.alpha=128"]


def test_a_name_with_dots_is_one_parameter_of_a_nested_file() -> None:
    variants = {"small": SMALL, "large": LARGE}
    space = yaml_space({"lora": {"size": {"variants": variants}, "dropout": [0, 0.1]}})
    assert list(space.distributions) == ["lora.size", "lora.dropout"]


@pytest.mark.parametrize(
    ("values", "override"),
    [
        ({"lora": "r64"}, "lora=r64"),
        ({"lora/target": "q_v"}, "lora/target=q_v"),
        ({"lora.target_modules": ["q_proj", "v_proj"]}, "lora.target_modules=[q_proj,v_proj]"),
        ({"lora.use_dora": True}, "lora.use_dora=True"),
        ({"dataset.limit": None}, "dataset.limit=null"),
        ({"lora.r": 4, "lora.alpha": "${lora.r}"}, "lora.alpha='${lora.r}'"),
        ({"sample_prompts": ["it's", "a, b"]}, "sample_prompts=['it\\'s','a, b']"),
        (["lora.target_modules=[q_proj,v_proj]"], "lora.target_modules=[q_proj,v_proj]"),
    ],
)  # fmt: skip
def test_a_variant_sets_any_value_and_any_group(values: Any, override: str) -> None:
    space = yaml_space({"x": {"variants": {"a": values, "b": {}}}})
    assert override in space.overrides({"x": "a"})
    assert space.overrides({"x": "b"}) == []
    assert composed(*space.overrides({"x": "a"}))


def test_an_interpolation_of_a_variant_is_resolved_in_each_trial() -> None:
    space = yaml_space(
        {"x": {"variants": {"a": {"lora.r": 4, "lora.alpha": "${lora.r}"}, "b": {}}}}
    )
    assert composed(*space.overrides({"x": "a"})).lora.alpha == 4


@pytest.mark.parametrize(
    ("overrides", "point"),
    [
        (["lora.r=8", "lora.alpha=16"], {"size": "small"}),
        (["lora.r=64", "lora.alpha=128"], {"size": "large"}),
        ([], {"lora.r": 16, "lora.alpha": 16}),
        (["lora.r=8", "lora.alpha=128"], {"lora.r": 8, "lora.alpha": 128}),
    ],
)
def test_the_configs_own_values_are_a_variant_or_outside(
    overrides: list[str], point: dict[str, Any]
) -> None:
    space = Space.parse({}, [SIZE])
    assert config_point(space, composed(*overrides)) == point
    assert space.outside(point) == ({} if "size" in point else point)
    written = [f"{key}={value}" for key, value in point.items()]
    assert "size" in point or space.overrides(point) == written


def test_groups_of_variants_are_compared_by_their_choices() -> None:
    space = yaml_space({"x": {"variants": {"a": {"lora": "r64"}, "b": {"lora": "r8"}}}})
    assert config_point(space, composed("lora=r8")) == {"x": "b"}
    assert config_point(space, composed()) == {"lora": "r16"}


def test_a_start_point_names_a_variant() -> None:
    space = Space.parse({}, [SIZE])
    space.require("start", {"size": "small"})
    with pytest.raises(ConfigError) as refused:
        space.require("start", {"size": "huge"})
    assert str(refused.value) == "start: size=huge lies outside choice(small, large)"


@pytest.mark.parametrize(
    "written",
    [
        {"search": "interval(0,0.1)", "when": {"optimizer.lr_scheduler_type": "cosine"}},
        {"search": "interval(0,0.1)", "when": "optimizer.lr_scheduler_type=cosine"},
        {"search": "interval(0,0.1)", "when": ["optimizer.lr_scheduler_type=cosine"]},
        {
            "search": {"type": "float", "low": 0, "high": 0.1},
            "when": {"optimizer.lr_scheduler_type": ["cosine"]},
        },
    ],
    ids=["mapping", "text", "list", "old form"],
)  # fmt: skip
def test_a_file_and_a_command_write_the_same_condition(written: dict[str, Any]) -> None:
    space = yaml_space(
        {
            "optimizer.warmup_ratio": written,
            "optimizer.lr_scheduler_type": "choice(cosine,linear,constant)",
        }
    )
    assert space == Space.parse({}, [WARMUP, SCHEDULE])
    # A parameter comes after those that its condition names.
    assert list(space.distributions) == [
        "optimizer.lr_scheduler_type",
        "optimizer.warmup_ratio",
    ]


@pytest.mark.parametrize(
    ("search", "syntax"),
    [
        ("tag(log,interval(1,2))", "b=tag('a=1',log,interval(1,2))"),
        ("tag(log, relative, interval(1,2))", "b=tag('a=1',log,relative,interval(1,2))"),
        ("8,16", "b=tag('a=1',choice(8,16))"),
        ([8, 16], "b=tag('a=1',choice(8,16))"),
        ([["q"], ["q", "v"]], "b=tag('a=1',choice([q],[q,v]))"),
        ("int(interval(1,8))", "b=tag('a=1',int(interval(1,8)))"),
        ("range(1,8)", "b=tag('a=1',range(1,8))"),
    ],
    ids=str,
)  # fmt: skip
def test_anything_that_can_be_searched_can_have_a_condition(
    search: Any, syntax: str
) -> None:
    written = {"a": "choice(1,2)", "b": {"search": search, "when": {"a": 1}}}
    space = yaml_space(written)
    assert space == Space.parse({}, ["a=choice(1,2)", syntax])
    assert space.conditions == {"b": {"a": [1]}}


def test_variants_can_be_a_condition_and_have_one() -> None:
    space = yaml_space(
        {
            "lora.dropout": {"search": "interval(0,0.1)", "when": {"size": "large"}},
            "size": {
                "variants": {"small": SMALL, "large": LARGE},
                "when": {"lora.use_dora": False},
            },
            "lora.use_dora": "choice(true,false)",
        }
    )
    assert list(space.distributions) == ["lora.use_dora", "size", "lora.dropout"]
    whole = {"lora.use_dora": True, "size": "large", "lora.dropout": 0.1}
    assert space.searched_part(whole) == {"lora.use_dora": True}
    whole["lora.use_dora"] = False
    assert space.searched_part(whole) == whole


@pytest.mark.parametrize(
    ("schedule", "searched"),
    [("cosine", True), ("linear", False), ("polynomial", False)],
)
def test_the_configs_own_point_has_what_is_searched_there(
    schedule: str, searched: bool
) -> None:
    space = Space.parse({}, [WARMUP, SCHEDULE])
    point = config_point(space, composed(f"optimizer.lr_scheduler_type={schedule}"))
    assert point is not None
    assert ("optimizer.warmup_ratio" in point) == searched


CHAIN = ["a=choice(1,2,3)", "b=tag('a=1,2',choice(x,y))", "c=tag('b=y',range(0,4))"]


def test_a_space_with_conditions_has_as_many_points_as_differ() -> None:
    space = Space.parse({}, CHAIN)
    points = grid_points(space, 0)
    # a=3, and with a of 1 and 2: b=x, or b=y with four values of c.
    assert len(points) == point_count(space) == 1 + 2 * (1 + 4)
    assert {"a": 3} in points
    assert {"a": 1, "b": "x"} in points
    assert {"a": 2, "b": "y", "c": 3} in points
    assert all(point == space.searched_part(point) for point in points)


def test_random_points_and_ends_have_what_is_searched_there() -> None:
    space = Space.parse({}, CHAIN)
    draw = random.Random(0)
    drawn = [random_point(space, draw) for _ in range(200)]
    assert all(point in grid_points(space, 0) for point in drawn)
    assert {len(point) for point in drawn} == {1, 2, 3}
    assert random_point(space, draw, {"a": 3}) == {"a": 3}
    ends = extreme_points(space)
    assert all(point == space.searched_part(point) for point in ends)
    for name, values in {"a": [1, 2, 3], "b": ["x", "y"], "c": [0, 3]}.items():
        assert {point.get(name) for point in ends} >= set(values)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["b=tag('a=1',choice(1,2))", "c=1,2"], "b: when a: is not searched; allowed: c"),
        (["b=tag('a=1',choice(1,2))", "a=1"], "b: when a: is not searched; allowed: "),
        (
            ["b=tag('a=3',choice(1,2))", "a=1,2"],
            "b: when a=3: lies outside choice(1, 2)",
        ),
        (
            ["b=tag('a=3',choice(1,2))", "a=interval(1,2)"],
            "b: when a: needs choices, not interval(1.0, 2.0)",
        ),
        (
            ["b=tag('a=1',choice(1,2))", "a=tag('b=1',choice(1,2))"],
            "b, a: their conditions depend on each other",
        ),
        (["b=tag('a=interval(0,1)',choice(1,2))", "a=1,2"], "b: a=interval(0,1): must have values"),
        ([SIZE, "lora.r=4,8"], "lora.r: is searched by both size and lora.r"),
        ([SIZE, SIZE.replace("size", "other")], "lora.r: is searched by both size and other"),
        (["x=tag(variants,choice(a,b))"], "x=tag(variants,choice(a,b)): variants are a choice of one mapping, as x=tag("),
        (["x=tag(variants,choice({a: 1}))"], "x: 1: write {lora.r: 8} or [lora.r=8]"),
        (["x=tag(variants,choice({a: ['lora.r=1,2']}))"], "x: lora.r=1,2: must be one value"),
        (["x=tag(variants,choice({a: {seed: 1}, b: {seed: 2}}))"], "seed: can't be searched"),
        (["x=tag(variants,choice({a: {dataset.path: p}, b: {}}))"], "dataset.path: can't be searched"),
    ],
)  # fmt: skip
def test_a_space_that_cant_be_is_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Space.parse({}, arguments)
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"variants": {"a": {}}, "search": "1,2"}, "x: has variants, search; write {variants: "),
        ({"variants": {"a": {}}, "if": "b=1"}, "x: has variants, if; write {variants: "),
        ({"search": "1,2", "when": "cosine"}, "x: when=cosine: write {key: value}, or [key=value]"),
        ({"search": "1,2", "when": 5}, "x: when=5: write {key: value}"),
    ],
)  # fmt: skip
def test_a_long_form_that_is_not_clear_is_refused(
    written: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        yaml_space({"x": written})
    assert str(refused.value).startswith(says)


def test_a_start_point_with_what_is_not_searched_there_is_refused() -> None:
    space = Space.parse({}, [WARMUP, SCHEDULE])
    point = {"optimizer.lr_scheduler_type": "linear", "optimizer.warmup_ratio": 0.1}
    with pytest.raises(ConfigError) as refused:
        space.require("start", point)
    assert str(refused.value) == (
        "start: optimizer.warmup_ratio is searched only with "
        "optimizer.lr_scheduler_type=cosine"
    )
    # The sampler may choose the schedule that fits.
    space.require("start", {"optimizer.warmup_ratio": 0.1})


def test_changed_variants_and_conditions_are_other_terms() -> None:
    plain = Space.parse({}, [SIZE]).to_dict()
    other = Space.parse({}, [SIZE.replace("128", "64")]).to_dict()
    assert plain["size"]["attributes"] == other["size"]["attributes"]
    assert plain != other
    unconditional = "optimizer.warmup_ratio=interval(0,0.1)"
    before = Space.parse({}, [WARMUP, SCHEDULE]).to_dict()
    assert before != Space.parse({}, [unconditional, SCHEDULE]).to_dict()
