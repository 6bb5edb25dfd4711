"""What a study stores when it begins, and when it is resumed."""

import warnings
from pathlib import Path

import pytest
from support.studies import made_study, settings_of

from sweeps.study.creation import create_or_resume
from sweeps.study.study import Study


@pytest.mark.parametrize(
    ("objectives", "overrides"),
    [
        ("eval/loss", ()),
        (
            ["eval/loss", "adapter/parameters"],
            ("hydra.sweeper.direction=[minimize,minimize]",),
        ),
    ],
    ids=["one", "two"],
)
@pytest.mark.parametrize("is_older", [False, True], ids=["new", "from before"])
def test_a_study_names_its_metrics_for_optunas_tools(
    objectives: str | list[str],
    overrides: tuple[str, ...],
    is_older: bool,
    tmp_path: Path,
) -> None:
    names = [objectives] if isinstance(objectives, str) else objectives
    folder = tmp_path / "s"
    if is_older:
        # As studies were created before their metrics were named.
        made_study(folder, [], *names)
        assert Study.load(folder).optuna.metric_names is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            settings = settings_of(*overrides)
            create_or_resume(folder, settings, None, {"objective": objectives}, {})

    assert Study.load(folder).optuna.metric_names == names
