"""How trials are called."""

from typing import Any

import pytest

from sweeps.study.formatting import TRIAL_NAME_LENGTH, trial_name


@pytest.mark.parametrize(
    ("number", "values", "name"),
    [
        (7, {"lora.r": 16, "optimizer.learning_rate": 2e-4}, "t07 r=16 learning_rate=0.0002"),
        (123, {"optimizer.learning_rate": 1.23456789e-5}, "t123 learning_rate=1.23457e-05"),
        (0, {}, "t00"),
        (1, {"a.size": 1, "b.size": 2, "c.rate": 0.5}, "t01 a.size=1 b.size=2 rate=0.5"),
        (2, {"lora/target": "q_v", "flag": True}, "t02 lora/target=q_v flag=True"),
    ],
)  # fmt: skip
def test_a_trial_is_named_by_what_differs(
    number: int, values: dict[str, Any], name: str
) -> None:
    assert trial_name(number, values) == name


def test_a_name_is_as_short_as_trackers_need_it() -> None:
    values = {f"section.key_{number}": number for number in range(50)}
    name = trial_name(3, values)
    assert TRIAL_NAME_LENGTH - 15 < len(name) <= TRIAL_NAME_LENGTH
    assert name.startswith("t03 key_0=0 key_1=1 ")
    assert name.endswith(" …")
