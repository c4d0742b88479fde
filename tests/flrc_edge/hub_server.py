"""A hub on this machine for tests: the part of its HTTP interface that pushing and pulling a model needs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from time import sleep
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34
_LARGE = 10_000  # bytes from which the hub wants a file through LFS


@dataclass
class Hub:
    """The repositories of the server: branch -> commit, commit -> files, and what was asked for."""

    address: str = ""
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    stored: dict[str, bytes] = field(default_factory=dict)  # LFS objects by SHA-256
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path
    stall: str = ""  # name of a file whose second half is held back
    stalled: Event = field(default_factory=Event)

    def commit(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        """Add a commit with exactly these files."""
        text = "".join(f"{name}{hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items()))
        sha = hashlib.sha1(f"{repository}{branch}{len(self.commits)}{text}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches.setdefault(repository, {})[branch] = sha
        return sha

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a branch or commit."""
        return self.commits[self.branches[repository].get(revision, revision)]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve an empty hub on a free port of this machine."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        self.body = self._read_body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for verbs, pattern, method in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in verbs:
                method(self, *found.groups())
                return
        self._fail(404, "EntryNotFound", path)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _info(self, repository: str, revision: str | None) -> None:
        sha = self._resolved(repository, revision or "main")
        if sha is not None:
            files = self.hub.commits[sha].items()
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files]
            self._json({"id": repository, "modelId": repository, "sha": sha, "siblings": siblings})

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        sha = self._resolved(repository, revision)
        if sha is None:
            return
        data = self.hub.commits[sha].get(name)
        if data is None:
            self._fail(404, "EntryNotFound", name)
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET" and name == self.hub.stall:
            self.wfile.write(data[start : start + len(data) // 2])
            self.hub.stall = ""
            self.hub.stalled.set()
            self.close_connection = True
            sleep(60)  # the client is killed meanwhile
        elif self.command == "GET":
            self.wfile.write(data[start:])

    def _create(self) -> None:
        if not self._may_write():
            return
        found = json.loads(self.body)
        repository = f"{found['organization']}/{found['name']}"
        if repository in self.hub.branches:
            self._json({"error": "exists", "url": f"{self.hub.address}/{repository}"}, 409)
            return
        if found.get("private") or found.get("visibility") == "private":
            self.hub.private.add(repository)
        self.hub.commit(repository, "main", {".gitattributes": b""})
        self._json({"url": f"{self.hub.address}/{repository}"})

    def _branch(self, repository: str, branch: str) -> None:
        if self._may_write():
            self.hub.branches[repository].setdefault(branch, self.hub.branches[repository]["main"])
            self._json({})

    def _card(self) -> None:
        self._json({"warnings": [], "errors": []})

    def _preupload(self, repository: str, revision: str) -> None:
        if self._may_write():
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] > _LARGE else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(self.body)["files"]
            ]
            self._json({"files": modes})

    def _batch(self, repository: str) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.address}/objects/{o['oid']}"}}}
            for o in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        self.hub.stored[oid] = self.body
        self._json({})

    def _commit(self, repository: str, revision: str) -> None:
        if not self._may_write():
            return
        files = dict(self.hub.files(repository, revision))
        for line in self.body.splitlines():
            found = json.loads(line)
            value = found["value"]
            if found["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif found["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        sha = self.hub.commit(repository, revision, files)
        address = f"{self.hub.address}/{repository}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": address, "hookOutput": ""})

    def _resolved(self, repository: str, revision: str) -> str | None:
        branches = self.hub.branches.get(repository)
        hidden = repository in self.hub.private and not self._known()
        if branches is None or hidden:
            self._fail(401, "RepoNotFound", "Repository not found")
            return None
        sha = branches.get(revision, revision)
        if sha not in self.hub.commits:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_write(self) -> bool:
        if not self._known():
            self._fail(401, "", "Invalid username or password.")
        return self._known()

    def _fail(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            if text:
                self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    (("GET",), rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _Handler._info),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
    (("POST",), r"/api/repos/create", _Handler._create),
    (("POST",), rf"/api/models/{_NAME}/branch/(.+)", _Handler._branch),
    (("POST",), r"/api/validate-yaml", _Handler._card),
    (("POST",), rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler._preupload),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    (("PUT",), r"/objects/([0-9a-f]{64})", _Handler._store),
    (("POST",), rf"/api/models/{_NAME}/commit/([^/]+)", _Handler._commit),
]
