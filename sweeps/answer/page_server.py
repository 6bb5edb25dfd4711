"""Serves the report of a study on this machine, as it grows: python -m sweeps watch STUDY.

Only to this machine, only to read, and nothing but the four addresses of `_CONTENTS`: no path of a
request reaches the file system.
"""

import logging
import socketserver
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from plotly.offline import get_plotlyjs

from finetune.console import error_line
from finetune.errors import refusal
from sweeps.answer.live_page import LivePage

log = logging.getLogger(__name__)

HOST = "127.0.0.1"

LOCAL_NAMES = ("127.0.0.1", "localhost")
"""Names of this machine in a request. Another one is that of a web page which has had its own name
point here (DNS rebinding), to read what is served."""


def serve(page: LivePage, port: int, announce: Callable[[str], None]) -> None:
    """Serve a page until Ctrl-C or SIGTERM, of which KeyboardInterrupt is raised.

    Args:
        page: the page.
        port: the port; 0: a free one.
        announce: called with the address once it is served.

    Raises:
        ConfigError: the port is in use, or not allowed.
    """
    try:
        server = _Server(page, port)
    except OSError as error:
        reason = f"can't be used ({error.strerror}); --port 0 takes a free one"
        raise refusal("--port", port, reason) from None
    with server:
        announce(f"http://{HOST}:{server.server_address[1]}/")
        server.serve_forever()


class _Server(ThreadingHTTPServer):
    # A request that is being answered does not hold up the end.
    daemon_threads = True
    block_on_close = False

    def __init__(self, page: LivePage, port: int) -> None:
        self.page = page
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer would look up the name of the machine, which may take seconds.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        # A browser that closes its connection is no event.
        if error is not None and not isinstance(error, OSError):
            log.warning("a request failed: %s", error_line(error))


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: _Server
    server_version = "sweeps"
    sys_version = ""
    timeout = 30
    """Seconds in which a request has to arrive."""

    def do_GET(self) -> None:
        """Answer with the headers and the content."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer with the headers alone."""
        self._answer()

    def _refuse_method(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"GET and HEAD only\n")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse_method  # noqa: N815

    def _answer(self) -> None:
        name, _, _ = self.headers.get("Host", "").rpartition(":")
        if (name or self.headers.get("Host")) not in LOCAL_NAMES:
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"not for this host\n")
            return
        content = self._CONTENTS.get(self.path.partition("?")[0])
        if content is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here\n")
            return
        kind, read = content
        try:
            body = read(self.server.page)
        # The study's folder or its database is out of reach, perhaps for a moment.
        except Exception as error:
            line = f"{error_line(error)}\n".encode()
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", line)
            return
        if body is None:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is none yet\n")
            return
        self._send(HTTPStatus.OK, kind, body)

    _CONTENTS: ClassVar[dict[str, tuple[str, Callable[[LivePage], bytes | None]]]] = {
        "/": ("text/html", lambda page: page.current().html.encode()),
        "/version": ("text/plain", lambda page: page.current().version.encode()),
        "/plotly.js": ("text/javascript", lambda _: get_plotlyjs().encode()),
        "/answer.json": ("application/json", lambda page: page.answer()),
    }

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Print nothing on each request."""
