"""The sweeper as Hydra finds it, and the baseline of a searched limit."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from support.configs import compose
from support.studies import sweeper_config

from finetune.config.paths import CONF
from finetune.errors import ConfigError
from sweeps.study.draft import draft_session
from sweeps.study.session import Session


def test_hydra_finds_the_sweeper() -> None:
    assert "StudySweeper" in [
        sweeper.__name__ for sweeper in Plugins.instance().discover(Sweeper)
    ]


@pytest.mark.parametrize(
    ("searched", "overrides", "limit"),
    [
        ("dataset.limit=int(interval(100,300))", (), 240),
        ("dataset.limit=choice(100,240)", (), 240),
        ("dataset.limit=100,null", ("dataset.path=rows.jsonl",), "null"),
    ],
)
def test_the_baseline_of_a_searched_limit_has_the_number_that_auto_stands_for(
    searched: str, overrides: tuple[str, ...], limit: int | str
) -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import HydraContext

    config = sweeper_config("hydra.sweeper.study_name=s", "~search")
    with initialize_config_dir(str(CONF)):
        HydraConfig.instance().set_config(config)
        context = HydraContext(
            config_loader=GlobalHydra.instance().config_loader(),
            callbacks=cast(Any, None),
        )
        sweeper = cast(
            Any,
            Plugins.instance().instantiate_sweeper(
                hydra_context=context, task_function=lambda config: None, config=config
            ),
        )
        draft = draft_session(config, context, sweeper._values, [searched, *overrides])

    assert draft.points == [("baseline", {"dataset.limit": limit})]


def test_trials_share_their_sources_and_weights() -> None:
    config = compose("dataset.path=[a.jsonl,{path:b.jsonl,weight:2}]")
    session = cast(Any, SimpleNamespace(common=config))
    limited = dataclasses.replace(config.dataset, limit=5)
    assert Session.check(session, dataclasses.replace(config, dataset=limited))
    with pytest.raises(ConfigError, match=r"dataset\.path=.*measured on the same rows"):
        Session.check(
            session, compose("dataset.path=[a.jsonl,{path:b.jsonl,weight:3}]")
        )
