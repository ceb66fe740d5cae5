"""A hub that speaks Hugging Face's protocol to its own library."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT, OLDER = "c" * 40, "a" * 40


@dataclass
class Hub:
    """One repository with these files at two commits; what a path of `refused` is answered with."""

    repository: str = "team/sums"
    kind: str = "datasets"
    """Or `models`, whose files have no such word in their path."""
    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    older: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    """Start of a path: status, error code, message."""
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        for start, (status, code, message) in self.refused.items():
            if path.startswith(start):
                return status, {"X-Error-Code": code, "X-Error-Message": message}, b""
        revisions = {"main": COMMIT, "refs%2Fconvert%2Fparquet": COMMIT, "v1": OLDER}
        parts = path.partition("?")[0].replace(self.repository, "it", 1).strip("/").split("/", 4)
        if self.kind == "models" and parts[0] == "it":
            parts = ["models", "it", *"/".join(parts[1:]).split("/", 2)]
        match parts:
            case ["api", self.kind, "it", "revision", name] if name in revisions:
                return 200, {}, json.dumps({"id": self.repository, "sha": revisions[name], "siblings": []}).encode()
            case ["api", self.kind, "it", "revision", _]:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            case ["api", self.kind, "it", "tree", commit]:
                return 200, {}, json.dumps([entry(*item) for item in self.at(commit).items()]).encode()
            case [self.kind, "it", "resolve", commit, name] if name in self.at(commit):
                data = self.at(commit)[name]
                return 200, {"ETag": f'"{blob(data)}"', "X-Repo-Commit": commit}, data
            case _:
                return 401, {"X-Error-Code": "RepoNotFound"}, b""

    def at(self, commit: str) -> dict[str, bytes]:
        return self.files if commit == COMMIT else self.older


def blob(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": blob(data)}


@contextmanager
def serving(given: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, behind the library's own constants; `cache`: where the library keeps what it fetches."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given.asked.append(self.path)
            given.tokens.add(self.headers.get("Authorization", ""))
            status, headers, body = given.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 (the base class's name)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    given.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", given.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", given.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield given
    finally:
        server.shutdown()
        server.server_close()
