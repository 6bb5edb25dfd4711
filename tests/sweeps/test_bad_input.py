"""A study that can't be is refused in one line that names the key, the value and what is allowed,
before torch loads.

Every case is a whole command in a process of its own. Expected lines are written with … for any
text.
"""

from pathlib import Path

import pytest
from optuna.trial import create_trial
from support.bad_input import Case, Outcome, Workplace, each, matches
from support.commands import Station
from support.matrix import fixed_part
from support.studies import made_study

PASSWORD = "hunter2horse"
BY_STUDY = "can't be searched: all trials of a study are evaluated by the same objective on the same rows"


def search(
    workplace: Workplace, *arguments: str, name: str = "hydra.sweeper.study_name=s"
) -> Outcome:
    """A study's command."""
    return workplace.call(
        "-m", "hydra/sweeper=optuna", *([name] if name else []), *arguments
    )


SETTINGS = [
    Case(
        "no-trials",
        "hydra.sweeper.n_trials=0",
        "hydra.sweeper.n_trials=0: must be at least 1, or null",
    ),
    Case(
        "trials-text",
        "hydra.sweeper.n_trials=many",
        "hydra.sweeper.n_trials=many: must be a whole number or null",
    ),
    Case(
        "several-numbers-of-trials",
        "n_trials=1,2",
        "hydra.sweeper.n_trials=1,2: must be one value for all runs of a sweep, as "
        "hydra.sweeper.n_trials=1",
    ),
    Case(
        "several-samplers",
        "hydra/sweeper/sampler=choice(tpe,gp)",
        "hydra/sweeper/sampler=choice(tpe,gp): must be one value for all runs of a sweep, as "
        "hydra/sweeper/sampler=tpe",
    ),
    Case(
        "no-workers",
        "hydra.sweeper.n_jobs=0",
        "hydra.sweeper.n_jobs=0: must be at least 1, or null: …GPU",
    ),
    Case(
        "direction",
        "hydra.sweeper.direction=up",
        "hydra.sweeper.direction=up: must be auto or one of minimize, maximize or a list…",
    ),
    Case(
        "directions-none",
        "hydra.sweeper.direction=[]",
        "hydra.sweeper.direction=[]: must be auto, minimize or maximize…",
    ),
    Case(
        "directions-too-many",
        "hydra.sweeper.direction=[minimize,minimize]",
        "hydra.sweeper.direction=[…minimize…]: must be one for each objective (1: eval/loss)",
    ),
    Case(
        "directions-too-few",
        "objective=[eval/loss,adapter/parameters] hydra.sweeper.direction=minimize",
        "hydra.sweeper.direction=minimize: must be one for each objective (2: eval/loss, adapter/parameters)",
    ),
    Case(
        "no-held-out-rows",
        "dataset.eval_fraction=0",
        "objective=eval/loss: …dataset.eval_fraction above 0, or …",
    ),
    Case(
        "storage",
        "hydra.sweeper.storage=foo",
        "hydra.sweeper.storage=foo: must be null (…) or …postgresql+psycopg2://user@host/…",
    ),
    Case(
        "sqlite-with-workers",
        "hydra.sweeper.storage=sqlite:///x.db hydra.sweeper.n_jobs=2",
        "hydra.sweeper.storage=sqlite:///x.db: …2 workers; use null (a journal file) or PostgreSQL",
    ),
    Case(
        "failure-rate",
        "hydra.sweeper.max_failure_rate=2",
        "hydra.sweeper.max_failure_rate=2…: …from 0 to 1",
    ),
    Case(
        "timeout",
        "hydra.sweeper.timeout=0",
        "hydra.sweeper.timeout=0…: must be above 0 seconds, or null",
    ),
    Case(
        "stop-when",
        "hydra.sweeper.stop_when=soon",
        "hydra.sweeper.stop_when=soon: …no_gain…",
    ),
    Case(
        "stop-when-of-two",
        "objective=[eval/loss,adapter/parameters] hydra.sweeper.direction=[minimize,minimize] "
        "hydra.sweeper.stop_when=no_gain",
        "hydra.sweeper.stop_when=no_gain: needs one objective; null: none",
    ),
    Case(
        "stop-when-of-two-found",
        "objective=[eval/loss,adapter/parameters] hydra.sweeper.stop_when=no_gain",
        "hydra.sweeper.stop_when=no_gain: needs one objective; null: none",
    ),
    Case(
        "stop-when-of-a-grid",
        "hydra/sweeper/sampler=grid hydra.sweeper.stop_when=no_gain",
        "hydra.sweeper.stop_when=no_gain: a grid tries every point; null: none",
    ),
    Case(
        "tokens",
        "hydra.sweeper.max_tokens=0",
        "hydra.sweeper.max_tokens=0: must be above 0 tokens, or null",
    ),
    Case(
        "constraint-form",
        "hydra.sweeper.constraints=[adapter/parameters]",
        "hydra.sweeper.constraints=adapter/parameters: must be NAME <= NUMBER, or with >=, < or >",
    ),
    Case(
        "constraint-name",
        "hydra.sweeper.constraints=['adapter/parameter<=5']",
        "hydra.sweeper.constraints=adapter/parameter<=5: did you mean adapter/parameters?…peak_memory_bytes…",
    ),
    Case(
        "constraint-on-what-is-not-computed",
        "hydra.sweeper.constraints=['eval/bits_per_byte<=5']",
        "hydra.sweeper.constraints=eval/bits_per_byte<=5: is computed only where it is an objective: "
        "objective=eval/bits_per_byte",
    ),
    Case(
        "no-end",
        "hydra.sweeper.n_trials=null",
        "hydra.sweeper.n_trials=null: needs a budget: "
        "hydra.sweeper.timeout or hydra.sweeper.max_tokens",
    ),
    Case(
        "all-may-fail",
        "hydra.sweeper.n_trials=null hydra.sweeper.timeout=9 hydra.sweeper.max_failure_rate=1",
        "hydra.sweeper.max_failure_rate=1…: must be below 1 with hydra.sweeper.n_trials=null",
    ),
    Case(
        "adapters",
        "hydra.sweeper.keep_adapters=0",
        "hydra.sweeper.keep_adapters=0: must be at least 1",
    ),
    Case(
        "baseline",
        "hydra.sweeper.baseline=maybe",
        "hydra.sweeper.baseline=maybe: must be true or false",
    ),
    Case(
        "sampler",
        "hydra/sweeper/sampler=tpee",
        "hydra/sweeper/sampler=tpee: …did you mean tpe…allowed: cmaes, gp, …",
    ),
    Case(
        "pruner",
        "hydra/sweeper/pruner=medan",
        "hydra/sweeper/pruner=medan: …did you mean median? allowed: hyper…",
    ),
    Case(
        "pruner-null",
        "hydra.sweeper.pruner=null",
        "hydra.sweeper.pruner=null: is chosen by its group, as hydra/sweeper/pruner=none",
    ),
    Case(
        "sampler-name",
        "hydra.sweeper.sampler=gp",
        "hydra.sweeper.sampler=gp: is chosen by its group, as hydra/sweeper/sampler=tpe",
    ),
    Case(
        "start-null",
        "hydra.sweeper.start=null",
        "hydra.sweeper.start=null: must be a list of points, as [{lora.r: 8}]",
    ),
    Case(
        "search",
        "search=nope",
        "search=nope: no such choice; …allowed: lora, lora_rate, lora_targets, schedule",
    ),
    Case("job-config", "lora.alpha=0", "lora.alpha=0…: must be above 0"),
]

SPACE = [
    Case(
        "start-text",
        "hydra.sweeper.start=7",
        "hydra.sweeper.start=7: must be a list of points, as [{lora.r: 8}]",
    ),
    Case(
        "start-unknown",
        "hydra.sweeper.start=[{lora.nope:8}]",
        "hydra.sweeper.start: lora.nope is not searched; allowed: lora.r, lora.alpha, …",
    ),
    Case(
        "start-outside",
        "hydra.sweeper.start=[{lora.dropout:0.9}]",
        "hydra.sweeper.start: lora.dropout=0.9 lies outside interval(0.0, 0.15)",
    ),
    Case(
        "rows-length",
        "dataset.max_length=choice(128,256)",
        f"dataset.max_length: {BY_STUDY}",
    ),
    Case(
        "rows", "dataset=choice(python_docs,guanaco_llama2_1k)", f"dataset: {BY_STUDY}"
    ),
    Case(
        "objective",
        "objective=choice(eval/loss,eval/accuracy)",
        f"objective: {BY_STUDY}",
    ),
    Case(
        "condition-on-nothing",
        "lora.bias=tag('lora.nope=1',choice(all,none))",
        "lora.bias: when lora.nope: is not searched; allowed: lora.r, …",
    ),
    Case(
        "variants-of-a-searched-key",
        "size=tag(variants,choice({a:{lora.r:4},b:{lora.r:8}}))",
        "lora.r: is searched by both lora.r and size",
    ),
    Case("objective-at", "objective_at=choice(last,best)", f"objective_at: {BY_STUDY}"),
    Case("name", "name=a,b", f"name: {BY_STUDY}"),
    Case("step-zero", "lora.r=range(1,4,0)", "lora.r=range(1,4,0): …nonzero step…"),
    Case(
        "interval-backwards",
        "lora.dropout=interval(0.2,0.1)",
        "lora.dropout=interval(0.2,0.1): …low <= high…",
    ),
    Case("no-choice", "lora.r=choice()", "lora.r=choice(): empty choice is not legal"),
    Case("glob-of-nothing", "lora/target=glob(z*)", "lora/target=glob(z*): …"),
    Case(
        "smooth-grid",
        "hydra/sweeper/sampler=grid",
        "lora.dropout, optimizer.learning_rate: a grid needs a choice or a range with a step",
    ),
]


@pytest.mark.slow
@each([*SETTINGS, *SPACE])
def test_a_study_that_cant_be_is_one_line_and_leaves_nothing(
    case: Case, workplace: Workplace
) -> None:
    outcome = search(workplace, *case.arguments.split())

    assert matches(case.says, outcome.error), outcome.error
    assert outcome.stdout == ""
    assert workplace.files() == set()
    assert not outcome.torch_imported


@pytest.mark.parametrize("name", ["a/b", "", ".."])
def test_a_study_name_is_no_path(name: str, workplace: Workplace) -> None:
    """Nor is it empty, as with a shell variable that is not set: it would be all studies' folder."""
    outcome = search(workplace, name=f"study={name}")

    assert (
        outcome.error
        == f"hydra.sweeper.study_name={name}: names a folder: letters, digits, '.', '_' and '-' only"
    )
    assert workplace.files() == set()


def test_a_space_in_a_file_of_ones_own_is_refused_by_its_text(
    workplace: Workplace,
) -> None:
    workplace.write({"my/search/own.yaml": "params:\n  lora.r: choice(4, 8\n"})
    outcome = search(workplace, "--config-dir", "my", "search=own")

    assert outcome.error.startswith("lora.r=choice(4, 8: ")
    assert not outcome.torch_imported


ADDRESSES = [
    f"postgresql://me:{PASSWORD}@127.0.0.1:1/x",
    f"sqlite://me:{PASSWORD}@/x.db",
    f"nosuchdb://me:{PASSWORD}@127.0.0.1/x",
    f"me:{PASSWORD}@host",
    f"postgresql+psycopg2://127.0.0.1:1/x?user=me&password={PASSWORD}",
    f"postgresql+psycopg2://me:a/{PASSWORD}@127.0.0.1:1/x",
    f"postgresql+psycopg2://me:a@{PASSWORD}@127.0.0.1:1/x",
    f"postgresql+psycopg2://me:{PASSWORD},b@127.0.0.1:1/x",
    f"postgresql+psycopg2://me:{PASSWORD}",
]


@pytest.mark.parametrize(
    ("address", "mode"),
    [
        *((address, "-m") for address in ADDRESSES),
        *fixed_part([(address, "") for address in ADDRESSES], lambda case: "a run"),
    ],
)
def test_a_databases_password_reaches_neither_a_file_nor_the_screen(
    mode: str, address: str, workplace: Workplace
) -> None:
    outcome = workplace.call(
        *mode.split(), "hydra/sweeper=optuna", f"hydra.sweeper.storage={address}"
    )

    assert outcome.error.startswith("hydra.sweeper.storage: ")
    assert PASSWORD not in outcome.stderr + outcome.stdout
    assert workplace.files() == set()
    assert not outcome.torch_imported


@pytest.mark.parametrize("mode", ["-m", ""])
def test_a_databases_password_in_a_file_is_refused(
    mode: str, workplace: Workplace
) -> None:
    address = f"postgresql+psycopg2://127.0.0.1:1/x?user=me&password={PASSWORD}"
    heading = "# @package _global_\ndefaults:\n  - override /hydra/sweeper: optuna\n"
    own = f"{heading}hydra:\n  sweeper:\n    storage: {address}\n"
    workplace.write({"my/experiment/own.yaml": own})
    outcome = workplace.call(*mode.split(), "--config-dir", "my", "experiment=own")

    assert outcome.error.startswith(
        "hydra.sweeper.storage: a password in an address would be written to files"
    )
    assert PASSWORD not in outcome.stderr + outcome.stdout
    assert {
        name for name in workplace.files() if not str(name).startswith("my")
    } == set()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (
            f"postgresql+psycopg2://me:a@{PASSWORD}@127.0.0.1/x",
            "…the address has an @ too many…%40",
        ),
        (
            f"nosuchdb://me:{PASSWORD}@127.0.0.1/x",
            "…nosuchdb is no database; allowed: postgresql, mysql, sqlite",
        ),
    ],
)
def test_an_address_from_the_environment_shows_no_password(
    address: str, says: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDY_DATABASE", address)
    outcome = search(workplace, "hydra.sweeper.storage=${oc.env:STUDY_DATABASE}")

    assert matches(says, outcome.error), outcome.error
    assert PASSWORD not in outcome.stderr + outcome.stdout
    for name in workplace.files():
        path = workplace.cwd / name
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "arguments", ["search=lora_rate", "-m search=lora_rate", "-m search=lora,schedule"]
)
def test_a_search_space_without_the_sweeper_says_how_to_search(
    arguments: str, workplace: Workplace
) -> None:
    outcome = workplace.call(*arguments.split())

    assert matches(
        "…search=lora…: only the Optuna sweeper searches: …-m hydra/sweeper=optuna",
        outcome.error,
    )
    assert not outcome.torch_imported
    assert workplace.files() == set()


def test_a_sweepers_mistyped_key_is_answered_by_the_nearest(
    workplace: Workplace,
) -> None:
    outcome = search(workplace, "hydra.sweeper.n_trial=3")

    assert outcome.error.startswith(
        "hydra.sweeper.n_trial: no such key; did you mean n_trials"
    )
    assert not outcome.torch_imported


def test_a_measure_that_rises_is_not_minimised(workplace: Workplace) -> None:
    outcome = search(
        workplace, "objective=eval/accuracy", "hydra.sweeper.direction=minimize"
    )

    said = "hydra.sweeper.direction=minimize: eval/accuracy is better the larger it is: maximize"
    assert outcome.error == said
    assert workplace.files() == set()


def test_a_search_of_nothing_is_refused(workplace: Workplace) -> None:
    outcome = search(workplace, "~search")

    assert outcome.error.startswith("nothing is searched: give search=lora")
    assert workplace.files() == set()


def test_a_study_without_a_name_is_checked_as_any_other(workplace: Workplace) -> None:
    outcome = search(workplace, "hydra.sweeper.n_trials=0", name="")

    assert outcome.error == "hydra.sweeper.n_trials=0: must be at least 1, or null"
    assert workplace.files() == set()


BEFORE_IT_BEGINS = [
    Case(
        "unknown-parameter",
        "lora.alhpa=choice(8,16)",
        "lora.alhpa: no such key; did you mean alpha…",
    ),
    Case(
        "value-of-another-type",
        "lora.r=interval(4,64)",
        "lora.r=…: must be a whole number",
    ),
    Case(
        "value-not-allowed",
        "lora.dropout=choice(0.1,1.5)",
        "lora.dropout=1.5: must be at least 0 and below 1",
    ),
    Case(
        "no-such-group-choice",
        "lora/target=choice(q_v,qv)",
        "lora/target=qv: no such choice; did you mean q_v?…",
    ),
    Case(
        "custom-space",
        "hydra.sweeper.custom_search_space=nowhere.f",
        "hydra.sweeper.custom_search_space=nowhere.f…",
    ),
    Case(
        "sampler-removed", "hydra/sweeper/sampler=motpe", "…hydra/sweeper/sampler…tpe…"
    ),
    Case(
        "sampler-seed",
        "hydra.sweeper.sampler.seed=abc",
        "hydra.sweeper.sampler.seed=abc…",
    ),
    Case(
        "sampler-target",
        "hydra.sweeper.sampler._target_=os.system",
        "hydra.sweeper.sampler…os.system…",
    ),
    Case(
        "pruner-key",
        "hydra.sweeper.pruner.reduction_factor=0",
        "hydra.sweeper.pruner…reduction_factor…",
    ),
    Case(
        "pruner-survivors",
        "hydra.sweeper.pruner.min_survivors=0",
        "hydra.sweeper.pruner…min_survivors=0: must be a whole number, at least 1",
    ),
    Case(
        "pruner-margin",
        "hydra.sweeper.pruner.noise_margin=-1",
        "hydra.sweeper.pruner…noise_margin=-1: must be a number, at least 0",
    ),
]


@pytest.mark.slow
@each(BEFORE_IT_BEGINS, lambda _: "a study")
def test_what_no_trial_could_do_is_refused_before_the_study_begins(
    case: Case, workplace: Workplace
) -> None:
    outcome = search(
        workplace,
        *case.arguments.split(),
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.baseline=false",
    )

    assert matches(case.says, outcome.error), outcome.error
    assert not list(workplace.cwd.rglob("study.journal"))


def test_a_broken_study_costs_the_list_no_other(
    light_station: Station, tmp_path: Path
) -> None:
    made_study(tmp_path / "outputs" / "sweeps" / "sound", [create_trial(value=1.5)])
    for name, content in (
        ("empty", '{"name": "empty", "storage": null}'),
        ("far", '{"name": "far", "storage": "${oc.env:NO_SUCH_DATABASE}"}'),
        ("torn", '{"name": "torn"'),
    ):
        (tmp_path / "outputs" / "sweeps" / name).mkdir()
        (tmp_path / "outputs" / "sweeps" / name / "study.json").write_text(content)

    listed = light_station.run("list", cwd=tmp_path, module="sweeps")
    reported = light_station.run("report", "empty", cwd=tmp_path, module="sweeps")

    rows = {line.split()[0]: line for line in listed.stdout.splitlines()}
    assert rows["sound"].endswith("1/1     eval/loss  1.5000")
    assert "its storage knows no study empty" in rows["empty"]
    assert "NO_SUCH_DATABASE" in rows["far"]
    assert "it is no JSON" in rows["torn"]
    assert matches(
        "error: …outputs/sweeps/empty: its storage knows no study empty",
        reported.stderr.strip(),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "s9"),
        ("best", "s9"),
        ("report", "s9"),
        ("stop", "s9", "0"),
        ("confirm", "s9"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_study_that_is_not_there_is_refused_before_torch_loads(
    arguments: tuple[str, ...], workplace: Workplace
) -> None:
    outcome = workplace.call(*arguments, module="sweeps")

    assert outcome.error.startswith("s9: no such study; allowed: a study's folder")
    assert not outcome.torch_imported
