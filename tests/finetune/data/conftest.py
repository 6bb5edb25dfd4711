"""Fixtures of the data tests: settings of a data set, and the tiny base's tokenizer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from support.configs import compose
from support.models import load_tokenizer
from support.rows import Settings

from finetune.config.schema import RunConfig
from finetune.config.sections.dataset import DatasetSettings


@pytest.fixture(scope="module")
def _defaults() -> DatasetSettings:
    return compose("dataset.path=rows.jsonl").dataset


@pytest.fixture
def settings(_defaults: DatasetSettings) -> Settings:
    """The default data set settings with some changed, nothing held out."""

    def make(**changes: Any) -> DatasetSettings:
        return dataclasses.replace(
            _defaults, **{"eval_fraction": 0.0, "test_fraction": 0.0} | changes
        )

    return make


@pytest.fixture
def tokenizer(tiny: Callable[..., RunConfig]) -> Any:
    """The tiny base's tokenizer as a run loads it."""
    return load_tokenizer(tiny())
