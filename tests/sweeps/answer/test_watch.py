"""`python -m sweeps watch`: what is served, to whom, and how the page follows a study."""

import http.client
import json
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState, create_trial
from support.browser import screenshot
from support.commands import Forked, Station, wait_until
from support.configs import study_overrides
from support.gates import gate, gated
from support.studies import COMPLETE, FAIL, PRUNED, made_study, trial
from support.study_folder import folder_of

from finetune.exit_codes import ANSWER, MISTAKE
from sweeps.answer import live_page
from sweeps.answer.live_page import LivePage
from sweeps.study.study import Study

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)/")


def watched(station: Station, place: Path, *words: str) -> tuple[Forked, int]:
    """Start the command on the study `s`; return its process and its port."""
    arguments = ("watch", "s", *(words or ("--port", "0")))
    process = station.start(*arguments, cwd=place, module="sweeps")
    wait_until(lambda: ADDRESS.search(process.printed()) is not None, process)
    address = ADDRESS.search(process.printed())
    assert address is not None
    return process, int(address[1])


def ask(
    port: int, path: str = "/", method: str = "GET", **headers: str
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def mixed_trials(count: int) -> list[Any]:
    draw = random.Random(0)
    states = (COMPLETE, PRUNED, COMPLETE, FAIL)
    return [trial(draw, states[number % 4]) for number in range(count)]


@pytest.fixture(scope="module")
def served(
    station: Station, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, int]]:
    """The folder of a made-up study, and the port on which its page is served."""
    place = tmp_path_factory.mktemp("watched")
    folder = place / "outputs" / "sweeps" / "s"
    made_study(folder, mixed_trials(8))
    process, port = watched(station, place)
    yield folder, port
    process.kill()


def test_the_page_and_the_answer_are_served(served: tuple[Path, int]) -> None:
    folder, port = served
    status, page = ask(port)
    assert status == 200
    assert "4 complete" in page
    version = re.search(r'data-version="([^"]+)"', page)
    assert version is not None
    assert ask(port, "/version") == (200, version[1])
    assert ask(port, "/answer.json")[0] == 404
    (folder / "answer.json").write_text('{"trial": 0}')
    assert json.loads(ask(port, "/answer.json")[1]) == {"trial": 0}
    (folder / "answer.json").unlink()
    assert ask(port, method="HEAD") == (200, "")
    assert ask(port, "/plotly.js")[1].lstrip().startswith("/**")


@pytest.mark.parametrize(
    "path",
    ["/study.journal", "/trials/", "/../s/study.json", "//etc/passwd", "/%2e%2e/", "*"],
)
def test_no_other_path_is_served(path: str, served: tuple[Path, int]) -> None:
    assert ask(served[1], path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_written(method: str, served: tuple[Path, int]) -> None:
    assert ask(served[1], method=method)[0] == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),  # through a tunnel from another port
        ("localhost", 200),
        ("LOCALHOST:80", 403),
        ("example.com", 403),
        ("127.0.0.1.example.com:80", 403),
        ("example.com:127.0.0.1", 403),
        ("", 403),
    ],
)
def test_only_requests_for_this_machine_are_answered(
    host: str, status: int, served: tuple[Path, int]
) -> None:
    assert ask(served[1], Host=host)[0] == status


def test_it_listens_to_this_machine_alone(served: tuple[Path, int]) -> None:
    other = socket.gethostbyname(socket.gethostname())
    if other.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((other, served[1]), timeout=10)


def test_nothing_is_written_into_the_study(served: tuple[Path, int]) -> None:
    folder, port = served

    def content() -> dict[Path, tuple[int, int]]:
        stats = {path: path.stat() for path in [folder, *folder.rglob("*")]}
        return {path: (each.st_mtime_ns, each.st_size) for path, each in stats.items()}

    before = content()
    page = LivePage(folder)
    assert page.current().html
    assert ask(port)[0] == 200
    assert content() == before


def test_a_page_is_built_again_when_the_study_has_changed_and_then_rests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_page, "REST", 10_000)
    study = made_study(tmp_path / "s", [])
    page = LivePage(study.folder)
    first = page.current()
    assert "before its first trial" in first.html
    assert page.current() is first
    study.optuna.add_trial(trial(random.Random(0)))
    page._rests_until = 0
    second = page.current()
    assert "1 complete" in second.html
    assert second.version != first.version
    # It has just been built: the study trains on the same machine.
    study.optuna.add_trial(trial(random.Random(1)))
    assert page.current() is second
    page._rests_until = 0
    assert "2 complete" in page.current().html
    assert page.builds == 3
    (study.folder / "answer.json").write_text('{"trial": 7}')
    page._rests_until = 0
    page.current()
    assert page.builds == 4


def test_files_that_go_while_a_page_is_built_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the winner's folder, when another trial wins."""
    study = made_study(tmp_path / "s", [trial(random.Random(0))])
    page = LivePage(study.folder)
    samples = study.folder / "best/samples.json"
    samples.parent.mkdir()
    samples.write_text("{}")
    glob = Path.glob

    def glob_before_a_removal(folder: Path, pattern: str) -> list[Path]:
        paths = list(glob(folder, pattern))
        samples.unlink(missing_ok=True)
        return paths

    monkeypatch.setattr(Path, "glob", glob_before_a_removal)
    page._rests_until = 0
    assert "1 complete" in page.current().html
    assert not samples.exists()


def test_the_end_frees_the_port(station: Station, tmp_path: Path) -> None:
    made_study(folder_of(tmp_path), [create_trial(state=TrialState.WAITING)])
    process, port = watched(station, tmp_path)
    taken = station.run(
        "watch", "s", "--port", str(port), cwd=tmp_path, module="sweeps"
    )
    assert taken.returncode == MISTAKE
    reason = "can't be used (Address already in use); --port 0 takes a free one"
    assert taken.stderr == f"error: --port={port}: {reason}\n"
    process.send_signal(signal.SIGINT)
    ended = process.wait(seconds=30)
    assert (ended.returncode, ended.stderr) == (ANSWER, "")
    assert ended.stdout.count("\n") == 1

    again, same = watched(station, tmp_path, "--port", str(port), "--json")
    assert same == port
    again.send_signal(signal.SIGTERM)
    ended = again.wait(seconds=30)
    assert ended.returncode == ANSWER
    shown = {"study": "s", "address": f"http://127.0.0.1:{port}/"}
    assert json.loads(ended.stdout) == shown


@pytest.mark.parametrize("port", ["-1", "x", "65536"])
def test_a_wrong_port_is_one_line(
    port: str, light_station: Station, tmp_path: Path
) -> None:
    ended = light_station.run(
        "watch", "s", f"--port={port}", cwd=tmp_path, module="sweeps"
    )
    assert ended.returncode == MISTAKE
    assert f"{port}: must be a whole number from 0 to 65535" in ended.stderr


class Watcher:
    """A browser's page, with what went wrong on it and what it asked for."""

    def __init__(self, browser: Any, port: int, width: int = 1280) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(f"http://127.0.0.1:{port}/")

    def _listen(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)

    def wait_for(self, text: str) -> None:
        """Wait until the line below the title has a text."""
        self.page.locator("header p", has_text=text).first.wait_for(timeout=60_000)


def drag(
    page: Any, place: str, begin: tuple[float, float], end: tuple[float, float]
) -> None:
    """Drag the mouse between two positions, as shares of an element's width and height."""
    element = page.locator(place).first
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    for act, (x, y) in ((page.mouse.down, begin), (page.mouse.up, end)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        act()


@pytest.mark.slow
def test_a_page_keeps_what_its_reader_has_done_while_the_study_grows(
    browser: Any, station: Station, tmp_path: Path
) -> None:
    # The study is not at its end: its analysis, which takes seconds, need not be new each time.
    waits = create_trial(state=TrialState.WAITING)
    study = made_study(folder_of(tmp_path), [*mixed_trials(40), waits])
    config = study.folder_of(0)
    config.path.mkdir(parents=True)
    config.identity.write_text('{"config": {"seed": 1}}')
    winner = study.ranked()[0].number
    shutil.copytree(config.path, study.folder_of(winner).path, dirs_exist_ok=True)
    process, port = watched(station, tmp_path)
    watcher = Watcher(browser, port)
    page = watcher.page
    page.locator("#config summary").first.click()
    page.locator("#leaderboard th", has_text="trial").click()
    page.locator("#leaderboard th", has_text="trial").click()
    assert page.locator("#leaderboard tbody tr").first.inner_text()[:2] == "39"
    page.evaluate("document.querySelector('#leaderboard .scroll').scrollTop = 40")
    drag(page, "#chart-history .nsewdrag", (0.3, 0.5), (0.7, 0.5))
    page.locator("#chart-curves .legendtoggle").first.click()
    zoom = "document.getElementById('chart-history').layout.xaxis.range"
    hidden = """document.getElementById('chart-curves').data
        .filter(line => line.visible === 'legendonly').map(line => line.name)"""
    # Plotly waits whether a second click follows.
    end = time.monotonic() + 30
    while not page.evaluate(hidden) or page.evaluate(zoom)[0] <= 5:
        assert time.monotonic() < end
        page.wait_for_timeout(100)
    changed = page.evaluate(zoom), sorted({*page.evaluate(hidden)})
    assert changed[0][0] > 5, "the mouse has zoomed"
    assert changed[1], "the mouse has hidden a line"
    page.evaluate("document.getElementById('slices').scrollIntoView()")
    top = "document.getElementById('slices').getBoundingClientRect().top"
    before = page.evaluate(top)

    draw = random.Random(9)
    for _ in range(3):
        study.optuna.add_trial(trial(draw))
    watcher.wait_for("23 complete")
    study.optuna.add_trial(trial(draw))
    watcher.wait_for("24 complete")

    screenshot(page, "watched")
    rows = page.locator("#leaderboard tbody tr")
    assert rows.count() == 44
    assert rows.first.inner_text()[:2] == "44", "the table stays sorted"
    assert page.locator("#config details").first.get_attribute("open") is not None
    assert (
        page.evaluate("document.querySelector('#leaderboard .scroll').scrollTop") == 40
    )
    assert (page.evaluate(zoom), sorted({*page.evaluate(hidden)})) == changed
    points = """document.getElementById('chart-history').data
        .reduce((sum, line) => sum + line.x.length, 0)"""
    assert page.evaluate(points) >= 33, "the chart has the new trials"
    assert abs(page.evaluate(top) - before) < 2, "what is read does not move"
    charts = page.locator(".plotly-graph-div").count()
    assert page.locator(".plotly-graph-div:has(.main-svg)").count() == charts
    page.locator("#leaderboard th", has_text="trial").click()
    assert rows.first.inner_text()[:1] == "0", "a new table can be sorted"
    origin = f"http://127.0.0.1:{port}/"
    assert {address.removeprefix(origin) for address in watcher.asked} <= {
        "",
        "version",
        "plotly.js",
    }
    assert watcher.wrong == []

    process.send_signal(signal.SIGINT)
    assert process.wait(seconds=30).returncode == ANSWER
    page.locator("#lost").wait_for(state="visible", timeout=30_000)
    page.close()


@pytest.mark.slow
def test_a_page_says_that_its_study_can_not_be_read(
    browser: Any, station: Station, tmp_path: Path
) -> None:
    study = made_study(folder_of(tmp_path), [trial(random.Random(0))])
    process, port = watched(station, tmp_path)
    watcher = Watcher(browser, port)
    shutil.rmtree(study.folder)
    lost = watcher.page.locator("#lost", has_text="not read: ")
    lost.wait_for(state="visible", timeout=60_000)
    assert "No such file" in lost.inner_text()
    assert ask(port, "/version")[0] == 503
    assert ask(port, "/answer.json")[0] == 404
    process.send_signal(signal.SIGINT)
    assert process.wait(seconds=30).returncode == ANSWER


@pytest.mark.slow
def test_a_page_follows_a_study_from_before_its_first_trial_to_its_answer(
    browser: Any, station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    more = ("n_trials=3", "trainer.max_steps=6", "trainer.eval_steps=2")
    study = (*study_overrides(tiny_base, "s"), *more)
    gates = tmp_path / "gate"
    trains = station.start(*study, cwd=tmp_path, before=gated(gates))
    wait_until((folder_of(tmp_path) / "study.json").exists, trains)
    process, port = watched(station, tmp_path)
    watchers = [Watcher(browser, port, width) for width in (1280, 390)]
    page = watchers[0].page
    page.locator("header .verdict", has_text="no trial is complete yet").wait_for()
    screenshot(page, "watched-first")
    assert trains.poll() is None
    for number in (1, 2, 3):
        gate(gates, number, "open").touch()
    page.locator("#leaderboard").wait_for(timeout=60_000)
    ended = trains.wait()
    assert ended.returncode == 0, ended.stderr

    for watcher in watchers:
        verdict = watcher.page.locator("header .verdict", has_text="On the test rows")
        watcher.page.bring_to_front()
        verdict.wait_for(timeout=60_000)
        width = watcher.page.viewport_size["width"]
        screenshot(watcher.page, f"watched-{width}")
        assert watcher.page.evaluate("document.documentElement.scrollWidth") <= width
        assert watcher.page.locator("#leaderboard a").count() == 0, "no such address"
        assert watcher.wrong == []
    process.send_signal(signal.SIGINT)
    assert process.wait(seconds=30).returncode == ANSWER
    assert len(Study.load(folder_of(tmp_path)).finished()) == 3


def test_a_plain_multirun_is_shown(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    from support.configs import tiny_overrides

    more = ("quantization=none", "sample_prompts=[]", "trainer.max_steps=2")
    jobs = ("-m", "seed=1,2", "hydra.sweep.dir=outputs/sweeps/s", *more)
    ended = station.run(*tiny_overrides(tiny_base), *jobs, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    page = LivePage(folder_of(tmp_path))
    assert "2 complete" in page.current().html
    page._rests_until = 0
    assert page.current() is page.current()
    assert page.builds == 1
