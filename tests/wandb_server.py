"""A W&B server as far as a run, wandb sync and a workspace need one; it keeps what it is told. For tests alone."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Runs by id, and views in the order in which they came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.files: set[str] = set()
        self.artifacts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """What GraphQL is answered, by what is asked."""
        if "upsertBucket(" in query:
            run = self.runs.setdefault(given["name"], {})
            run |= {name: value for name, value in given.items() if value is not None}
            return {"upsertBucket": {"bucket": self._bucket(given["name"]), "inserted": len(run) == 0}}
        if "RunResumeStatus" in query:
            bucket = self._bucket(given["name"]) if given["name"] in self.runs else None
            entity = {"id": "e", "name": "someone"}
            return {"model": {"id": "p", "name": given["project"], "entity": entity, "bucket": bucket}}
        if "createRunFiles(" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/files/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "createArtifact(" in query:
            self.artifacts.append(given["input"])
            artifact = {"id": "a", "digest": given["input"]["digest"], "state": "COMMITTED"}
            sequence = {"id": "s", "latestArtifact": None}
            return {"createArtifact": {"artifact": artifact | {"artifactSequence": sequence}}}
        if "upsertView(" in query:
            self.views.append(given)
            return {"upsertView": {"view": {"id": "v", "name": given["name"]}, "inserted": True}}
        if "viewer" in query:
            viewer = {"id": "u", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer}
        return {"project": None}

    def _bucket(self, name: str) -> dict[str, Any]:
        rows = self.history.get(name, [])
        project = {"id": "p", "name": "rmt_lightning", "entity": {"id": "e", "name": "someone"}}
        return {
            "id": name, "name": name, "displayName": name, "sweepName": None, "project": project, "tags": [],
            "config": self.runs[name].get("config", "{}"), "wandbConfig": "{}",
            "summaryMetrics": json.dumps(rows[-1] if rows else {}), "historyLineCount": len(rows),
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self.server.files.add(self.path.removeprefix("/files/"))
        self._reply({})

    def do_POST(self) -> None:
        text = self._body()
        content = json.loads(text) if text.startswith(b"{") else {}
        if self.path.endswith("/file_stream"):
            rows = self.server.history.setdefault(self.path.split("/")[-2], [])
            if sent := (content.get("files") or {}).get("wandb-history.jsonl"):
                rows[sent["offset"] :] = map(json.loads, sent["content"])
            self._reply({"exitcode": None, "limits": {}})
        else:
            self._reply({"data": self.server.answer(content.get("query", ""), content.get("variables") or {})})

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _reply(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """A test needs no log."""


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
