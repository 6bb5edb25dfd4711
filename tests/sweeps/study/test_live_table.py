"""The live table's lines."""

import time
from pathlib import Path

from optuna.trial import TrialState
from rich.console import Console
from support.studies import settings_of

from sweeps.space.space import Space
from sweeps.study.creation import create_or_resume
from sweeps.study.live_table import LiveTable
from sweeps.study.waiting import enqueue_trials


def test_shows_what_runs_and_the_time_left_only_where_something_is_left(
    tmp_path: Path,
) -> None:
    distributions = Space.parse({"lora.r": "choice(4,8)"}, []).distributions
    study = create_or_resume(
        tmp_path / "s", settings_of(), None, {"objective": "eval/loss"}, distributions
    )
    enqueue_trials(study, 2, [("start", {"lora.r": 4})])
    view = LiveTable(study)
    view._began = time.monotonic() - 60

    def shown() -> str:
        console = Console(width=120)
        with console.capture() as captured:
            console.print(view.draw())
        return captured.get()

    trial = study.optuna.ask(distributions)
    folder = study.folder_of(0).path
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        '{"step": 7, "train/loss": 2.5, "train/tokens_per_second": 99.6}\n{"st'
    )
    trial.set_user_attr("steps", 20)
    trial.report(2.25, 1)
    head, row, line = (text.split() for text in shown().splitlines())
    assert head == [
        "trial",
        "parameters",
        "step",
        "eval/loss",
        "train/loss",
        "tokens/s",
    ]
    assert row == ["0", "r=4", "7/20", "2.2500", "2.5000", "100"]
    assert " ".join(line) == "0 of 2 done (0 pruned, 0 failed)"
    study.optuna.tell(trial, 2.0)
    assert (
        shown().splitlines()[-1].rstrip()
        == "1 of 2 done (0 pruned, 0 failed) · best 2.0000 (trial 0) · about 60 s left"
    )
    study.optuna.tell(study.optuna.ask(distributions), state=TrialState.FAIL)
    assert (
        shown().splitlines()[-1].rstrip()
        == "2 of 2 done (0 pruned, 1 failed) · best 2.0000 (trial 0)"
    )
