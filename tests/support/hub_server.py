"""A stub of the Hugging Face hub that takes uploads: repositories, branches, commits, LFS files."""

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_secretsecretsecret"


@dataclass
class Repository:
    """A model repository: its branches' commits, each with all files."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        sha = hashlib.sha1(f"{branch}{len(self.messages)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files at a branch or a commit, but for the one that the hub itself adds."""
        files = dict(self.commits[self.branches.get(revision, revision)])
        files.pop(".gitattributes", None)
        return files


class HubServer:
    """The stub on a free port; it knows one token, whose owner is `me`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        """Method and path of each request."""
        self.fails: dict[str, int] = {}
        """Statuses by the beginnings of requests (`PUT /lfs`) that are answered with them."""
        self.on_request: Callable[[str], None] = lambda request: None
        self._large: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"stub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which the hub's library uses this hub."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the answer to one request."""
        path = urllib.parse.unquote(path.partition("?")[0])
        request = f"{method} {path}"
        self.requests.append(request)
        self.on_request(request)
        for beginning, status in self.fails.items():
            if request.startswith(beginning):
                return status, {"error": "the stub was told to fail"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/lfs/"):
            self._large[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"objects": list(map(self._batch, json.loads(body)["objects"]))}
        words = path.removeprefix("/api/models/").strip("/").split("/")
        name, rest = "/".join(words[:2]), words[2:]
        repository = self.repositories.get(name)
        if repository is None:
            return 404, {"code": "RepoNotFound"}
        return self._in_repository(name, repository, rest, body)

    def _create(self, given: dict[str, Any]) -> tuple[int, Any]:
        owner = given.get("organization") or "me"
        if owner == "others":
            return 403, {"error": "no rights"}
        name = f"{owner}/{given['name']}"
        answer = {"url": f"{self.address}/{name}"}
        if name in self.repositories:
            return 409, answer
        repository = Repository(given.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b""}, "initial commit")
        self.repositories[name] = repository
        return 200, answer

    def _batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.address}/lfs/{wanted['oid']}"
        actions = {"upload": {"href": href, "header": {}}}
        is_here = wanted["oid"] in self._large
        return wanted if is_here else wanted | {"actions": actions}

    def _in_repository(
        self, name: str, repository: Repository, words: list[str], body: bytes
    ) -> tuple[int, Any]:
        action, revision = (*words, "revision", "main")[:2] if not words else words[:2]
        if action == "branch":
            if revision in repository.branches:
                return 409, {"error": "exists"}
            repository.branches[revision] = repository.branches["main"]
            return 200, {}
        if action == "refs":
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
                for branch, sha in repository.branches.items()
            ]
            return 200, {"branches": branches, "converts": [], "tags": []}
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            return 404, {"code": "RevisionNotFound"}
        files = repository.commits[sha]
        if action == "revision":
            siblings = [{"rfilename": file} for file in files]
            card = _card_fields(files.get("README.md", b"").decode())
            answer = {"id": name, "sha": sha, "siblings": siblings, "cardData": card}
            return 200, answer
        if action == "preupload":
            return 200, {
                "files": [_mode(each, files) for each in json.loads(body)["files"]]
            }
        if action == "paths-info":
            wanted = urllib.parse.parse_qs(body.decode())["paths"]
            return 200, [_info(path, files[path]) for path in wanted if path in files]
        if action == "resolve":
            return 200, files["/".join(words[2:])]
        assert action == "commit", words
        lines = [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit", sha) != sha:
            return 412, {"error": "a commit has happened since"}
        changed = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del changed[value["path"]]
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self._large[value["oid"]]
            else:
                changed[value["path"]] = base64.b64decode(value["content"])
        new = repository.commit(revision, changed, lines[0]["value"]["summary"])
        return 200, {
            "commitUrl": f"{self.address}/{name}/commit/{new}",
            "commitOid": new,
        }


def _card_fields(card: str) -> dict[str, Any] | None:
    """The fields of a model card, as the hub reads them."""
    return yaml.safe_load(card.split("---")[1]) if card.startswith("---") else None


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _object_id(path: str, content: bytes) -> str:
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _mode(wanted: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    path = wanted["path"]
    mode = {
        "path": path,
        "uploadMode": "lfs" if _is_large(path) else "regular",
        "shouldIgnore": False,
    }
    if path in files:
        mode["oid"] = _object_id(path, files[path])
    return mode


def _info(path: str, content: bytes) -> dict[str, Any]:
    info: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if _is_large(path):
        oid = hashlib.sha256(content).hexdigest()
        info["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return info


class _Handler(BaseHTTPRequestHandler):
    stub: HubServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        needs_token = not self.path.startswith("/lfs/")
        if needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
            return
        self._send(*self.stub.answer(self.command, self.path, body))

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def do_HEAD(self) -> None:
        self.do_POST()

    def _send(self, status: int, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if isinstance(content, dict) and "code" in content:
            self.send_header("X-Error-Code", content["code"])
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a stub hub."""
    hub = HubServer()
    try:
        yield hub
    finally:
        hub.close()
