"""The report of a real study, and its page in a browser."""

import html
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial
from support.commands import Station
from support.configs import study_overrides
from support.studies import COMPLETE, PRUNED, kinds, made_study, text_of, trial

from sweeps.answer import report, report_rows
from sweeps.answer.report import write_report


@pytest.fixture(scope="module")
def done(
    station: Station, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a study that has been run."""
    place = tmp_path_factory.mktemp("reported")
    more = (
        "tracker=wandb",
        "sample_prompts=['Is <it> so?']",
        "hydra.sweeper.n_trials=8",
    )
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
    assert "that no decision has used" in page
    assert "chart-curves" in page
    assert "per_device_train_batch_size" in page
    assert '"transformers"' in page or "transformers:" in page
    assert "Is &lt;it&gt; so?" in page


def test_shows_the_first_training_rows_with_what_is_trained(done: Path) -> None:
    from finetune.run.load import read_run_config
    from finetune.run.preview import first_examples
    from finetune.run.resources import SharedResources

    page = text_of(done / "report.html")
    config = read_run_config(done / "best")
    resources = SharedResources()
    rows = resources.rows(config.dataset).train
    shown = first_examples(config, resources.tokenizer(config.model), "train", rows, 3)

    assert "Rows as the model sees them" in page
    assert len(shown) == 3
    for example in shown:
        trained = "".join(token.text for token in example.tokens if token.kind.trained)
        assert trained
        assert f"<h3>{html.escape(example.place)}</h3>" in page
        assert (
            f'<span class="trained">{html.escape(trained, quote=False)}'
            in html_text(page)
        )


@pytest.mark.parametrize("lost", ["rows", "base"])
def test_rows_that_can_not_be_read_any_more_are_left_out(
    lost: str, tmp_path: Path, tiny_base: Path
) -> None:
    from support.configs import compose
    from support.runs import write_jsonl

    rows = [{"text": f"Row <{number}> is here."} for number in range(30)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = compose(f"dataset.path={data}", f"model.name_or_path={base}")
    study = made_study(tmp_path / "s", [trial(random.Random(0))])
    folder = study.folder_of(0).path
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": config.to_dict()}))

    assert '<span class="trained">Row &lt;' in text_of(write_report(study))
    if lost == "rows":
        data.unlink()
    else:
        shutil.rmtree(base)
    report_rows._shown.drop()
    assert "Rows as the model sees them" not in text_of(write_report(study))


def html_text(page: str) -> str:
    """The page with quotes as they are."""
    return page.replace("&#34;", '"').replace("&#39;", "'")


def test_the_command_writes_it_anew(done: Path, station: Station) -> None:
    (done / "report.html").unlink()

    ended = station.run("report", "s1", cwd=done.parents[2], module="sweeps")

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "outputs/sweeps/s1/report.html"
    assert (done / "report.html").stat().st_size > 1e6


def test_watching_goes_on_until_no_trial_is_left(tmp_path: Path) -> None:
    draw = random.Random(0)
    study = made_study(
        tmp_path / "s", [trial(draw), create_trial(state=TrialState.WAITING)]
    )
    said: list[str] = []

    def look(seconds: float) -> None:
        (waiting,) = study.trials(TrialState.WAITING)
        page = text_of(study.folder / "report.html")
        assert "1 waiting" in page
        assert 'http-equiv="refresh"' in page
        study.optuna.tell(study.optuna.ask().number, 2.0)
        assert waiting.number == 1

    report.watch(study, said.append, pause=look)

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

    assert 'http-equiv="refresh"' not in text_of(
        write_report(made_study(tmp_path / "s", [runs]))
    )


CHROMIUM = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system's."""
    if CHROMIUM is None:
        pytest.fail("these tests need Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    quiet = [
        "--no-sandbox",
        *(
            f"--disable-{what}"
            for what in ("gpu", "background-networking", "component-update")
        ),
    ]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, args=quiet, timeout=120_000
        )
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
        many = (
            [trial(draw, COMPLETE if number % 3 else PRUNED) for number in range(500)],
            list[str](),
        )
        trials, objectives = many if kind == "large" else kinds()[kind]
        path = write_report(made_study(tmp_path / kind, trials, *objectives))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    asked: list[str] = []
    page.on(
        "console",
        lambda message: (
            wrong.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))

    page.goto(path.as_uri())
    charts = {
        chart.get_attribute("id") for chart in page.locator(".plotly-graph-div").all()
    }
    drawn = page.locator(".plotly-graph-div:has(.main-svg)").count()

    screenshot(page, kind)
    assert wrong == []
    assert asked == [path.as_uri()]
    assert drawn == len(charts)
    if kind in ("real", "large", "mixed"):
        assert charts >= {
            f"chart-{name}" for name in ("curves", "history", "parallel", "slices")
        }
    # The other studies have too few trials to know what mattered.
    assert ("chart-importance" in charts) == (kind == "large")
    assert ("chart-tokens" in charts) == (kind == "real")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 1280  # nothing sticks out
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1280])
def test_a_page_is_legible_at_any_width(
    width: int, browser: Any, tmp_path: Path
) -> None:
    draw = random.Random(0)
    trials = [trial(draw, COMPLETE if number % 3 else PRUNED) for number in range(12)]
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(write_report(made_study(tmp_path / "s", trials)).as_uri())

    legend = page.locator("#chart-curves .legend").bounding_box()
    plot = page.locator("#chart-curves .nsewdrag").bounding_box()
    screenshot(page, f"width-{width}")
    assert legend["y"] + legend["height"] <= plot["y"] + 1
    for name in ("parallel", "slices"):
        assert page.locator(f"#chart-{name}").bounding_box()["width"] >= 700
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1280:
        bar = "document.querySelector('nav')"
        assert page.evaluate(f"{bar}.scrollWidth <= {bar}.clientWidth")
    page.close()


@pytest.mark.slow
def test_the_leaderboard_sorts_by_a_column_that_is_clicked(
    browser: Any, done: Path
) -> None:
    page = browser.new_page()
    page.goto((done / "report.html").as_uri())
    head = page.locator("#leaderboard th", has_text="learning_rate")
    column = page.locator("#leaderboard th").all_text_contents().index("learning_rate")

    def cells() -> list[float]:
        rows = page.locator("#leaderboard tbody tr")
        return [
            float(rows.nth(index).locator("td").nth(column).text_content())
            for index in range(rows.count())
        ]

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
    command = [
        str(tool),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        str(done / "study.journal"),
    ]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/api/studies", timeout=60
                ) as reply:
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
