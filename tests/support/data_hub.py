"""In place of the Hugging Face hub of data sets: a patch of the calls of datasets, and a server on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import datasets
import pytest


class Hub:
    """Every id is the data set of one folder. `asked` has the (id, configuration, revision) of each call."""

    def __init__(self, folder: Path, commits: dict[str | None, str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.commits = str(folder), commits
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.load = datasets.load_dataset_builder
        monkeypatch.setattr(datasets, "load_dataset_builder", self.builder)
        for name in ("get_dataset_config_names", "get_dataset_default_config_name"):
            real = getattr(datasets, name)
            monkeypatch.setattr(datasets, name, lambda path, real=real, **_: real(self.at(path)))

    def at(self, path: str) -> str:
        """The folder that is loaded: one that is there, or that of all ids."""
        return path if Path(path).is_dir() else self.folder

    def builder(self, path: str, name: str | None = None, revision: str | None = None) -> Any:
        if self.at(path) == path:
            return self.load(path, name=name, revision=revision)
        self.asked.append((path, name, revision))
        made = self.load(self.folder, name=name)
        made.hash = self.commits.get(revision, revision)
        return made


@contextlib.contextmanager
def serve_hub(folder: Path, commits: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Serves a folder as the data set own/set, as far as datasets asks for it.

    Args:
        folder: its files.
        commits: the commit of each branch and tag.

    Yields:
        The address, and the requests so far, as "GET /path".
    """
    asked: list[str] = []

    class Handler(_HubHandler):
        pass

    Handler.folder, Handler.commits, Handler.asked = folder, commits, asked
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _HubHandler(BaseHTTPRequestHandler):
    folder: Path
    commits: dict[str, str]
    asked: list[str]

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(f"{self.command} {path}")
        _, _, file = path.partition("/datasets/own/set/resolve/")
        _, _, about = path.partition("/api/datasets/own/set")
        if file:
            self._file(*file.split("/", 1))
        elif about.startswith("/tree/"):
            self._tree(self.folder.joinpath(*about.split("/")[3:]))
        elif path.startswith("/api/datasets/own/set"):
            revision = about.removeprefix("/revision/") or "main"
            self._send(200, {"_id": "1", "id": "own/set", "sha": self._commit(revision), "siblings": []})
        else:
            self._send(404, {}, {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _commit(self, revision: str) -> str:
        return self.commits.get(revision, revision)

    def _file(self, revision: str, name: str) -> None:
        commit = {"X-Repo-Commit": self._commit(revision)}
        if (self.folder / name).is_file():
            content = (self.folder / name).read_bytes()
            self._send(200, content, {**commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
        else:
            self._send(404, {}, {**commit, "X-Error-Code": "EntryNotFound"})

    def _tree(self, below: Path) -> None:
        if not below.is_dir():
            self._send(404, {}, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(
            200,
            [
                {
                    "path": path.relative_to(self.folder).as_posix(),
                    "type": "directory" if path.is_dir() else "file",
                    "oid": "0" * 40,
                    "size": path.stat().st_size,
                }
                for path in sorted(below.iterdir())
            ],
        )

    def _send(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
