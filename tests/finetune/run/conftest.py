"""Fixtures of runs that are evaluated on tasks of lm-evaluation-harness."""

from pathlib import Path
from typing import Any

import pytest
from support.benchmarks import short_overrides, write_tasks
from support.runs import Tiny


@pytest.fixture
def short(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Configs of short runs that are evaluated on tasks."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    overrides = short_overrides(tmp_path)

    def make(*more: str) -> Any:
        return tiny(*overrides, *more)

    return make
