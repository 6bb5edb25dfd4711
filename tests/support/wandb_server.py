"""A stub of W&B's server: it answers GraphQL, file_stream and uploads, and holds what W&B would
show of each run at the end."""

import contextlib
import gzip
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Behaviour = Literal["answer", "refuse", "hang"]


@dataclass
class ShownRun:
    """What the server would show of one run."""

    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The rows by their step. W&B's client sees to it that a step that is sent again, by another
    `wandb sync`, has the same number; so the server must take it as the same row."""
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, "ShownArtifact"] = field(default_factory=dict)
    """By their names, once they are committed."""
    exit_code: int | None = None


@dataclass
class ShownArtifact:
    """What the server would show of one artifact."""

    run: str
    name: str
    kind: str
    aliases: list[str]
    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class WandbServer:
    """The stub server on a free port of this machine; `behaviour` may change while it runs."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = "answer"
        self.runs: dict[str, ShownRun] = {}
        self.requests: list[str] = []
        """The names of the GraphQL operations, and the paths of other requests."""
        self._artifacts: dict[str, ShownArtifact] = {}
        """By their ids."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        handler = type("Handler", (_Handler,), {"stub": self})
        self._server = _HttpServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def die(self) -> None:
        """Stop for good: later connections are refused."""
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def reply(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the JSON answer to one request."""
        with self._lock:
            if path.endswith("/graphql"):
                request = json.loads(body)
                variables = request.get("variables") or {}
                return 200, {"data": self._graphql(request["query"], variables)}
            self.requests.append(path)
            if path.endswith("/file_stream"):
                self._stream(path.split("/")[-2], json.loads(body))
            elif path.startswith("/upload/"):
                _, _, kind, owner, name = path.split("/", 4)
                owners = self.runs if kind == "run" else self._artifacts
                owners[owner].files[urllib.parse.unquote(name)] = body
            return 200, {}

    def hang(self) -> None:
        """Wait until the server ends."""
        self._closed.wait()

    def _graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        operation = query.split("(")[0].split("{")[0].split()[-1]
        self.requests.append(operation)
        if "upsertBucket" in query:
            return {"upsertBucket": self._upsert(variables)}
        if "createRunFiles" in query:
            files = []
            for name in variables["files"]:
                url = f"{self.address}/upload/run/{variables['run']}/{name}"
                files.append({"name": name, "uploadUrl": url})
            answer = {"runID": variables["run"], "uploadHeaders": [], "files": files}
            return {"createRunFiles": answer}
        if "rtifact" in operation:
            return self._artifact_operation(operation, variables)
        if "bucket(" in query:
            return {"model": {"bucket": self._bucket(variables)}}
        if "viewer" in query:
            viewer = {"id": "1", "entity": "user", "username": "user", "flags": "{}"}
            return {"viewer": viewer}
        return {}

    def _artifact_operation(
        self, operation: str, variables: dict[str, Any]
    ) -> dict[str, Any]:
        given = variables.get("input", variables)
        if operation == "CreateArtifact":
            artifact_id = f"artifact{len(self._artifacts)}"
            self._artifacts[artifact_id] = ShownArtifact(
                given["runName"],
                given["artifactCollectionName"],
                given["artifactTypeName"],
                sorted(alias["alias"] for alias in given["aliases"] or []),
                json.loads(given.get("metadata") or "{}"),
            )
            artifact = {
                "id": artifact_id,
                "state": "PENDING",
                "artifactSequence": {"id": "1", "latestArtifact": None},
            }
            return {"createArtifact": {"artifact": artifact}}
        if operation == "CreateArtifactManifest":
            manifest = {"id": "1", "file": self._artifact_file(given, "manifest")}
            return {"createArtifactManifest": {"artifactManifest": manifest}}
        if operation == "CreateArtifactFiles":
            edges = []
            for file in given["artifactFiles"]:
                edges.append({"node": self._artifact_file(file, file["name"])})
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if operation == "CommitArtifact":
            artifact_id = given["artifactID"]
            committed = self._artifacts[artifact_id]
            del committed.files["manifest"]
            self.runs[committed.run].artifacts[committed.name] = committed
            return {"commitArtifact": {"artifact": {"id": artifact_id, "digest": ""}}}
        if operation == "ArtifactByID":
            return {"artifact": self._artifact_value(given["id"])}
        if operation == "ArtifactMembershipByName":
            return {"project": {"artifactCollectionMembership": self._member(given)}}
        return {"project": None}

    def _member(self, given: dict[str, Any]) -> dict[str, Any] | None:
        """The newest version of an artifact that has an alias, as `name:alias`."""
        name, _, alias = given["name"].partition(":")
        for artifact_id, artifact in reversed(self._artifacts.items()):
            if artifact.name == name and alias in artifact.aliases:
                value = self._artifact_value(artifact_id)
                return {
                    "__typename": "ArtifactCollectionMembership",
                    "id": artifact_id,
                    "versionIndex": value["versionIndex"],
                    "createdAt": value["createdAt"],
                    "aliases": [
                        {"__typename": "ArtifactAlias", "id": each, "alias": each}
                        for each in artifact.aliases
                    ],
                    "artifactCollection": value["artifactSequence"],
                    "artifact": value,
                }
        return None

    def _artifact_value(self, artifact_id: str) -> dict[str, Any]:
        artifact = self._artifacts[artifact_id]
        versions = [
            key for key, each in self._artifacts.items() if each.name == artifact.name
        ]
        project = {"id": "1", "internalId": "1", "name": "finetune"}
        return {
            "__typename": "Artifact",
            "id": artifact_id,
            "artifactSequence": {
                "__typename": "ArtifactSequence",
                "name": artifact.name,
                "project": {**project, "entity": {"name": "user"}},
            },
            "versionIndex": versions.index(artifact_id),
            "artifactType": {"name": artifact.kind},
            "description": None,
            "metadata": json.dumps(artifact.metadata),
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": 1,
            "digest": artifact_id,
            "commitHash": None,
            "fileCount": len(artifact.files),
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "aliases": [],
        }

    def _artifact_file(self, given: dict[str, Any], name: str) -> dict[str, Any]:
        artifact_id = given["artifactID"]
        return {
            "id": "1",
            "name": name,
            "displayName": name,
            "uploadUrl": f"{self.address}/upload/artifact/{artifact_id}/{name}",
            "uploadHeaders": [],
            "storagePath": name,
            "uploadMultipartUrls": None,
            "artifact": {"id": artifact_id},
        }

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables["name"]
        inserted = run_id not in self.runs
        run = self.runs.setdefault(run_id, ShownRun())
        for attribute, name in (
            ("name", "displayName"),
            ("group", "groupName"),
            ("job_type", "jobType"),
            ("tags", "tags"),
        ):
            if variables.get(name) is not None:
                setattr(run, attribute, variables[name])
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        if variables.get("summaryMetrics"):
            run.summary = json.loads(variables["summaryMetrics"])
        project = {"id": "1", "name": "finetune", "entity": {"id": "1", "name": "user"}}
        bucket = {
            "id": run_id,
            "name": run_id,
            "displayName": run.name,
            "config": json.dumps(run.config),
            "historyLineCount": len(run.history),
            "project": project,
        }
        return {"bucket": bucket, "inserted": inserted}

    def _bucket(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        run_id = variables.get("name") or variables.get("runId") or variables.get("run")
        run = self.runs.get(str(run_id))
        if run is None:
            return None
        tail = [json.dumps(row) for _, row in sorted(run.history.items())][-1:]
        return {
            "id": run_id,
            "name": run_id,
            "config": json.dumps(run.config),
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.name,
            "tags": run.tags,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
        }

    def _stream(self, run_id: str, body: dict[str, Any]) -> None:
        run = self.runs[run_id]
        files = body.get("files") or {}
        history = files.get("wandb-history.jsonl")
        if history:
            for line in history["content"]:
                row = json.loads(line)
                run.history[row["_step"]] = row
        summary = files.get("wandb-summary.json")
        if summary:
            # The server holds one line: a later one takes the place of the earlier.
            run.summary = json.loads(summary["content"][-1])
        if body.get("complete"):
            run.exit_code = body.get("exitcode")


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Print nothing when W&B closes a connection."""


class _Handler(BaseHTTPRequestHandler):
    stub: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.stub.behaviour == "hang":
            self.stub.hang()
            return
        if self.stub.behaviour == "refuse":
            self._send(401, {"errors": [{"message": "refused"}]})
            return
        self._send(*self.stub.reply(self.path, body))

    def do_PUT(self) -> None:
        self.do_POST()

    def do_GET(self) -> None:
        self.do_POST()

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Run a stub server."""
    server = WandbServer()
    try:
        yield server
    finally:
        server.die()
