"""Points that a user puts into a study by hand."""

import json
import sys
from pathlib import Path

import optuna
import pytest
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState, create_trial
from support.commands import SLOW_STEPS, Station, wait_until
from support.configs import study_overrides
from support.studies import settings_of
from support.study_folder import folder_of, trials_of

from finetune.errors import ConfigError
from sweeps.__main__ import main
from sweeps.compat import enqueued_point, waiting_trial
from sweeps.space.space import Space
from sweeps.study.claims import claim_trial
from sweeps.study.creation import create_or_resume
from sweeps.study.roles import role
from sweeps.study.storage import open_storage
from sweeps.study.study import Study
from sweeps.study.waiting import enqueue_trials

SPACE = Space.parse(
    {
        "lora.r": "choice(4,8,16)",
        "optimizer.learning_rate": "tag(log, interval(1e-4, 1e-2))",
        "lora.target_modules": "choice(all-linear,[q_proj])",
    },
    [],
)
POINT = {
    "lora.r": 8,
    "optimizer.learning_rate": 1e-3,
    "lora.target_modules": "all-linear",
}
WORDS = tuple(f"{name}={value}" for name, value in POINT.items())


def trial_at(state: TrialState, rank: int) -> FrozenTrial:
    value = 2.5 if state == TrialState.COMPLETE else None
    notes = {"error": "out of memory"} if state == TrialState.FAIL else {}
    return create_trial(
        state=state,
        params={**POINT, "lora.r": rank},
        distributions=SPACE.distributions,
        value=value,
        user_attrs=notes,
    )


def searched(
    cwd: Path, *trials: FrozenTrial, total: int = 4, is_database: bool = False
) -> Study:
    """Write a study of four trials, some of which are made already."""
    folder = folder_of(cwd)
    folder.mkdir(parents=True)
    address = f"sqlite:///{cwd / 'studies.db'}" if is_database else None
    storage = open_storage(address, folder)
    if is_database:
        # Ids differ from numbers where a database has several studies.
        optuna.create_study(study_name="other", storage=storage).ask()
    study = optuna.create_study(study_name="s", storage=storage)
    study.set_user_attr("uid", "made")
    terms: dict[str, object] = {"objective": "eval/loss"}
    for name, distribution in SPACE.distributions.items():
        terms[f"space.{name}"] = json.loads(distribution_to_json(distribution))
    study.set_user_attr("terms", terms)
    study.add_trials(trials)
    (folder / "study.json").write_text(json.dumps({"name": "s", "storage": address}))
    opened = Study.load(folder)
    enqueue_trials(opened, total, [])
    return opened


def sweeps(monkeypatch: pytest.MonkeyPatch, cwd: Path, *arguments: str) -> None:
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["sweeps", *arguments])
    main()


def claimed(study: Study) -> list[int]:
    """Claim all trials that wait, in order."""
    numbers = []
    while True:
        with claim_trial(study) as claim:
            if claim is None:
                return numbers
            numbers.append(claim.number)
            study.optuna.tell(study.optuna.trials[claim.number].number, 1.0)


@pytest.mark.parametrize("is_database", [False, True], ids=["journal", "database"])
def test_an_added_point_comes_on_top_and_begins_next(
    is_database: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    complete = trial_at(TrialState.COMPLETE, 8)
    study = searched(tmp_path, complete, is_database=is_database)
    sweeps(monkeypatch, tmp_path, "add", "s", "lora.r=4")
    sweeps(monkeypatch, tmp_path, "clone", "s", "0", "lora.target_modules=[q_proj]")

    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "trial 4 of s: lora.r=4; the sampler chooses optimizer.learning_rate, "
        "lora.target_modules; trains when the study's command is run again"
    )
    assert second.startswith("trial 5 of s: lora.r=8 optimizer.learning_rate=0.001 ")
    added = Study.load(study.folder).trials()[4:]
    assert [trial.system_attrs["fixed_params"] for trial in added] == [
        {"lora.r": 4},
        {**POINT, "lora.target_modules": "[q_proj]"},
    ]
    assert study.total == 6
    # The same command again, and one with a trial more: the added ones are not counted.
    for total in (4, 5):
        enqueue_trials(study, total, [])
        assert (study.total, len(study.trials())) == (total + 2, total + 2)
    # A smaller number than was planned first leaves the last planned trial, and no added one.
    enqueue_trials(study, 3, [])
    assert claimed(study) == [4, 5, 1, 2]


def test_an_added_point_is_trained_by_a_study_that_has_ended_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = searched(tmp_path, trial_at(TrialState.COMPLETE, 8))
    study.end("enough")
    sweeps(monkeypatch, tmp_path, "add", "s", "lora.r=4")
    assert claimed(study) == [4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lora.r=5",), "add: lora.r=5 lies outside choice(4, 8, 16)"),
        (("optimizer.learning_rate=1",), "add: optimizer.learning_rate=1 lies outside"),
        (
            ("optimizer.learning_rate=x",),
            "optimizer.learning_rate=x lies outside tag(log, interval(0.0001",
        ),
        (("lora.rank=8",), "lora.rank: is not searched; did you mean lora.r? allowed"),
        (("seed=8",), "seed: is not searched; allowed: lora.r, lora.target_modules"),
        (("lora.r=4,8",), "lora.r=4,8: must be one value"),
        (("lora.r=choice(4,8)",), "lora.r=choice(4,8): must be one value"),
        (("~lora.r=4",), "~lora.r=4: must be one value"),
        (("8",), "add=8: must be KEY=VALUE"),
        (("lora.r=[4",), "lora.r=[4: is not Hydra's syntax"),
        (
            WORDS,
            "trial 0 has this point already (complete, eval/loss 2.5000): not added",
        ),
        (
            ("lora.r=16", *WORDS[1:]),
            "trial 1 has this point already (running): not added",
        ),
        ((), "the following arguments are required: KEY=VALUE"),
    ],
)
def test_a_point_that_can_not_be_added_is_refused_in_one_line(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = searched(
        tmp_path, trial_at(TrialState.COMPLETE, 8), trial_at(TrialState.RUNNING, 16)
    )
    with pytest.raises(SystemExit) as ended:
        sweeps(monkeypatch, tmp_path, "add", "s", *words)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert len(study.trials()) == 4


def test_a_point_that_takes_the_number_of_a_planned_trial_costs_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database refuses a number that another machine has taken meanwhile."""
    study = searched(tmp_path, total=1, is_database=True)
    other_machine = Study.load(study.folder)
    add_waiting_trials = study.add_waiting_trials
    points = iter([POINT])

    def add_later(numbers: range) -> None:
        for point in points:
            other_machine.add_trial(waiting_trial(point, role="added"))
        add_waiting_trials(numbers)

    monkeypatch.setattr(study, "add_waiting_trials", add_later)
    enqueue_trials(study, 4, [])
    roles = [trial.user_attrs.get("role") for trial in study.trials()]
    assert roles == [None, "added", None, None, None]
    assert study.total == 5


@pytest.mark.parametrize("reading", range(4))
def test_two_machines_that_begin_a_study_together_plan_its_trials_once(
    reading: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = searched(tmp_path, total=0, is_database=True)
    other_machine = Study.load(study.folder)
    readings = iter(range(100))
    read = study.trials

    def trials_before(*states: TrialState) -> list[FrozenTrial]:
        """What there is; the other machine plans the study right after one of the readings."""
        result = read(*states)
        if next(readings) == reading:
            other_machine.add_waiting_trials(range(4))
        return result

    monkeypatch.setattr(study, "trials", trials_before)

    enqueue_trials(study, 4, [])

    assert [trial.number for trial in read()] == [0, 1, 2, 3]


def test_a_failed_trial_may_be_cloned_as_it_is_and_an_unchosen_point_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study = searched(tmp_path, trial_at(TrialState.FAIL, 8))
    sweeps(monkeypatch, tmp_path, "clone", "s", "0", "lora.r=8")
    assert study.total == 5
    for number, message in (("1", "has no point yet"), ("9", "allowed: 0 to 4")):
        with pytest.raises(SystemExit):
            sweeps(monkeypatch, tmp_path, "clone", "s", number, "lora.r=8")
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "open_names"),
    [
        (["kind=constant"], None),
        (["kind=cosine"], "warmup, depth"),
        (["warmup=0.05"], "kind, depth"),
        (["kind=cosine", "warmup=0.05"], "depth"),
    ],
)
def test_the_sampler_is_said_to_choose_only_what_is_searched_at_the_point(
    words: list[str],
    open_names: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where a condition depends on a parameter that has one."""
    space = Space.parse(
        {
            "kind": "choice(cosine, constant)",
            "warmup": 'tag("kind=cosine", choice(0.05, 0.1))',
            "depth": 'tag("warmup=0.05", interval(0, 1))',
        },
        [],
    )
    study = searched(tmp_path)
    terms = {f"space.{name}": plain for name, plain in space.to_dict().items()}
    study.optuna.set_user_attr("terms", {"objective": "eval/loss", **terms})
    sweeps(monkeypatch, tmp_path, "add", "s", *words)
    line = capsys.readouterr().out
    if open_names is None:
        assert "the sampler chooses" not in line
    else:
        assert f"; the sampler chooses {open_names}; trains" in line


def test_values_of_which_every_point_is_tried_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The study would be full, and never train it."""
    space = Space.parse({"r": "choice(2,4)", "alpha": "choice(4,8)"}, [])
    trials = []
    for r, alpha in ((2, 4), (2, 8), (4, 8)):
        point = {"r": r, "alpha": alpha}
        trial = create_trial(params=point, distributions=space.distributions, value=1.0)
        trials.append(trial)
    study = searched(tmp_path, *trials, total=3)
    terms = {f"space.{name}": plain for name, plain in space.to_dict().items()}
    study.optuna.set_user_attr("terms", {"objective": "eval/loss", **terms})
    with pytest.raises(SystemExit):
        sweeps(monkeypatch, tmp_path, "add", "s", "r=2")
    assert "r=2: every point with it is tried already" in capsys.readouterr().err
    sweeps(monkeypatch, tmp_path, "add", "s", "r=4")
    assert study.added_count == 1


def test_a_clone_of_the_baseline_outside_says_what_to_set(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    baseline = trial_at(TrialState.COMPLETE, 8)
    del baseline.params["lora.r"], baseline._distributions["lora.r"]
    baseline.set_user_attr("outside", {"lora.r": 64})
    study = searched(tmp_path, baseline)
    change = "lora.target_modules=[q_proj]"
    with pytest.raises(SystemExit):
        sweeps(monkeypatch, tmp_path, "clone", "s", "0", change)
    assert capsys.readouterr().err == (
        "error: clone: trial 0 lies outside the space (lora.r=64); "
        "give lora.r=VALUE from choice(4, 8, 16)\n"
    )
    sweeps(monkeypatch, tmp_path, "clone", "s", "0", change, "lora.r=4")
    assert study.trials()[-1].system_attrs["fixed_params"]["lora.r"] == 4


def test_a_clone_of_a_baseline_that_has_no_variant_takes_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = "tag(variants, choice({small: {r: 4, alpha: 4}, large: {r: 8, alpha: 8}}))"
    space = Space.parse({"size": sizes, "depth": "choice(1,2)"}, [])
    baseline = create_trial(
        params={"depth": 1},
        distributions={"depth": space.distributions["depth"]},
        user_attrs={"outside": {"r": 64, "alpha": 16}},
        value=1.0,
    )
    study = searched(tmp_path, baseline)
    terms = {f"space.{name}": plain for name, plain in space.to_dict().items()}
    study.optuna.set_user_attr("terms", {"objective": "eval/loss", **terms})
    with pytest.raises(SystemExit):
        sweeps(monkeypatch, tmp_path, "clone", "s", "0", "depth=2")
    assert "give size=VALUE from choice(small, large)" in capsys.readouterr().err
    sweeps(monkeypatch, tmp_path, "clone", "s", "0", "size=small")
    point = study.trials()[-1].system_attrs["fixed_params"]
    assert point == {"depth": 1, "size": "small"}


def changed_space(study: Study, params: dict[str, str]) -> None:
    """Resume a study with another space, by `hydra.sweeper.allow_change`."""
    space = Space.parse(params, [])
    settings = settings_of("hydra.sweeper.allow_change=true")
    terms = {f"space.{name}": plain for name, plain in space.to_dict().items()}
    terms["objective"] = "eval/loss"
    create_or_resume(study.folder, settings, None, terms, space.distributions)


RATE = {"optimizer.learning_rate": "tag(log, interval(1e-4, 1e-2))"}


@pytest.mark.parametrize(
    "params",
    [
        RATE,
        {"lora.r": "tag('lora.alpha=8', choice(4,8,16))", "lora.alpha": "choice(8,16)"},
    ],
    ids=["removed", "under a condition"],
)
def test_a_space_without_an_added_value_is_refused(
    params: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial would train without the value that its user gave it."""
    study = searched(tmp_path)
    study.add_trial(waiting_trial({"lora.r": 4, "lora.alpha": 16}, role="added"))
    with_alpha = {"lora.r": "choice(4,8,16)", "lora.alpha": "choice(8,16)"}
    changed_space(study, with_alpha)
    message = "lora.r: trial 4 of study s was added with lora.r=4 and waits, and the new space"
    with pytest.raises(ConfigError, match=message):
        changed_space(study, params)
    # Once it is trained, the space is free to change.
    claimed(study)
    changed_space(study, params)


def test_a_planned_trial_loses_a_point_that_the_changed_space_has_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = searched(tmp_path)
    points = [
        ("start", {"lora.r": 4, "optimizer.learning_rate": 1e-3}),
        ("start", {"optimizer.learning_rate": 1e-2}),
    ]
    enqueue_trials(study, 4, points)
    with caplog.at_level("INFO"):
        changed_space(study, RATE)
    assert caplog.messages == [
        "trial 0: its point is dropped (start), as it has lora.r, which is not searched any more"
    ]
    first, second = study.trials()[:2]
    assert (role(first), enqueued_point(first)) == ("", None)
    assert (role(second), enqueued_point(second)) == ("start", points[1][1])
    # Its place is free for a point of this session.
    enqueue_trials(study, 4, [("start", {"optimizer.learning_rate": 2e-3})])
    assert enqueued_point(study.trials()[0]) == {"optimizer.learning_rate": 2e-3}


def test_a_point_added_to_a_running_study_is_trained_in_it(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    study = [*study_overrides(tiny_base, "s"), "hydra.sweeper.n_trials=2"]
    process = station.start(*study, cwd=tmp_path, before=SLOW_STEPS)
    wait_until(
        lambda: (folder_of(tmp_path) / "trials" / "0" / "metrics.jsonl").exists(),
        process,
    )
    added = station.run("add", "s", "lora.r=4", module="sweeps", cwd=tmp_path)
    assert added.returncode == 0, added.stderr
    assert "trial 2 of s: lora.r=4" in added.stdout
    assert "trains in the next free slot" in added.stdout
    ended = process.wait()
    assert ended.returncode == 0, ended.stderr
    trials = trials_of(tmp_path)
    assert [trial.state.is_finished() for trial in trials] == [True] * 3
    assert trials[2].params["lora.r"] == 4
    again = station.run(*study, cwd=tmp_path)
    assert (
        "study s is full (3 trials): hydra.sweeper.n_trials=4 goes on" in again.stderr
    )
    assert len(trials_of(tmp_path)) == 3
