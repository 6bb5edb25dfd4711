"""The report: every kind of study has one, it says what is so, and a browser draws it without the network."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from support.commands import Station, run_cli
from support.configs import study_overrides
from support.studies import made_study

from sweeps.answer import report
from sweeps.answer.advice import advice
from sweeps.answer.importance import Share, importances
from sweeps.answer.report import write_report
from sweeps.study.formatting import commands
from sweeps.study.study import OUT_OF_TIME, Study

SPACE: dict[str, BaseDistribution] = {
    "lora.r": CategoricalDistribution([4, 8, 16, 32, 64]),
    "lora.dropout": FloatDistribution(0, 0.15),
    "optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
}
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def trial(draw: random.Random, state: TrialState = COMPLETE, **given: Any) -> FrozenTrial:
    """A trial whose loss falls with its learning rate, and with nothing else."""
    params = {
        "lora.r": draw.choice([4, 8, 16, 32, 64]),
        "lora.dropout": draw.uniform(0, 0.15),
        "optimizer.learning_rate": 10 ** draw.uniform(-4, -2),
    } | given.pop("params", {})
    loss = 3 - 0.3 * math.log10(params["optimizer.learning_rate"] * 1e4)
    rungs = {COMPLETE: 4, PRUNED: 1}.get(state, 0)
    reported = {rung: loss - 0.1 * rung for rung in range(1, rungs + 1)}
    notes = {"steps": 60, "step": 60 if state == COMPLETE else 15, "reason": "worse than others at this rung"}
    return create_trial(
        state=state,
        params=params,
        distributions={name: SPACE[name] for name in params},
        user_attrs=notes | ({"error": "<b>out of memory</b>"} if state == FAIL else {}),
        **{"intermediate_values": reported, "value": loss - 0.4 if state == COMPLETE else None} | given,
    )


def text_of(path: Path) -> str:
    """The page without plotly's own code."""
    return re.sub(r"<script>.*?</script>", "", path.read_text(encoding="utf-8"), count=1, flags=re.DOTALL)


def two_values(draw: random.Random) -> FrozenTrial:
    return create_trial(
        params={"lora.r": 8}, distributions={"lora.r": SPACE["lora.r"]}, values=[draw.random(), draw.random()]
    )


def kinds() -> dict[str, tuple[list[FrozenTrial], list[str]]]:
    draw = random.Random(0)
    nan = trial(draw, PRUNED)
    nan.intermediate_values = {1: math.nan}
    infinite = [trial(draw) for _ in range(9)]
    infinite[3].values = [math.inf]
    partial = trial(draw)
    del partial._distributions["lora.dropout"], partial._params["lora.dropout"]
    waiting = create_trial(state=TrialState.WAITING)
    return {
        "empty": ([], []),
        "waiting": ([waiting] * 3, []),
        "one": ([trial(draw)], []),
        "two": ([trial(draw), trial(draw, PRUNED)], []),
        "failed": ([trial(draw, FAIL) for _ in range(3)], []),
        "pruned": ([trial(draw, PRUNED) for _ in range(9)], []),
        "nan": ([trial(draw), nan, trial(draw, PRUNED, intermediate_values={1: math.inf}), trial(draw)], []),
        "infinite": (infinite, []),
        "partial": ([*(trial(draw) for _ in range(9)), partial], []),
        "no-parameters": ([create_trial(value=1.0), create_trial(value=2.0)], []),
        "equal": ([trial(draw, value=1.0, intermediate_values={1: 1.0}) for _ in range(10)], []),
        "two-objectives": ([two_values(draw) for _ in range(9)], ["eval/loss", "adapter/parameters"]),
        "mixed": ([trial(draw, state) for state in (COMPLETE, PRUNED, FAIL) * 5], []),
    }


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_study_has_a_report(kind: str, tmp_path: Path) -> None:
    trials, objectives = kinds()[kind]
    study = made_study(tmp_path / kind, trials, *objectives)

    page = text_of(write_report(study))

    assert kind in page
    assert page.count('class="plotly-graph-div"') >= (1 if study.trials(COMPLETE) else 0)
    assert ("chart-pareto" in page) == (kind == "two-objectives")
    if kind in ("failed", "mixed"):
        assert "&lt;b&gt;out of memory&lt;/b&gt;" in page
        assert "<b>out of memory" not in page


def test_500_trials_are_a_page_of_less_than_10_megabytes_in_5_seconds(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "large", [trial(draw, COMPLETE if number % 3 else PRUNED) for number in range(500)])

    def seconds() -> float:
        began = time.process_time()
        write_report(study)
        return time.process_time() - began

    # The first time libraries are imported too; what else runs on the machine takes its toll on some.
    assert any(seconds() < 5 for _ in range(3))
    path = study.folder / "report.html"
    assert path.stat().st_size < 10e6
    assert text_of(path).count("<tr") > 500


def test_a_space_that_changed_on_the_way_is_drawn_as_one(tmp_path: Path) -> None:
    draw = random.Random(0)
    trials = [trial(draw) for _ in range(10)]
    for each in trials[5:]:
        each._distributions["optimizer.learning_rate"] = FloatDistribution(1e-5, 1e-1, log=True)
        each._distributions["lora.r"] = CategoricalDistribution([4, 8, 16, 32, 64, 128])
    page = text_of(write_report(made_unchecked(tmp_path / "changed", trials)))

    assert "chart-parallel" in page


def made_unchecked(folder: Path, trials: list[FrozenTrial]) -> Study:
    """A study with trials that Optuna would not take any more, as one has that went on under `allow_change`."""
    study = made_study(folder, [])
    for each in trials:
        study.storage.create_new_trial(study.optuna._study_id, each)
    return study


def test_a_trial_that_ends_meanwhile_is_in_the_next_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = made_study(tmp_path / "s", [trial(random.Random(0)), *[create_trial(state=TrialState.WAITING)] * 2])

    def end_another(seen: optuna.Study) -> dict[str, Share]:
        study.optuna.tell(study.optuna.ask().number, 1.0)
        return importances(seen)

    monkeypatch.setattr("sweeps.answer.advice.importances", end_another)
    assert "1 complete" in text_of(write_report(study))
    assert "2 complete" in text_of(write_report(study))


def test_the_report_that_began_last_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = made_study(tmp_path / "s", [])
    later = threading.Thread(target=write_report, args=(study,))

    def html(self: object, live: bool) -> str:
        if later.ident is not None:
            return "the answer"
        later.start()
        later.join(0.5)
        return "no answer yet"

    monkeypatch.setattr(report._Report, "html", html)
    path = write_report(study)
    later.join()

    assert path.read_text() == "the answer"


def test_texts_of_the_config_are_shown_as_they_are(tmp_path: Path) -> None:
    study = made_study(tmp_path / "s", [trial(random.Random(0))])
    folder = study.folder_of(0).path
    folder.mkdir(parents=True)
    prompt = "What is ${x in a shell? Und was heißt 变量?"
    (folder / "run.json").write_text(json.dumps({"config": {"sample_prompts": [prompt]}}))

    assert prompt in text_of(write_report(study))


# What it says


def test_says_what_mattered_and_how_sure_that_is(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "s", [trial(draw, COMPLETE if number % 2 else PRUNED) for number in range(24)])

    shares = importances(study.optuna)

    assert next(iter(shares)) == "optimizer.learning_rate"
    rate = shares["optimizer.learning_rate"]
    assert rate.low <= rate.share <= 1
    assert rate.share > 0.7
    assert shares["lora.dropout"].high < rate.low


def test_advice_names_the_bound_that_the_best_press_against(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "s", [trial(draw, COMPLETE if number % 2 else PRUNED) for number in range(40)])
    shares = {"optimizer.learning_rate": Share(0.9, 0.8, 1.0), "lora.dropout": Share(0.02, 0.0, 0.05)}

    lines = advice(study, shares)

    pressed = r"optimizer\.learning_rate: \d+ of the best 10 trials lie at the upper end of .* search 0\.03 too"
    assert re.match(pressed, lines[0])
    assert "hardly mattered: lora.dropout (2%, at most 5%); fix with lora.dropout=" in lines[1]
    assert "the next trial can be expected to better eval/loss by" in lines[2]


def pressed(folder: Path, what: BaseDistribution, best: object, other: object) -> list[str]:
    """The advice on the bounds of a parameter whose best ten trials of forty are at one place."""
    values = [best] * 10 + [other] * 30
    trials = [
        create_trial(params={"x.y": value}, distributions={"x.y": what}, value=float(index))
        for index, value in enumerate(values)
    ]
    return [line for line in advice(made_study(folder, trials), {}) if line.startswith("x.y")]


@pytest.mark.parametrize(
    ("what", "best", "other", "beyond"),
    [
        (CategoricalDistribution([1, 2, 4, 8]), 1, 8, None),  # rows in a batch: there is no half
        (CategoricalDistribution([1, 2, 4, 8]), 8, 1, "16"),
        (CategoricalDistribution([0.0, 0.01, 0.1]), 0.0, 0.1, None),
        (IntDistribution(1, 8), 1, 8, None),
        (IntDistribution(1, 8), 8, 1, "12"),
        (IntDistribution(4, 64, log=True), 4, 64, "1"),
        (FloatDistribution(0, 0.15), 0.0, 0.15, None),
        (FloatDistribution(0, 0.15), 0.15, 0.0, "0.225"),
        (FloatDistribution(0.9, 0.998), 0.998, 0.9, "0.999"),  # a share, as Adam's beta: 1 is none
        (FloatDistribution(1e-4, 1e-2, log=True), 1e-4, 1e-2, "3.33e-05"),
    ],
)
def test_what_lies_beyond_a_bound_can_be_searched(
    what: BaseDistribution, best: object, other: object, beyond: str | None, tmp_path: Path
) -> None:
    lines = pressed(tmp_path / "s", what, best, other)

    assert [line.partition("search ")[2] for line in lines] == ([f"{beyond} too"] if beyond else [])


def test_advice_knows_the_range_that_is_searched_now(tmp_path: Path) -> None:
    draw = random.Random(0)
    trials = [trial(draw, params={"optimizer.learning_rate": 0.0099}) for _ in range(12)]
    trials += [trial(draw, params={"optimizer.learning_rate": 2e-4}) for _ in range(12)]
    for each in trials[12:]:
        each._distributions["optimizer.learning_rate"] = FloatDistribution(1e-4, 1, log=True)

    lines = advice(made_unchecked(tmp_path / "s", trials), {})

    assert not [line for line in lines if line.startswith("optimizer.learning_rate")]


def test_advice_for_more_trials_fades_where_nothing_is_left_to_find(tmp_path: Path) -> None:
    def gain(folder: str, rates: list[float]) -> float:
        draw = random.Random(0)
        trials = [trial(draw, params={"optimizer.learning_rate": rate}) for rate in rates]
        (line,) = [line for line in advice(made_study(tmp_path / folder, trials), {}) if "expected" in line]
        return float(re.search(r"by ([\d.e-]+)", line)[1])  # type: ignore[index]

    searched = gain("searched", [10 ** (-4 + 2 * index / 19) for index in range(20)])
    half = gain("half", [10 ** (-4 + 1 * index / 19) for index in range(20)])

    assert searched < half / 3


def test_luck_is_no_reason_for_more_trials(tmp_path: Path) -> None:
    hopeful = 0
    for seed in range(6):
        draw = random.Random(seed)
        losses = [draw.gauss(3, 0.1) for _ in range(24)]
        trials = [trial(draw, value=loss, intermediate_values={1: loss}) for loss in losses]
        hopeful += "goes on" in advice(made_study(tmp_path / str(seed), trials), {})[-1]

    assert hopeful <= 3


def test_advice_asks_for_trials_that_the_study_can_have(tmp_path: Path) -> None:
    draw = random.Random(0)
    rates = [10 ** (-4 + index / 19) for index in range(20)]
    trials = [trial(draw, params={"optimizer.learning_rate": rate}) for rate in rates]
    full = advice(made_study(tmp_path / "full", trials), {})
    begun = advice(made_study(tmp_path / "begun", [*trials, *[create_trial(state=TrialState.WAITING)] * 10]), {})
    trials[0].user_attrs["role"] = "grid"
    grid = advice(made_study(tmp_path / "grid", trials), {})

    assert full[-1].endswith("hydra.sweeper.n_trials=40 goes on")
    assert begun[-1].endswith("hydra.sweeper.n_trials=30 goes on")
    assert not [line for line in grid if "n_trials" in line or "more trials" in line]


def test_few_trials_give_no_advice(tmp_path: Path) -> None:
    draw = random.Random(0)
    assert advice(made_study(tmp_path / "s", [trial(draw) for _ in range(7)]), {}) == []


def test_advice_says_where_it_rests_on_an_early_rung(tmp_path: Path) -> None:
    draw = random.Random(0)
    shares = {"lora.dropout": Share(0.02, 0.0, 0.05)}
    whole = made_study(tmp_path / "whole", [trial(draw) for _ in range(9)])
    halved = made_study(tmp_path / "halved", [trial(draw, COMPLETE if number < 2 else PRUNED) for number in range(9)])

    (said,) = [line for line in advice(whole, shares) if "hardly mattered" in line]
    assert said.endswith("search fewer dimensions")
    (said,) = [line for line in advice(halved, shares) if "hardly mattered" in line]
    assert said.endswith("search fewer dimensions (judged at the last rung that all trials reached)")


def test_a_running_trial_has_its_curve(tmp_path: Path) -> None:
    runs = trial(random.Random(0), TrialState.RUNNING, intermediate_values={1: 2.5, 2: 2.25}, value=None)
    page = text_of(write_report(made_study(tmp_path / "s", [runs])))

    assert "chart-curves" in page
    assert '"name":"running"' in page


def test_a_small_study_says_what_is_missing(tmp_path: Path) -> None:
    page = text_of(write_report(made_study(tmp_path / "s", [trial(random.Random(0))])))

    assert "Needs 8 trials that were measured and differ." in page
    assert "Too few trials for advice." in page


def test_several_objectives_have_no_one_winner(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "s", [two_values(draw) for _ in range(9)], "eval/loss", "adapter/parameters")
    page = text_of(write_report(study))

    front = len(study.optuna.best_trials)
    assert f"is the first of {front} that no other beats in all objectives at once" in page
    assert "Too few trials" not in page
    assert "confirm it" not in dict(commands(study))


def test_every_number_of_objectives_shows_who_is_on_the_front(tmp_path: Path) -> None:
    values = [[0.0, 9.0, 9.0, 9.0], [9.0, 0.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.5]]
    study = made_study(tmp_path / "s", [create_trial(values=each) for each in values], "a/1", "a/2", "a/3", "a/4")

    assert text_of(write_report(study)).count("<td>on the Pareto front</td>") == 2


def test_of_an_objective_that_is_maximised_the_largest_wins(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "s", [trial(draw) for _ in range(24)], "eval/accuracy", direction="maximize")
    largest = max(study.trials(), key=lambda each: each.value)

    page = text_of(write_report(study))

    assert f"Trial {largest.number} wins with eval/accuracy {largest.value:.4f}" in page
    assert re.search(r"optimizer\.learning_rate: \d of the best 6 trials lie at the lower end", page)
    assert "eval/accuracy (maximize)" in page


def test_test_rows_that_gave_no_number_are_no_proof(tmp_path: Path) -> None:
    from finetune.run.final_evaluation import read_test_evaluation

    study = made_study(tmp_path / "s", [trial(random.Random(0))])
    folder = study.folder_of(0)
    folder.path.mkdir(parents=True)
    folder.test_rows.write_text(json.dumps({"row_losses": [1.0, None], "row_tokens": [1, 1], "accuracy": 0.5}))

    assert read_test_evaluation(folder) is None


def test_what_time_has_cut_is_not_saved_by_pruning(tmp_path: Path) -> None:
    cut = trial(random.Random(0), PRUNED)
    cut.user_attrs["reason"] = OUT_OF_TIME
    study = made_study(tmp_path / "s", [cut])
    folder = study.folder_of(0).path
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"train_tokens": 1500, "train_seconds": 15}))

    assert "<b>0</b><span>tokens saved by pruning" in text_of(write_report(study))


def test_counts_what_pruning_has_saved(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "s", [trial(draw), trial(draw, PRUNED)])
    places = [study.folder_of(0).path, study.folder_of(1).path, study.folder / "confirm" / "0-seed1"]
    for folder, tokens in zip(places, (6000, 1500, 6100), strict=True):
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"train_tokens": tokens, "train_seconds": tokens / 100}))

    page = text_of(write_report(study))

    assert "<b>7,500</b><span>tokens trained" in page
    assert "<b>6,100</b><span>tokens trained by the confirmation, besides" in page
    assert "<b>4,500</b><span>tokens saved by pruning" in page
    assert "<b>38%</b>" in page


# A real study's


@pytest.fixture(scope="module")
def done(station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that has been run."""
    place = tmp_path_factory.mktemp("reported")
    more = ("tracker=wandb", "sample_prompts=['Is <it> so?']", "hydra.sweeper.n_trials=8")
    ended = station.run(*study_overrides(tiny_base, "s1"), *more, cwd=place)
    assert ended.returncode == 0, ended.stderr
    assert "report         outputs/sweeps/s1/report.html" in ended.stderr
    assert "optuna-dashboard outputs/sweeps/s1/study.journal" in ended.stderr
    return place / "outputs" / "sweeps" / "s1"


def test_a_study_ends_with_its_report(done: Path) -> None:
    page = text_of(done / "report.html")
    answer = json.loads((done / "answer.json").read_text())

    assert f"winner (trial {answer['trial']})" in page
    assert "python -m finetune.merge" in page
    assert "that no choice has seen" in page
    assert "chart-curves" in page
    assert "per_device_train_batch_size" in page
    assert '"transformers"' in page or "transformers:" in page
    assert "Is &lt;it&gt; so?" in page


def test_the_command_writes_it_anew(done: Path) -> None:
    (done / "report.html").unlink()

    ended = run_cli("report", "s1", cwd=done.parents[2], module="sweeps")

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "outputs/sweeps/s1/report.html"
    assert (done / "report.html").stat().st_size > 1e6


def test_watching_goes_on_until_no_trial_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "s", [trial(draw), create_trial(state=TrialState.WAITING)])
    said: list[str] = []

    def look(seconds: float) -> None:
        (waiting,) = study.trials(TrialState.WAITING)
        page = text_of(study.folder / "report.html")
        assert "1 to go" in page
        assert 'http-equiv="refresh"' in page
        study.optuna.tell(study.optuna.ask().number, 2.0)
        assert waiting.number == 1

    monkeypatch.setattr(report.time, "sleep", look)
    report.watch(study, said.append)

    assert len(said) == 2
    assert "2 complete" in said[-1]
    path = study.folder / "report.html"
    assert 'http-equiv="refresh"' in text_of(path)  # the answer is still to come
    answer = {"trial": study.ranked()[0].number, "baseline": None, "test": None}
    (study.folder / "answer.json").write_text(json.dumps(answer))
    report.watch(study, said.append)
    assert 'http-equiv="refresh"' not in text_of(path)


def test_a_page_that_nobody_writes_anew_stays(tmp_path: Path) -> None:
    runs = trial(random.Random(0), TrialState.RUNNING, value=None)

    assert 'http-equiv="refresh"' not in text_of(write_report(made_study(tmp_path / "s", [runs])))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system's."""
    if CHROMIUM is None:
        pytest.fail("these tests need Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", *(f"--disable-{what}" for what in ("gpu", "background-networking", "component-update"))]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet, timeout=120_000)
        yield opened
        opened.close()


def screenshot(page: Any, name: str) -> None:
    """Keep what a person would see, where CI wants it."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["real", "large", *kinds()])
def test_a_browser_draws_every_chart_without_errors_or_the_network(
    kind: str, browser: Any, done: Path, tmp_path: Path
) -> None:
    if kind == "real":
        path = done / "report.html"
    else:
        draw = random.Random(0)
        many = [trial(draw, COMPLETE if number % 3 else PRUNED) for number in range(500)], list[str]()
        trials, objectives = many if kind == "large" else kinds()[kind]
        path = write_report(made_study(tmp_path / kind, trials, *objectives))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))

    page.goto(path.as_uri())
    charts = {chart.get_attribute("id") for chart in page.locator(".plotly-graph-div").all()}
    drawn = page.locator(".plotly-graph-div:has(.main-svg)").count()

    screenshot(page, kind)
    assert wrong == []
    assert asked == [path.as_uri()]
    assert drawn == len(charts)
    if kind in ("real", "large", "mixed"):
        assert charts >= {f"chart-{name}" for name in ("curves", "history", "parallel", "importance", "slices")}
    assert ("chart-tokens" in charts) == (kind == "real")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 1280  # nothing sticks out
    page.close()


@pytest.mark.slow
def test_the_leaderboard_sorts_by_a_column_that_is_clicked(browser: Any, done: Path) -> None:
    page = browser.new_page()
    page.goto((done / "report.html").as_uri())
    head = page.locator("#leaderboard th", has_text="learning_rate")
    column = page.locator("#leaderboard th").all_text_contents().index("learning_rate")

    def cells() -> list[float]:
        rows = page.locator("#leaderboard tbody tr")
        return [float(rows.nth(index).locator("td").nth(column).text_content()) for index in range(rows.count())]

    head.click()
    assert cells() == sorted(cells())
    head.click()
    assert cells() == sorted(cells(), reverse=True)
    page.close()


@pytest.mark.slow
def test_optuna_dashboard_reads_the_studys_storage(done: Path) -> None:
    import socket
    import urllib.request

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tool = Path(sys.executable).with_name("optuna-dashboard")
    command = [str(tool), "--host", "127.0.0.1", "--port", str(port), str(done / "study.journal")]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=60) as reply:
                    found = json.load(reply)
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < end
                time.sleep(0.2)
        assert [study["study_name"] for study in found["study_summaries"]] == ["s1"]
    finally:
        server.kill()
        server.wait()
