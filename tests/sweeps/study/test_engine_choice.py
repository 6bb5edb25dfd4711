"""A study stores how its trials are trained."""

from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from sweeps.study.engine_choice import EngineChoice, decide_engine


@pytest.mark.parametrize(
    ("checkpointing", "override"),
    [
        ("partial", "trainer.gradient_checkpointing=partial"),
        # As studies of older versions have it.
        (True, "trainer.gradient_checkpointing=true"),
        (False, "trainer.gradient_checkpointing=false"),
    ],
)
def test_all_sessions_train_as_the_first_has_decided(
    tiny: Any, checkpointing: Any, override: str
) -> None:
    from sweeps.study.session import Session

    study: Any = SimpleNamespace(optuna=optuna.create_study())
    first = EngineChoice("packed", 2, checkpointing, borrows_blocks=True)
    assert decide_engine(study, first) == first
    assert decide_engine(study, EngineChoice("trl", 1)) == first
    session = SimpleNamespace(
        engine=decide_engine(study, first),
        space=SimpleNamespace(config_keys=[]),
        settings=SimpleNamespace(gpus_per_worker=1),
        common=tiny(),
    )
    composed = Session.common_overrides.fget(session)  # type: ignore[attr-defined]
    assert composed == ["trainer.engine=packed", override]
