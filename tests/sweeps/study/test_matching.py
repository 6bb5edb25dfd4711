"""The point of a space at which a trial would have the values of another study's trial."""

from typing import Any

import pytest

from sweeps.space.space import Point, Space
from sweeps.study.matching import Matching, Unmatched
from sweeps.study.result_values import ConfigValues, Values

SPACE = Space.parse(
    {
        "size": "tag(variants, choice({small: {lora.r: 4}, large: {lora.r: 64, lora.alpha: 64}}))",
        "optimizer": "choice(adamw, lion)",
        "optimizer.schedule": "choice(linear, constant)",
        "optimizer.warmup": "tag('optimizer.schedule=linear', interval(0.0, 0.5))",
    },
    [],
)
SHARED = {"objective": "eval/loss", "dataset_fingerprint": "abc", "trainer.steps": 60}
OWN = {
    "trainer.steps": 60,
    "lora.r": 8,
    "lora.alpha": 16,
    "optimizer.name": "adamw_torch",
    "optimizer.decay": 0.0,
    "optimizer.schedule": "linear",
    "optimizer.warmup": 0.1,
}
SETS = {
    "size": {
        # What a variant leaves out has the config's own value.
        "small": {"lora.r": 4, "lora.alpha": 16},
        "large": {"lora.r": 64, "lora.alpha": 64},
    },
    "optimizer": {
        "adamw": {"optimizer.name": "adamw_torch", "optimizer.decay": 0.0},
        "lion": {"optimizer.name": "lion", "optimizer.decay": 0.1},
    },
}
SMALL: dict[str, Any] = {**SHARED, **OWN, "lora.r": 4}
CONSTANT = {"optimizer.schedule": "constant"}


def point(values: Values, at: Any = None, space: Space = SPACE) -> Point:
    return Matching(space, SHARED, ConfigValues(OWN, SETS, at)).point(
        values, {"lora.r"}
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"size": "small", "optimizer": "adamw", "optimizer.warmup": 0.1}),
        (
            {"lora.r": 64, "lora.alpha": 64},
            {"size": "large", "optimizer": "adamw", "optimizer.warmup": 0.1},
        ),
        (
            {"optimizer.name": "lion", "optimizer.decay": 0.1},
            {"size": "small", "optimizer": "lion", "optimizer.warmup": 0.1},
        ),
        # Without the condition, the key has the config's own value.
        (CONSTANT, {"size": "small", "optimizer": "adamw", **CONSTANT}),
    ],
)
def test_a_point_means_all_values_of_a_trial(changes: Values, expected: Point) -> None:
    assert point({**SMALL, **changes}) == {"optimizer.schedule": "linear", **expected}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset_fingerprint": "b", "trainer.steps": 9}, "other rows"),
        ({"trainer.steps": 9}, "trainer.steps=9 instead of 60"),
        ({"trainer.new": 1}, "trainer.new=1 instead of none"),
        ({"lora.r": 8}, "size: no choice has its values"),
        ({"lora.alpha": 64}, "size: no choice has its values"),
        ({"optimizer.name": "lion"}, "optimizer: no choice has its values"),
        ({"optimizer.warmup": 0.9}, "optimizer.warmup outside interval(0.0, 0.5)"),
        # The condition is not met, and the value is not the config's.
        (
            {**CONSTANT, "optimizer.warmup": 0.2},
            "optimizer.warmup=0.2 instead of 0.1",
        ),
    ],
)
def test_a_trial_with_any_other_value_has_no_point(
    changes: Values, reason: str
) -> None:
    with pytest.raises(Unmatched) as error:
        point({**SMALL, **changes})
    assert str(error.value) == reason


@pytest.mark.parametrize("key", ["trainer.steps", "lora.r", "optimizer.warmup"])
def test_a_trial_of_which_a_value_is_not_known_has_no_point(key: str) -> None:
    values = {name: value for name, value in SMALL.items() if name != key}
    with pytest.raises(Unmatched):
        point(values)


def test_what_the_trials_study_has_searched_is_named_without_its_value() -> None:
    """So that such trials are one entry of the line, and not one each."""
    narrow = Space.parse({"optimizer.schedule": "choice(linear, constant)"}, [])
    with pytest.raises(Unmatched, match=r"^lora\.r is not 8$"):
        point(SMALL, space=narrow)


def test_a_reference_has_its_value_at_the_point() -> None:
    """As `lora.alpha='${lora.r}'` beside a search of `lora.r`."""
    space = Space.parse({"lora.r": "choice(4, 8)"}, [])

    def at(chosen: Point) -> Values:
        return {**OWN, **chosen, "lora.alpha": chosen["lora.r"]}

    same = {**SMALL, "lora.r": 4, "lora.alpha": 4}
    assert point(same, at, space) == {"lora.r": 4}
    with pytest.raises(Unmatched, match=r"^lora\.alpha=16 instead of 4$"):
        point(SMALL, at, space)


def test_what_was_not_searched_or_lies_outside_is_left_to_the_sampler() -> None:
    matching = Matching(SPACE, SHARED, ConfigValues(OWN, SETS))
    keys = {"lora.r", "lora.alpha", "optimizer.schedule", "optimizer.warmup"}
    assert matching.partial_point(SMALL, keys) == {
        "size": "small",
        "optimizer.schedule": "linear",
        "optimizer.warmup": 0.1,
    }
    values = {**SMALL, **CONSTANT, "lora.r": 5}
    # The warmup would have no effect.
    assert matching.partial_point(values, keys) == CONSTANT
    assert matching.partial_point(values, {"lora.r"}) == {}
