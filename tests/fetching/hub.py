"""A hub on this machine: both hubs' HTTP protocols, as their clients use them, with faults on request.

Hugging Face: ``/api/models/ORG/NAME[/revision/REV]`` tells the commit and, with ``blobs``, sizes and hashes;
``/tree/REV`` lists; ``HEAD /ORG/NAME/resolve/REV/FILE`` gives x-repo-commit, etag and size, and for large
files a redirect to another host with x-linked-etag and x-linked-size; GET takes Range. ModelScope:
``/api/v1/models/ORG/NAME/repo/files`` lists, ``/repo?FilePath=`` gives.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "8867b3a1b5b2f5c4fdc04d51e3a0a7d2b4fd1234"
#: From this size on a file is a large one, kept beside git.
LARGE = 1 << 16


@dataclass
class FakeHub:
    """What it holds and what it does wrong. ``requests`` are (method, path, Range, Authorization).

    ``drops``: file -> after how many bytes the connection breaks, once; ``spoiled``: files that come with
    other bytes than listed; ``stalls``: file -> after how many bytes nothing more comes, once; ``down``: it
    answers 503.
    """

    repo: str
    files: dict[str, bytes]
    drops: dict[str, int] = field(default_factory=dict)
    stalls: dict[str, int] = field(default_factory=dict)
    spoiled: set[str] = field(default_factory=set)
    down: bool = False
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    url: str = ""

    def sent(self, name: str) -> list[str | None]:
        """The Range of each GET of *name*."""
        return [r for method, path, r, _ in self.requests if method == "GET" and path.endswith(f"/{name}")]

    def content(self, name: str) -> bytes:
        data = self.files[name]
        return data[:-1] + bytes([data[-1] ^ 1]) if name in self.spoiled else data


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer for *hub* on this machine, on a free port, while the block runs."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {k: v[0] for k, v in parse_qs(parts.query).items()}
        shown = f"{path}/{query['FilePath']}" if "FilePath" in query else path
        self.hub.requests.append(
            (self.command, shown, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if self.hub.down:
            self._send(503, b"down for today")
        elif path.startswith("/api/v1/models/"):
            self._modelscope(path.removeprefix("/api/v1/models/"), query)
        elif path.startswith("/api/models/"):
            self._model(path.removeprefix("/api/models/"))
        else:
            self._file(path.lstrip("/"))

    # Hugging Face

    def _model(self, path: str) -> None:
        repo = self.hub.repo
        if not (path == repo or path.startswith(f"{repo}/")):
            self._refuse("RepoNotFound")
            return
        revision = re.fullmatch(r"(?:/(revision|tree)/([^/]+))?", path.removeprefix(repo))
        assert revision is not None, path
        if revision[2] not in (None, "main", COMMIT):
            self._refuse("RevisionNotFound")
        elif revision[1] == "tree":
            self._json([self._entry(name) for name in self.hub.files])
        else:
            self._json({"id": repo, "sha": COMMIT, "siblings": [self._sibling(n) for n in self.hub.files]})

    def _sibling(self, name: str) -> dict[str, Any]:
        data = self.hub.files[name]
        large = {"size": len(data), "sha256": sha256(data), "pointerSize": 130}
        found = {"rfilename": name, "size": len(data), "blobId": blob(data)}
        return found | ({"lfs": large} if len(data) >= LARGE else {})

    def _entry(self, name: str) -> dict[str, Any]:
        data = self.hub.files[name]
        large = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        found = {"type": "file", "oid": blob(data), "size": len(data), "path": name}
        return found | ({"lfs": large} if len(data) >= LARGE else {})

    def _file(self, path: str) -> None:
        name = path.rpartition("/")[2]
        if path.startswith("stored/"):
            self._content(name)
            return
        if name not in self.hub.files or not path.startswith(f"{self.hub.repo}/resolve/{COMMIT}/"):
            self._refuse("EntryNotFound")
            return
        data = self.hub.files[name]
        if len(data) < LARGE:
            self._content(name, {"X-Repo-Commit": COMMIT, "ETag": f'"{blob(data)}"'})
            return
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")  # as the real one's large files are
        linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        self._send(302, b"", {"X-Repo-Commit": COMMIT, "Location": f"{elsewhere}/stored/{name}", **linked})

    def _refuse(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": code})

    # ModelScope

    def _modelscope(self, path: str, query: dict[str, str]) -> None:
        repo = self.hub.repo
        if path == f"{repo}/repo/files" and query["Revision"] == "master":
            self._json({"Code": 200, "Data": {"Files": [self._listed(name) for name in self.hub.files]}})
        elif path == f"{repo}/repo" and query["FilePath"] in self.hub.files:
            self._content(query["FilePath"])
        else:
            body = json.dumps({"Code": 10010205001, "Message": "not found"}).encode()
            self._send(404, body, {"Content-Type": "application/json"})

    def _listed(self, name: str) -> dict[str, Any]:
        data = self.hub.files[name]
        return {"Path": name, "Name": name, "Type": "blob", "Size": len(data), "Sha256": sha256(data)}

    # Both

    def _content(self, name: str, headers: dict[str, str] | None = None) -> None:
        data, status, extra = self.hub.content(name), 200, dict(headers or {})
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(data) - 1)
            extra["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if self.command == "GET" and name in self.hub.stalls:
            self._send(status, data, extra, until=self.hub.stalls.pop(name))
            self.connection.recv(1)  # until the client is gone
            return
        drop = self.hub.drops.pop(name, None) if self.command == "GET" else None
        self._send(status, data, extra, until=drop)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, until: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:until])
        if until is not None:
            self.close_connection = True
