"""The report as a page of a small local server, which follows a study as it grows.

    python -m sweeps watch STUDY

The server answers this machine alone, and only reads: neither the study nor its folder changes.
"""

import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sweeps.answer.report import render_page
from sweeps.answer.report_data import ReportData
from sweeps.study.in_memory import snapshot
from sweeps.study.study import Study
from sweeps.study.version import study_version

HOST = "127.0.0.1"

POLL_SECONDS = 5
"""How often an open page asks for news."""


class LivePage:
    """The page of a study, rendered again only when the study has changed."""

    def __init__(self, load: Callable[[], Study]) -> None:
        """Begin with no page.

        Args:
            load: loads the study in its present state.
        """
        self._load = load
        self._lock = threading.Lock()
        self._version = ""
        self._content = ""

    def page(self) -> str:
        """Return the whole page, with plotly and the script that asks for news."""
        study = snapshot(self._load())
        version = study_version(study)
        return render_page(ReportData.read(study, None), news=(version, POLL_SECONDS))

    def content(self, known_version: str) -> str | None:
        """Return the page without plotly; None if the study is as it was.

        Args:
            known_version: the version that the browser shows.
        """
        # One at a time: several browsers get what was rendered for the first one.
        with self._lock:
            study = snapshot(self._load())
            version = study_version(study)
            if version == known_version:
                return None
            if version != self._version:
                data = ReportData.read(study, None)
                news = (version, POLL_SECONDS)
                self._content = render_page(data, news=news, with_plotly=False)
                self._version = version
            return self._content


def create_server(page: LivePage, port: int) -> ThreadingHTTPServer:
    """Create the server of a page; `serve_forever` answers until it is shut down.

    Args:
        page: the page.
        port: where it listens; 0: any free port.

    Raises:
        OSError: another program listens there.
    """

    class Handler(_Handler):
        live_page = page

    server = ThreadingHTTPServer((HOST, port), Handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of two paths, and nothing else."""

    live_page: LivePage

    def do_GET(self) -> None:
        if not self._is_asked_as_this_machine():
            # A page from elsewhere whose name was made to point here (DNS rebinding).
            self._send(HTTPStatus.FORBIDDEN, "")
            return
        path, _, version = self.path.partition("?")
        if path == "/":
            self._send(HTTPStatus.OK, self.live_page.page())
        elif path == "/content":
            content = self.live_page.content(version)
            if content is None:
                self._send(HTTPStatus.NO_CONTENT, "")
            else:
                self._send(HTTPStatus.OK, content)
        else:
            self._send(HTTPStatus.NOT_FOUND, "")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _is_asked_as_this_machine(self) -> bool:
        name = self.headers.get("Host", "").rpartition(":")[0]
        return name in (HOST, "localhost")

    def _send(self, status: HTTPStatus, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print no line for each request."""
