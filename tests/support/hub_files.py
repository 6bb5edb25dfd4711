"""A hub on this machine that serves model repositories for download."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubFiles:
    """The repositories, and which files were asked for."""

    address: str
    folders: dict[str, Path]
    """By `owner/name`. Each has one commit."""
    downloads: list[str] = field(default_factory=list)
    """Names of the files that were downloaded."""


@contextlib.contextmanager
def serve_hub(folders: dict[str, Path]) -> Iterator[HubFiles]:
    """Serve folders as repositories; HF_ENDPOINT is the address of the yielded hub."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *arguments: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = (
                self.path.partition("?")[0]
                .removeprefix("/")
                .removeprefix("api/models/")
            )
            name = "/".join(path.split("/")[:2])
            folder = folders.get(name)
            if folder is None:
                self._refuse("RepoNotFound")
                return
            at_revision = path.partition("/resolve/")[2]
            file = at_revision.partition("/")[2]
            if file and not (folder / file).is_file():
                self._refuse("EntryNotFound")
                return
            if file:
                content = (folder / file).read_bytes()
                if with_body:
                    hub.downloads.append(file)
            elif "/tree/" in path:
                content = json.dumps(_list(folder)).encode()
            else:
                repository = {"id": name, "modelId": name, "sha": COMMIT}
                content = json.dumps(repository).encode()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def _refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Error-Code", code)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = HubFiles(f"http://127.0.0.1:{server.server_port}", folders)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _list(folder: Path) -> list[dict[str, object]]:
    """The files of a repository, as the hub lists them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]
