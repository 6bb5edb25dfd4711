"""A run is found by its folder, by its name, or as the newest one; otherwise one line says what
there is."""

import os
from pathlib import Path

import pytest

from finetune.errors import ConfigError
from finetune.files.find_run import fetch_run, find_run
from finetune.files.mirror import Mirror

BEGUN = ("other/t1", "mine/t1", "mine/t2", "third/t1", "mine/unfinished")
"""Runs in the order in which they began; the last one never did."""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of several runs, under the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "runs"
    for age, name in enumerate(BEGUN):
        run = folder / name
        run.mkdir(parents=True)
        if name != BEGUN[-1]:
            (run / "run.json").write_text("{}")
            os.utime(run / "run.json", (age, age))
    return folder


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("mine", "mine/t2"),
        ("mine/t1", "mine/t1"),
        ("other", "other/t1"),
        ("latest", "third/t1"),
        ("outputs/runs/mine", "mine/t2"),
        ("./outputs/runs/mine/", "mine/t2"),
        ("outputs/runs/mine/t1", "mine/t1"),
        ("{runs}/mine/t1", "mine/t1"),
        ("{runs}/mine", "mine/t2"),
    ],
)
def test_a_name_is_that_of_the_newest_run(name: str, run: str, runs: Path) -> None:
    assert find_run("RUN", name.format(runs=runs)).absolute() == runs / run


def test_a_folder_here_comes_before_a_name(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text("{}")
    assert find_run("RUN", "mine") == Path("mine")


ALLOWED = "allowed: the folder of a run that has begun, as outputs/runs/NAME/TIME"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "mien",
            f"no such run; did you mean mine? {ALLOWED}, latest, mine, other, third",
        ),
        (
            "lastest",
            f"no such run; did you mean latest? {ALLOWED}, latest, mine, other, third",
        ),
        (
            "mine/t3",
            f"no such run; did you mean mine/t2? {ALLOWED}, latest, mine, other, third",
        ),
        (
            "outputs",
            f"it has no run.json; {ALLOWED}, latest, mine, other, third",
        ),
        ("mine/unfinished", f"no such run; {ALLOWED}, latest, mine, other, third"),
    ],
)
def test_another_name_is_refused_with_the_nearest(
    name: str, says: str, runs: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        find_run("RUN", name)
    assert str(caught.value) == f"RUN={name}: {says}"


@pytest.mark.parametrize("name", ["latest", "mine"])
def test_without_a_run_no_name_is_offered(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        find_run("RUN", name)
    assert str(caught.value) == f"RUN={name}: no such run; {ALLOWED}"


@pytest.mark.parametrize(
    ("here", "copied", "taken"),
    [
        (["2026-01-02"], ["2026-01-01"], "2026-01-02"),
        (["2026-01-01"], ["2026-01-02", "2026-01-01"], "2026-01-02"),
        ([], ["2026-01-01"], "2026-01-01"),
        (["2026-01-01"], [], "2026-01-01"),
    ],
)
@pytest.mark.parametrize("name", ["a", "outputs/runs/a"])
def test_the_newest_run_is_taken_here_or_in_a_mirror(
    name: str,
    here: list[str],
    copied: list[str],
    taken: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for place, times in ((tmp_path, here), (tmp_path / "copies", copied)):
        for time in times:
            run = place / "outputs" / "runs" / "a" / time
            run.mkdir(parents=True)
            (run / "run.json").write_text(place.name)
    run = fetch_run(Mirror("copies"), name)
    assert run.absolute() == tmp_path / "outputs" / "runs" / "a" / taken
    is_here = taken in here
    assert (run / "run.json").read_text() == (tmp_path.name if is_here else "copies")


def write_run(run: Path, content: str) -> None:
    run.mkdir(parents=True)
    (run / "run.json").write_text(content)


def test_a_run_that_is_here_is_not_replaced_by_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "outputs" / "runs" / "a"
    for time in ("2026-01-02", "2026-01-01"):
        write_run(runs / time, "here")
    # Resumed last.
    os.utime(runs / "2026-01-02", (0, 0))
    os.utime(runs / "2026-01-02" / "run.json", (0, 0))
    write_run(tmp_path / "copies" / "outputs" / "runs" / "a" / "2026-01-02", "older")

    run = fetch_run(Mirror("copies"), "a")

    assert run.name == "2026-01-02"
    assert (run / "run.json").read_text() == "here"


@pytest.mark.parametrize("below", ["trials/0", "best"])
@pytest.mark.parametrize("name", ["s", "outputs/sweeps/s"])
def test_a_run_of_a_study_in_a_mirror_has_no_other_name(
    name: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "copies" / "outputs" / "sweeps" / "s" / below, "{}")
    with pytest.raises(ConfigError, match=f"^resume={name}: no such run"):
        fetch_run(Mirror("copies"), name)
    run = fetch_run(Mirror("copies"), f"outputs/sweeps/s/{below}")
    assert (run / "run.json").exists()
