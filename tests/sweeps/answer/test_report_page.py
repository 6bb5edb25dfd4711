"""The report of a real study, and its page in a browser."""

import html
import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial
from playwright import sync_api as playwright
from support.browser import screenshot
from support.commands import Station
from support.configs import study_overrides
from support.matrix import further
from support.studies import COMPLETE, FAIL, PRUNED, kinds, made_study, text_of, trial

from finetune.run.resources import SharedResources
from sweeps.answer import report, report_rows
from sweeps.answer.report import write_report
from sweeps.study.study import Study


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


def test_the_leaderboard_leads_to_the_run_folders(done: Path, tmp_path: Path) -> None:
    page = text_of(done / "report.html")
    rows = page[page.index('id="leaderboard"') :].split("</section>")[0]
    links = re.findall(r'<a href="([^"]+)"[^>]*>(\d+)</a>', rows)

    assert len(links) == 8
    for address, number in links:
        assert address == f"trials/{number}/"
        assert (done / address / "result.json").exists()
    # The folders of these trials are on another machine.
    elsewhere = made_study(tmp_path / "s", [trial(random.Random(0))])
    assert '<a href="trials' not in text_of(write_report(elsewhere))


def test_expected_answers_stand_beside_the_models(done: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(done, tmp_path / "copy")
    samples = copy / "best" / "samples.json"
    answers = {"before": "No <idea>", "after": "It & is"}
    rows = [
        {"prompt": "Is it?", "expected": "It <is>", **answers},
        {"prompt": "Why?", **answers},
    ]
    samples.write_text(json.dumps(rows))

    page = text_of(write_report(Study.load(copy)))

    shown = page[page.index('id="samples"') :].split("</section>")[0]
    first, second = shown.split('<div class="samples">')[1:]
    for text in (
        "<h4>expected</h4><pre>It &lt;is&gt;</pre>",
        "<pre>No &lt;idea&gt;</pre>",
    ):
        assert text in first
    assert "expected" not in second
    assert "<pre>It &amp; is</pre>" in second


def test_says_what_became_of_the_rows(tmp_path: Path, tiny_base: Path) -> None:
    from support.configs import compose
    from support.runs import write_jsonl

    rows = [
        {"question": f"Is <{number}> so?", "answer": "Yes."} for number in range(40)
    ]
    data = write_jsonl(
        tmp_path / "rows.jsonl", [*rows, {"question": "So?", "answer": ""}]
    )
    columns = [
        f"+dataset.columns.{purpose}={column}"
        for purpose, column in {"prompt": "question", "completion": "answer"}.items()
    ]
    overrides = (f"dataset.path={data}", f"model.name_or_path={tiny_base}")
    config = compose(*overrides, *columns)
    study = made_study(tmp_path / "s", [trial(random.Random(0))])
    folder = study.folder_of(0)
    folder.path.mkdir(parents=True)
    folder.identity.write_text(json.dumps({"config": config.to_dict()}))

    def section() -> str:
        page = text_of(write_report(study))
        return page[page.index('id="rows"') :].split("</section>")[0]

    counts = SharedResources().rows(config.dataset).counts
    for part, name in (("train", "training"), ("eval", "evaluation"), ("test", "test")):
        assert f"<b>{counts[part]}</b><span>{name} rows</span>" in section()
    assert (
        "format prompt_completion (prompt: question, completion: answer)" in section()
    )
    assert "left out 1 rows of" in section()
    assert section().count('class="place"') == 3

    # What the run has recorded holds, also where the rows can't be read any more.
    recorded = counts | {"train": 1234, "left_out": {"train": 5, "eval": 0, "test": 0}}
    folder.result.write_text(json.dumps({"rows": recorded}))
    data.unlink()
    report_rows._shown.drop()
    assert "<b>1,234</b><span>training rows</span>" in section()
    assert "left out 5 training rows" in section()
    assert "Rows as the model sees them" not in section()


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
        assert f'<p class="place">{html.escape(example.place)}</p>' in page
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["real", "large", *further(*kinds())])
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
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_is_legible_at_any_width(
    width: int, theme: str, browser: Any, tmp_path: Path
) -> None:
    draw = random.Random(0)
    trials = [trial(draw, COMPLETE if number % 3 else PRUNED) for number in range(12)]
    failed = trial(draw, FAIL)
    failed.user_attrs["error"] = "no_room_" * 40
    trials.append(failed)
    study = made_study(tmp_path / ("a_study_with_a_long_name_" * 4), trials)
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme=theme
    )
    page.goto(write_report(study).as_uri())

    legend = page.locator("#chart-curves .legend").bounding_box()
    plot = page.locator("#chart-curves .nsewdrag").bounding_box()
    screenshot(page, f"width-{width}-{theme}")
    assert legend["y"] + legend["height"] <= plot["y"] + 1
    for name in ("parallel", "slices"):
        assert page.locator(f"#chart-{name}").bounding_box()["width"] >= 700
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What is wider than the page scrolls inside of its box.
    for box in page.locator(".scroll, .chart, pre").all():
        shape = box.bounding_box()
        assert shape["x"] >= 0
        assert shape["x"] + shape["width"] <= width
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_the_navigation_fits_and_leads_to_each_section(
    width: int, browser: Any, tmp_path: Path
) -> None:
    draw = random.Random(0)
    study = made_study(tmp_path / "s", [trial(draw) for _ in range(12)])
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(write_report(study).as_uri())
    links = page.locator("nav a")
    menu = page.locator("nav summary")

    sections = page.locator("section").evaluate_all("all => all.map(one => one.id)")
    targets = links.evaluate_all("all => all.map(one => one.hash.slice(1))")
    assert targets == sections
    for target in sections:
        if width == 390:
            assert not links.first.is_visible()
            menu.click()
        link = page.locator(f"nav a[href='#{target}']")
        shape = link.bounding_box()
        assert 0 <= shape["x"] <= shape["x"] + shape["width"] <= width
        link.click()
        heading = page.locator(f"#{target} h2").bounding_box()
        bar = page.locator("nav").bounding_box()
        assert bar["height"] < 90
        assert bar["y"] + bar["height"] <= heading["y"] + 1
    page.close()


def luminance(colour: str) -> float:
    """The relative luminance of a colour such as rgb(1, 2, 3) (WCAG 2)."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in channels
    ]
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(colour: str, ground: str) -> float:
    """The contrast ratio of two colours (WCAG 2)."""
    darker, lighter = sorted([luminance(colour), luminance(ground)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["real", "mixed", "two-objectives"])
def test_texts_and_marks_stand_out_in_both_themes(
    theme: str, kind: str, browser: Any, done: Path, tmp_path: Path
) -> None:
    if kind == "real":
        path = done / "report.html"
    else:
        trials, objectives = kinds()[kind]
        path = write_report(made_study(tmp_path / kind, trials, *objectives))
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme=theme)
    page.goto(path.as_uri())
    style = "getComputedStyle(one)"
    ground = page.locator("section").first.evaluate(f"one => {style}.backgroundColor")
    assert (luminance(ground) > 0.5) == (theme == "light")

    def colours(selector: str, attribute: str) -> set[str]:
        drawn: set[str] = set(
            page.locator(selector).evaluate_all(
                f"all => all.map(one => {style}.{attribute})"
            )
        )
        assert drawn
        return drawn

    for colour in colours("td, th, li, h2", "color"):
        assert contrast(colour, ground) >= 4
    for colour in colours(".js-plotly-plot .main-svg text", "fill"):
        assert contrast(colour, ground) >= 4.5
    marks = colours(".js-plotly-plot .points path", "fill")
    marks |= colours(".js-plotly-plot .lines path", "stroke")
    for colour in marks - {"none"}:
        assert contrast(colour, ground) >= 2.5
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["clipboard", "selection", "neither"])
def test_a_command_is_copied_or_selected_to_be_copied(
    way: str, browser: Any, done: Path
) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto((done / "report.html").as_uri())
    page.evaluate(
        "addEventListener('copy', () => { window.selected = '' + getSelection(); })"
    )
    if way == "clipboard":
        page.evaluate(
            "navigator.clipboard.writeText = async text => { window.written = text; }"
        )
    else:
        page.evaluate(
            "Object.defineProperty(navigator, 'clipboard', {value: undefined})"
        )
    if way == "neither":
        page.evaluate("document.execCommand = () => false")
    row = page.locator(".command", has_text="finetune.merge")
    command = row.locator("code").text_content()
    button = row.locator("button")

    button.click()

    answer = "press Ctrl+C" if way == "neither" else "copied"
    playwright.expect(button).to_have_text(answer)
    assert command.startswith("python -m finetune.merge ")
    if way == "clipboard":
        assert page.evaluate("window.written") == command
    else:
        assert page.evaluate("'' + getSelection()") == command
        assert page.evaluate("window.selected") == (
            command if way == "selection" else None
        )
    playwright.expect(button).to_have_text("copy")
    context.close()


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
        (summary,) = found["study_summaries"]
        assert summary["study_name"] == "s1"
        address = f"http://127.0.0.1:{port}/api/studies/{summary['study_id']}"
        with urllib.request.urlopen(address, timeout=60) as reply:
            assert json.load(reply)["objective_names"] == ["eval/loss"]
    finally:
        server.kill()
        server.wait()
