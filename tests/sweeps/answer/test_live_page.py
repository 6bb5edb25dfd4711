"""python -m sweeps watch S: the report on a page that follows its study."""

import http.client
import json
import random
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from support.browser import screenshot
from support.commands import Station, wait_until
from support.studies import COMPLETE, made_study, trial

from sweeps.answer import live_page
from sweeps.answer.live_page import LivePage, create_server
from sweeps.study.study import Study
from sweeps.study.version import study_version


@pytest.fixture
def study(tmp_path: Path) -> Any:
    draw = random.Random(0)
    return made_study(tmp_path / "s", [trial(draw, COMPLETE) for _ in range(5)])


@pytest.fixture
def port(study: Study) -> Iterator[int]:
    """The port of a running server."""
    server = create_server(LivePage(lambda: study), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def ask(
    port: int, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def version_of(page: str) -> str:
    return page.partition('data-version="')[2].partition('"')[0]


def test_content_comes_again_only_when_the_study_has_changed(
    study: Study, port: int
) -> None:
    status, page = ask(port, "/")
    assert (status, "Trial " in page) == (200, True)
    version = version_of(page)
    assert ask(port, f"/content?{version}") == (204, "")

    study.optuna.add_trial(trial(random.Random(1), COMPLETE))
    status, content = ask(port, f"/content?{version}")

    assert status == 200
    assert "6 complete" in content
    assert version_of(content) not in ("", version)
    assert len(content) < len(page) / 4  # without plotly


def test_rungs_of_a_running_trial_change_the_version(study: Study) -> None:
    before = study_version(study)
    folder = study.folder_of(0).path
    folder.mkdir(parents=True, exist_ok=True)
    assert study_version(study) == before
    (folder / "metrics.jsonl").write_text('{"step": 1, "eval/loss": 1.0}\n')
    assert study_version(study) != before


@pytest.mark.parametrize("path", ["/report.html", "/../study.journal", "/content/"])
def test_no_other_path_is_served(port: int, path: str) -> None:
    assert ask(port, path) == (404, "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_but_reading_is_allowed(port: int, method: str) -> None:
    assert ask(port, "/", method)[0] == 501


def test_head_has_no_body(port: int) -> None:
    assert ask(port, "/", "HEAD") == (200, "")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil:1", ""]
)
def test_a_name_from_elsewhere_is_refused(port: int, host: str) -> None:
    assert ask(port, "/", host=host or " ")[0] == 403


def test_it_listens_on_this_machine_alone(port: int) -> None:
    own = socket.gethostbyname(socket.gethostname())
    if own.startswith("127."):
        pytest.skip("the machine has no other address")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((own, port), timeout=5)


def test_the_folder_stays_as_it_is(study: Study, port: int) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in study.folder.rglob("*")}

    before = state()
    ask(port, "/")
    ask(port, "/content?")
    assert state() == before


def test_a_study_without_trials_has_a_page(tmp_path: Path) -> None:
    empty = made_study(tmp_path / "empty", [])
    assert "before its first trial" in LivePage(lambda: empty).page()


def test_the_command_says_where_it_is_and_ends_by_a_signal(
    station: Station, study: Study, tmp_path: Path
) -> None:
    process = station.start(
        "watch", str(study.folder), "--json", cwd=tmp_path, module="sweeps"
    )
    wait_until(lambda: "}" in process.printed(), process)
    address = json.loads(process.printed())["address"]
    port = int(address.rpartition(":")[2])
    assert ask(port, "/")[0] == 200

    taken = station.run(
        "watch", str(study.folder), "--port", str(port), cwd=tmp_path, module="sweeps"
    )
    assert taken.returncode == 1
    assert taken.stderr.startswith(f"error: --port={port}: ")
    process.send_signal(signal.SIGINT)
    assert process.wait().returncode == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


@pytest.mark.slow
def test_an_open_page_follows_the_study_and_stays_as_the_reader_left_it(
    browser: Any, study: Study, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_page, "POLL_SECONDS", 0.2)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    asked: set[str] = set()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.add(request.url.partition("?")[0]))
    page.goto(f"http://127.0.0.1:{port}/")
    page.locator("main details summary").first.click()
    page.locator("table.sortable th").first.click()
    page.evaluate("scrollTo(0, 700)")
    charts = page.locator(".plotly-graph-div").count()

    study.optuna.add_trial(trial(random.Random(1), COMPLETE))
    expect(page.locator("header")).to_contain_text("6 complete")

    assert page.locator("main details").first.get_attribute("open") is not None
    head = page.locator("table.sortable th").first
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.evaluate("scrollY") == 700
    expect(page.locator(".plotly-graph-div:has(.main-svg)")).to_have_count(charts)
    assert wrong == []
    assert asked == {f"http://127.0.0.1:{port}{path}" for path in ("/", "/content")}
    screenshot(page, "watch")
    page.close()
