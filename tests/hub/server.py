"""A Hugging Face hub on this machine: as much of its interface as fetching a model takes, with faults to switch on."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

CHUNK = 4096


@dataclass
class Repository:
    """One commit of a model repository and the names that stand for it."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    private: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def knows(self, revision: str) -> bool:
        return revision in self.revisions or (len(revision) >= 4 and self.commit.startswith(revision))

    def siblings(self) -> list[dict[str, Any]]:
        """What the hub says of the files; large ones lie in its large file storage, here all .safetensors."""
        listed = []
        for name, data in self.files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            listed.append(entry)
        return listed


@dataclass
class Seen:
    """A request, and how many bytes of a file its answer carried."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0


@dataclass
class Hub:
    """The server's state: its repositories, what goes wrong, and what it was asked."""

    url: str
    other_url: str  # the same server under another name, as large files come from another host
    repositories: dict[str, Repository] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    api_status: int | None = None  # instead of an answer about a repository
    api_body: bytes | None = None
    file_status: int | None = None  # instead of a file
    token: str | None = None  # the only one accepted, where a request has one
    cut_after: dict[str, list[int]] = field(default_factory=dict)  # end of name: bytes sent before each next cut
    wrong: set[str] = field(default_factory=set)  # files whose first byte comes changed
    delay_s: float = 0.0  # before every chunk of a large file
    ranges: bool = True

    def add(self, repository: str, folder: Path, **changes: Any) -> Repository:
        """Put a folder's files in a repository of that name."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        self.repositories[repository] = Repository(files, **changes)
        return self.repositories[repository]

    def sent(self, ending: str = "") -> list[Seen]:
        """The requests in which bytes of files so named were sent."""
        return [seen for seen in self.seen if seen.sent and seen.path.endswith(ending)]


def blob_id(data: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub, stopped at the end."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    port = server.server_address[1]
    Handler.hub = Hub(f"http://127.0.0.1:{port}", f"http://localhost:{port}")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield Handler.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        seen = Seen(self.command, path, self.headers.get("Range"), token)
        self.hub.seen.append(seen)
        if path.startswith("/cdn/"):
            _, _, repository, name = path.split("/", 3)
            self._large(seen, name, self.hub.repositories[repository.replace("--", "/")].files[name])
        elif self.hub.token is not None and token not in (None, self.hub.token):
            self._answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), token)
        else:
            repository, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._resolve(seen, repository, revision, name)

    do_HEAD = do_GET

    def _known(self, repository: str, revision: str, token: str | None) -> Repository | None:
        """The repository, or None after an answer that says what is missing."""
        found = self.hub.repositories.get(repository)
        if found is None or (found.private and token is None):
            self._answer(401 if token is None else 404, {"X-Error-Code": "RepoNotFound"})
        elif not found.knows(revision):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return found
        return None

    def _api(self, path: str, token: str | None) -> None:
        if self.hub.api_status is not None:
            self._answer(self.hub.api_status, {"X-HF-Warning": "trouble; this is a warning of the server"})
            return
        repository, _, revision = path.partition("/revision/")
        found = self._known(repository, revision or "main", token)
        if found is not None:
            about = {"id": repository, "sha": found.commit, "private": False, "siblings": found.siblings()}
            self._answer(200, {}, json.dumps(about).encode() if self.hub.api_body is None else self.hub.api_body)

    def _resolve(self, seen: Seen, repository: str, revision: str, name: str) -> None:
        found = self._known(repository, revision, seen.token)
        if found is None:
            return
        if found.gated:
            self._answer(401 if seen.token is None else 403, {"X-Error-Code": "GatedRepo"})
        elif name not in found.files:
            self._answer(404, {"X-Error-Code": "EntryNotFound"})
        elif self.hub.file_status is not None:
            self._answer(self.hub.file_status, {})
        else:
            data = found.files[name]
            headers = {"X-Repo-Commit": found.commit, "ETag": f'"{blob_id(data)}"'}
            if name.endswith(".safetensors"):
                headers["X-Linked-Size"] = str(len(data))
                headers["X-Linked-ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
                headers["Location"] = f"{self.hub.other_url}/cdn/{repository.replace('/', '--')}/{name}"
                self._answer(302, headers)
            else:
                self._large(seen, name, data, headers)

    def _large(self, seen: Seen, name: str, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A file or the part of it that was asked for, cut, slow or wrong as told."""
        data = bytes([data[0] ^ 1]) + data[1:] if name in self.hub.wrong else data
        start = int(seen.range.removeprefix("bytes=").rstrip("-")) if seen.range and self.hub.ranges else 0
        part = data[start:]
        self.send_response(206 if start else 200)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts: list[int] = next((c for ending, c in self.hub.cut_after.items() if name.endswith(ending) and c), [])
        stop = cuts.pop(0) if cuts else len(part)
        for i in range(0, min(stop, len(part)), CHUNK):
            time.sleep(self.hub.delay_s)
            chunk = part[i : min(i + CHUNK, stop)]
            seen.sent += len(chunk)
            self.wfile.write(chunk)
            self.wfile.flush()
        self.close_connection = self.close_connection or stop < len(part)

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
